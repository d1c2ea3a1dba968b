"""A policy that acts on the world model's belief: SB3's recurrent `predict`, for every kind of agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from worldmodel.data import Sampling, State
from worldmodel.errors import ConfigError, EnvError
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import cast, flatten
from worldmodel.spaces.keys import KeySpec


class Controller(nn.Module):
    """What turns a belief into an action; the one thing in which agents differ while they act."""

    def memory(self, world: WorldModel, batch_size: int) -> State:
        """What it remembers from one action to the next, at an episode's start: tensors [B, ...], none by default."""
        return State({})

    def act(
        self,
        world: WorldModel,
        state: State,
        memory: State,
        deterministic: bool,
        generator: torch.Generator,
        rows: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[Tensor, State]:
        """(canonical actions [B, A], memory after them) for the states [B]; `rows`: what was seen, raw, None in a dream."""
        raise NotImplementedError

    def estimate(self, feature: Tensor) -> Tensor | None:
        """Expected discounted return [N] from features [N, F]; None where nothing estimates it."""
        return None


class BeliefPolicy(BasePolicy):
    """An SB3 policy whose recurrent state is the world model's belief and the last action."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, world: WorldModel, controller: Controller, seed: int):
        super().__init__(observation_space, action_space)
        self.world, self.controller = world, controller
        self.generator = torch.Generator(device=world.device).manual_seed(seed)

    def initial_belief(self, batch_size: int) -> State:
        """The belief before anything was seen."""
        return State(
            {
                **self.world.initial(batch_size),
                **self.controller.memory(self.world, batch_size),
                "prev_action": torch.zeros(batch_size, self.world.action.dim, device=self.world.device),
            }
        )

    @torch.no_grad()
    def filter_and_act(
        self, belief: State, rows: dict[str, np.ndarray], is_first: np.ndarray, deterministic: bool
    ) -> tuple[np.ndarray, State]:
        """(canonical actions [B, A], belief after them) from raw observation rows [B, ...]."""
        self.world.eval()
        first = torch.as_tensor(is_first, dtype=torch.bool, device=self.world.device)
        sampling = Sampling(generator=self.generator, mode=deterministic)
        own = State({name: belief[name] for name in self.world.initial(0)})  # the controller's memory is not the world's
        state = self.world.observe(own, tensors(rows, self.world.device), belief["prev_action"], first, sampling)
        start = self.controller.memory(self.world, len(is_first))
        memory = State({name: torch.where(_broadcast_mask(first, x), x, belief[name]) for name, x in start.items()})
        action, memory = self.controller.act(self.world, state, memory, deterministic, self.generator, rows)
        action = self.world.action.project(action)
        return action.cpu().numpy(), State({**state, **memory, "prev_action": action})

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's predict: `state` is the belief as a tuple of arrays; None, or `episode_start`, forgets the past.

        deterministic: the belief's mode and the policy's mode. Without `state` every call is an episode's first.
        observation: lists and other kinds of numbers are taken as the space's own, where it can represent them.
        EnvError for an observation that training would refuse: not finite, of another shape, of no category.
        """
        observation, vectorized = self.batched(observation)
        rows = self.world.obs.to_raw(observation)
        self.world.obs.check(rows, "predict")  # a number that is not finite would stay in the belief
        size = len(next(iter(rows.values())))
        belief = self.initial_belief(size)
        first = np.ones(size, bool)
        if state is not None:
            belief = belief.like(state)
            first = np.zeros(size, bool) if episode_start is None else np.array(episode_start, bool).reshape(size)
        action, belief = self.filter_and_act(belief, rows, first, deterministic)
        env_action = self.world.action.decode(action)
        return (env_action if vectorized else env_action.squeeze(0)), belief.numpy()

    def batched(self, observation: Any) -> tuple[Any, bool]:
        """The observation, flat, with a batch axis, and whether it had one. EnvError for what `reset` returns as a whole."""
        keys, given = self.world.obs.keys, observation
        if isinstance(given, Mapping | tuple) and not self.world.obs.single:
            observation = flatten(given, keys)
        is_reset_result = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)
        if is_reset_result and (observation is given or observation.keys() != keys.keys()):
            raise EnvError("predict got (observation, info), which is what reset() returns. Give it the observation: reset()[0].")
        if isinstance(observation, Mapping):
            if observation.keys() != keys.keys():
                return observation, True  # which keys are wrong is said where rows are made of it
            observation = {k: _as_declared(v, keys[k]) for k, v in observation.items()}
            name, key = next(iter(keys.items()))
            if np.ndim(observation[name]) > len(key.raw_shape):
                return observation, True
            return {k: np.asarray(v)[None] for k, v in observation.items()}, False
        key = next(iter(keys.values()))
        observation = _as_declared(observation, key)
        return (observation, True) if observation.ndim > len(key.raw_shape) else (observation[None], False)

    def save(self, path: Any) -> None:
        """Refused: a policy alone is no agent, and SB3's file of one is a pickle."""
        raise ConfigError(f"A belief policy has no file of its own ('{path}'). Save its agent: model.save(path).")

    @classmethod
    def load(cls, path: Any, device: torch.device | str = "auto") -> BeliefPolicy:
        """Refused, as `save` is."""
        raise ConfigError(f"A belief policy has no file of its own ('{path}'). Load its agent: Dreamer.load(path).policy.")

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        raise NotImplementedError("A belief is needed: call predict().")


@runtime_checkable
class ActsOnBelief(Protocol):
    """What diagnostics ask of whatever acts: an algorithm with a world model, or a policy that came out of a dream."""

    policy: BeliefPolicy
    obs_spec: ObsSpec
    action_spec: ActionSpec
    device: torch.device


def _as_declared(x: Any, key: KeySpec) -> np.ndarray:
    """Numbers in the dtype that the space declares, where nothing but digits is lost; unchanged where more would be."""
    x = np.asarray(x)
    declared = cast(x, key.raw_dtype) if x.dtype.kind in "biuf" else None
    return x if declared is None else declared


def _broadcast_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask [B] that broadcasts over tensors [B, ...]."""
    return mask.view(-1, *[1] * (like.ndim - 1))
