"""A policy that acts on the world model's belief: SB3's recurrent `predict`, for every kind of agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from worldmodel.data import Sampling, State
from worldmodel.envs.masks import checked_mask
from worldmodel.errors import ConfigError, EnvError
from worldmodel.model import WorldModel, tensors
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.casts import cast, flatten
from worldmodel.spaces.keys import KeySpec
from worldmodel.spaces.specs import ACTION_MASK


class Controller(nn.Module):
    """Turns a belief into an action: all in which agents differ while they act."""

    def memory(self, world: WorldModel, batch_size: int) -> State:
        """Its own recurrent state at an episode's start: tensors [B, ...], none by default."""
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
        """(canonical actions [B, A], memory after them) for the states [B]; `rows`: raw observations, None in a dream."""
        raise NotImplementedError

    def estimate(self, feature: Tensor) -> Tensor | None:
        """Expected discounted return [N] from features [N, F]; None where nothing estimates it."""
        return None


Action = TypeVar("Action", Tensor, np.ndarray)


def legal_actions(world: WorldModel, state: State | None, rows: Mapping[str, np.ndarray] | None) -> Tensor | None:
    """Which actions are legal [B, A], as `WorldModel.legal` tells of raw observations, or else of states; None without masks."""
    is_seen = rows is not None and ACTION_MASK in rows
    if not (is_seen or world.is_masked):
        return None
    return world.legal(None if is_seen else world.dynamics.feature(state), rows)


def keep_legal(
    world: WorldModel,
    action: Action,
    state: State | None,
    random: np.random.Generator | torch.Generator,
    rows: Mapping[str, np.ndarray] | None = None,
) -> Action:
    """The canonical actions [B, A], illegal ones drawn anew among the legal ones: as raw observations say, or else as the model
    expects at its states. Nothing is changed or drawn where there are no masks."""
    if (legal := legal_actions(world, state, rows)) is None:
        return action
    redrawn = world.action.redraw_illegal(action, legal, random)
    return redrawn.cpu().numpy() if isinstance(action, np.ndarray) else redrawn


class BeliefPolicy(BasePolicy):
    """An SB3 policy whose recurrent state is the world model's belief and the last action."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, world: WorldModel, controller: Controller, seed: int):
        super().__init__(observation_space, action_space)
        self.world, self.controller = world, controller
        self.generator = torch.Generator(device=world.device).manual_seed(seed)

    def initial_belief(self, batch_size: int) -> State:
        """The belief before the first observation."""
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
        """(canonical actions [B, A], belief after them) from raw observation rows [B, ...]; no action that these call illegal."""
        self.world.eval()
        first = torch.as_tensor(is_first, dtype=torch.bool, device=self.world.device)
        sampling = Sampling(generator=self.generator, mode=deterministic)
        own = State({name: belief[name] for name in self.world.initial(0)})  # without the controller's memory
        state = self.world.observe(own, tensors(rows, self.world.device), belief["prev_action"], first, sampling)
        start = self.controller.memory(self.world, len(is_first))
        memory = State({k: torch.where(first.view(-1, *[1] * (x.ndim - 1)), x, belief[k]) for k, x in start.items()})
        action, memory = self.controller.act(self.world, state, memory, deterministic, self.generator, rows)
        action = keep_legal(self.world, self.world.action.project(action), state, self.generator, rows)
        return action.cpu().numpy(), State({**state, **memory, "prev_action": action})

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's recurrent predict: (actions, belief as a tuple of arrays).

        observation    with or without a batch axis; lists and other number types are cast where the space can represent them
        state          the belief that the last call returned; None: an episode's first step
        episode_start  where the belief begins anew
        deterministic  the posterior's mode and the policy's mode
        action_masks   which actions are legal [A] or [N, A], as sb3-contrib gives it; in the place of the observation's own mask

        EnvError for an observation that training would refuse: not finite, of another shape, of no category; for a mask that is
        none, and where there is none of a model that learned with masks.
        """
        if self.world.is_masked:
            observation = self._with_mask(observation, action_masks)
        observation, vectorized = self.batched(observation)
        rows = self.world.obs.to_raw(observation)
        self.world.obs.check(rows, "predict")  # a number that is not finite would stay in the belief
        size = len(next(iter(rows.values())))
        if action_masks is not None:
            rows = {**rows, ACTION_MASK: self._checked_masks(action_masks, size)}
        belief = self.initial_belief(size)
        first = np.ones(size, bool)
        if state is not None:
            belief = belief.like(state)
            first = np.zeros(size, bool) if episode_start is None else np.array(episode_start, bool).reshape(size)
        action, belief = self.filter_and_act(belief, rows, first, deterministic)
        env_action = self.world.action.decode(action)
        return (env_action if vectorized else env_action.squeeze(0)), belief.numpy()

    def _with_mask(self, observation: Any, masks: np.ndarray | None) -> Any:
        """The observation with these masks under their key. EnvError where there are none and it has none of its own."""
        named = isinstance(observation, Mapping | tuple)
        obs = dict(flatten(observation, self.world.obs.keys)) if named else {"obs": observation}
        if masks is not None:
            obs[ACTION_MASK] = np.asarray(masks)
        if ACTION_MASK not in obs:
            raise EnvError(
                "predict: nothing says which actions are legal, and the model learned with masks. Give action_masks=..., or "
                f"observations that hold '{ACTION_MASK}', as those of model.get_env() do."
            )
        return obs

    def _checked_masks(self, masks: np.ndarray, size: int) -> np.ndarray:
        """bool [N, A]; EnvError for what is no mask."""
        if self.world.action.kind != "categorical":
            raise EnvError(f"predict: action_masks are for Discrete and MultiDiscrete actions, not {self.world.action.space}.")
        rows = np.asarray(masks).reshape(size, -1)
        return np.stack([checked_mask(row, self.world.action.sizes, f"predict, row {i}") for i, row in enumerate(rows)])

    def batched(self, observation: Any) -> tuple[Any, bool]:
        """The observation, flat, with a batch axis, and whether it had one. EnvError for what `reset` returns as a whole."""
        keys, given = self.world.obs.keys, observation
        if isinstance(given, Mapping | tuple) and not self.world.obs.single:
            observation = flatten(given, keys)
        is_reset_result = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)
        if is_reset_result and (observation is given or observation.keys() != keys.keys()):
            raise EnvError("predict got (observation, info), which is what reset() returns. Give it the observation: reset()[0].")
        first, key = next(iter(keys.items()))
        named = observation if isinstance(observation, Mapping) else {first: observation}
        if named.keys() != keys.keys():
            return observation, True  # to_raw says which keys are wrong
        named = {name: _as_declared(x, keys[name]) for name, x in named.items()}
        vectorized = named[first].ndim > len(key.raw_shape)
        if not vectorized:
            named = {name: x[None] for name, x in named.items()}
        return (named if isinstance(observation, Mapping) else named[first]), vectorized

    def save(self, path: Any) -> None:
        """Refused: a policy alone is no agent, and SB3's file of one is a pickle."""
        raise ConfigError(f"A belief policy has no file of its own ('{path}'). Save its agent: model.save(path).")

    @classmethod
    def load(cls, path: Any, device: torch.device | str = "auto") -> BeliefPolicy:
        """Refused, as `save` is."""
        raise ConfigError(f"A belief policy has no file of its own ('{path}'). Load its agent: Dreamer.load(path).policy.")

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        raise NotImplementedError("It acts on a belief: call predict().")


@runtime_checkable
class ActsOnBelief(Protocol):
    """What measurements need of an agent: an algorithm with a world model, or a policy that was trained in one."""

    policy: BeliefPolicy
    obs_spec: ObsSpec
    action_spec: ActionSpec
    device: torch.device


def _as_declared(x: Any, key: KeySpec) -> np.ndarray:
    """Numbers in the dtype that the space declares, where nothing but digits is lost; unchanged where more would be."""
    x = np.asarray(x)
    declared = cast(x, key.raw_dtype) if x.dtype.kind in "biuf" else None
    return x if declared is None else declared
