"""How well an agent does: greedy episodes with fixed seeds, the same protocol for every algorithm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from pydantic import Field
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.agents.arguments import with_spec_layout
from worldmodel.config import Frozen
from worldmodel.envs.make import EnvConfig, find_spec, make_vec
from worldmodel.envs.vectors.plain import as_trained
from worldmodel.envs.vectors.restarts import restarted
from worldmodel.errors import ConfigError, EnvError
from worldmodel.registry import register
from worldmodel.spaces import ActionSpec
from worldmodel.storage.weights import cpu_randomness

EVALUATION_SEED, CONFIRMATION_SEED, FINAL_SEED = 10_000, 20_000, 30_000
"""Environment seeds of the first episode of an evaluation, of its confirmation, and of the final return."""
DEFAULT_MAX_STEPS = 1000
"""Steps after which an episode is cut where neither eval.max_steps nor the environment limits it."""


@register("group", "eval")
class EvalConfig(Frozen):
    """Evaluation while training, in environments of its own."""

    every: int = Field(250, ge=0, description="real steps between evaluations; 0: only at the end")
    episodes: int = Field(20, ge=1, description="episodes of one evaluation")
    threshold: float | None = Field(None, description="mean return that counts as solved; none: the environment's reward_threshold")
    max_steps: int | None = Field(
        None, ge=1, description="steps after which an episode is cut; none: the environment's limit, or 1000 where it has none"
    )
    stop_when_solved: bool = Field(False, description="ends the run at the first confirmed evaluation that reaches the threshold")


class EvaluationAborted(Exception):
    """An evaluation was given up because the process is asked to end."""


def threshold(config: EvalConfig, env_id: str) -> float | None:
    """The mean return that counts as solved, or None."""
    return config.threshold if config.threshold is not None else find_spec(env_id).reward_threshold


def evaluate(
    model: Any,
    env: EnvConfig | str,
    episodes: int = 20,
    seed: int = EVALUATION_SEED,
    *,
    max_steps: int | None = None,
    should_abort: Callable[[], bool] = lambda: False,
    frames: list[np.ndarray] | None = None,
    played: list[tuple[Any, float]] | None = None,
) -> tuple[list[float], list[int]]:
    """(returns, lengths) of greedy episodes, one for each environment seed from `seed` on.

    model         anything with SB3's `predict(obs, state, episode_start, deterministic)`, SB3's own algorithms included
    max_steps     cuts longer episodes; None: DEFAULT_MAX_STEPS where the environment has no limit of its own
    should_abort  asked at every step; raises EvaluationAborted as soon as it says yes
    frames        receives the rendered pictures of the first episode, which needs an environment that renders
    played        receives its observations, each a batch of one, and the return up to there

    The episodes are stepped as one batch. No random state of the model or of the process is left changed, so training
    goes on as if nothing had happened. Raises EnvError, MissingExtraError.
    """
    config = EnvConfig(id=env) if isinstance(env, str) else env
    if episodes < 1 or seed < 0:
        raise ConfigError(f"An evaluation needs at least 1 episode and a seed of at least 0, not {episodes} and {seed}.")
    if frames is not None:
        config = config.model_copy(update={"kwargs": {**config.kwargs, "render_mode": "rgb_array"}})
    with fresh_envs(model, config, episodes, seed) as venv:
        return _first_episodes(model, venv, episode_limit(venv, max_steps), should_abort, frames, played)


def warn_untrained(agent: Any, log: Callable[[str], object]) -> None:
    """Says so where no update has been made, and no weights were taken: what such an agent does or dreams means nothing."""
    if agent.learner.updates == 0 and agent.config.train.warm_start is None:
        log(f"step {agent.num_timesteps}: untrained. No update of the world model has been made yet: what comes is noise.")


@contextmanager
def fresh_envs(model: Any, config: EnvConfig, count: int, seed: int) -> Iterator[VecEnv]:
    """Environments with the seeds from `seed` on, in the form that the model was trained with; draws in here are isolated."""
    with isolated_rng(model, seed):
        changes: dict[str, Any] = {"vectorize": "dummy"}  # processes would cost more than they save
        if hasattr(model, "obs_spec"):
            changes["action_masks"] = model.action_spec.is_masked_by(model.obs_spec)
        venv = as_trained(model, make_vec(config.model_copy(update=changes), count, seed))
        try:
            require_spaces(model, venv, config.id)
            yield venv
        finally:
            venv.close()


def play(
    venv: VecEnv, obs: Any, act: Callable[[Any, np.ndarray], np.ndarray], should_abort: Callable[[], bool]
) -> Iterator[tuple[np.ndarray, Any, np.ndarray, np.ndarray, Sequence[dict]]]:
    """(actions, next obs, rewards, dones, infos) of each step from a reset's `obs` on, without end.

    act  (obs, where an episode starts [N]) -> actions of the environments
    """
    starts = np.ones(venv.num_envs, bool)
    while True:
        if should_abort():
            raise EvaluationAborted
        actions = act(obs, starts)
        obs, rewards, starts, infos = venv.step(actions)
        yield actions, obs, rewards, starts, infos


def require_spaces(model: Any, venv: VecEnv, env_id: str) -> None:
    """ConfigError where a model of ours is for other spaces than the environment's, as one made of recorded data may be."""
    if not hasattr(model, "obs_spec"):
        return
    space = with_spec_layout(model.obs_spec, venv.observation_space)
    named = space.spaces if isinstance(space, spaces.Dict) else {"obs": space}
    actions = ActionSpec.from_space(venv.action_space).to_json()
    shown = {name: (sub.shape, np.dtype(sub.dtype)) for name, sub in named.items()}
    for word, ours, theirs, same in (
        ("observes", model.obs_spec.space, space, model.obs_spec.store == shown),
        ("acts in", model.action_spec.space, venv.action_space, model.action_spec.to_json() == actions),
    ):
        if not same:
            raise ConfigError(
                f"The model {word} {ours}, but '{env_id}' has {theirs}. Expected the spaces that it was trained with: it may be of "
                "recorded data from another environment, or through other wrappers (env.wrappers, env.pixels, env.kwargs)."
            )


def episode_limit(venv: VecEnv, max_steps: int | None) -> float:
    """Steps after which an episode in these environments is cut, infinite where they have a limit of their own."""
    if max_steps is not None:
        return max_steps
    return math.inf if all(venv.env_is_wrapped(TimeLimit)) else DEFAULT_MAX_STEPS


def _first_episodes(
    model: Any,
    venv: VecEnv,
    limit: float,
    should_abort: Callable[[], bool],
    frames: list[np.ndarray] | None,
    played: list[tuple[Any, float]] | None,
) -> tuple[list[float], list[int]]:
    state, running = None, np.ones(venv.num_envs, bool)
    returns, lengths = np.zeros(venv.num_envs), np.zeros(venv.num_envs, np.int64)  # a Monitor rounds, and tiny rewards to nothing

    def act(obs: Any, starts: np.ndarray) -> np.ndarray:
        nonlocal state
        if frames is not None and running[0]:
            frames.append(_picture(venv))
        if played is not None and running[0]:
            first = {name: x[:1].copy() for name, x in obs.items()} if isinstance(obs, dict) else obs[:1].copy()
            played.append((first, float(returns[0])))
        action, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        return action

    for _, _, rewards, dones, infos in play(venv, venv.reset(), act, should_abort):
        returns[running] += rewards[running]
        lengths[running] += 1
        running &= np.where(dones, restarted(infos), lengths < limit)  # an episode whose environment failed is played again
        if not running.any():
            break
        returns[running & dones] = lengths[running & dones] = 0
    return returns.tolist(), lengths.tolist()


def _picture(venv: VecEnv) -> np.ndarray:
    frame = venv.env_method("render", indices=0)[0]
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
        raise EnvError("The environment's render() gave no picture; expected uint8 [height, width, 3] from render_mode rgb_array.")
    return frame.copy()


@contextmanager
def isolated_rng(model: Any, seed: int) -> Iterator[None]:
    """Draws in here follow from `seed`: of the model's generator, and no state of the process is left changed."""
    own = getattr(getattr(model, "policy", model), "generator", None)
    own = own if isinstance(own, torch.Generator) else torch.Generator()
    before, python, legacy = own.get_state(), random.getstate(), np.random.get_state()
    with cpu_randomness():
        own.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            own.set_state(before)
