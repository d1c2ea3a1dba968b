"""What all forms learn from and are measured on: the experience of a model-free agent, and held-out episodes of it.

The agent is SB3's (DQN, SAC or PPO, by the actions). It learns in the real environment with as many updates as the forms make, or
with as many as its authors published where that is more, and is a row of the comparison itself. So every form sees what an agent
really meets on its way, and none chooses what it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack

from worldmodel.agents.decisions import stacked
from worldmodel.agents.evaluation import DEFAULT_MAX_STEPS
from worldmodel.agents.sb3.algorithms import DREAM_DEFAULTS, algorithm_class
from worldmodel.envs.make import EnvConfig, find_spec, make_env
from worldmodel.storage.recording import Recording

FRAMES = 2
"""Pictures that the agent sees at once: one does not show what moves."""
PUBLISHED = {"sac": Fraction(1), "dqn": Fraction(1, 4)}
"""Updates per real step. Sources: Haarnoja et al. 2018, appendix D; Mnih et al. 2015, table 1."""
LONGEST = 300
"""Steps of a held-out episode at most."""


class Recorder(gym.Wrapper):
    """Keeps every episode that is played, in the form that `Recording.from_episodes` takes."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._episodes: list[dict[str, list]] = []

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**kwargs)
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        self._episodes.append({name: [] for name in names})
        self._episodes[-1]["observations"].append(_copied(obs))
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        for name, value in zip(self._episodes[-1], (obs, action, reward, terminated, truncated), strict=True):
            self._episodes[-1][name].append(_copied(value))
        return obs, reward, terminated, truncated, info

    def episodes(self) -> list[dict[str, Any]]:
        """All with at least one step; the last one may be cut."""
        whole = [episode for episode in self._episodes if episode["actions"]]
        return [{name: stacked(values) for name, values in episode.items()} for episode in whole]


def _copied(value: Any) -> Any:
    return {name: np.array(x) for name, x in value.items()} if isinstance(value, dict) else np.array(value)


def model_free(env: EnvConfig, steps: int, updates: int, seed: int, prefill: int) -> tuple[BaseAlgorithm, Recording]:
    """SB3's algorithm after `steps` real steps and about `updates` updates, or as many as PUBLISHED says, and all that it met.

    prefill   steps of random actions before it learns

    Raises EnvError, MissingExtraError, UnsupportedSpaceError.
    """
    recorder = Recorder(make_env(env, 0, seed))
    venv = _vectorised(recorder)
    space = venv.observation_space
    name = {spaces.Discrete: "dqn", spaces.Box: "sac"}.get(type(recorder.action_space), "ppo")
    kind = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if _pictures(space) else "MlpPolicy"
    model = algorithm_class(name)(kind, venv, seed=seed, device="cpu", **_options(name, steps, updates, prefill))
    model.learn(steps)
    recording = recorded(env, recorder.episodes())
    venv.close()
    return model, recording


def _options(name: str, steps: int, updates: int, prefill: int) -> dict[str, Any]:
    """SB3's arguments for so few steps, with the updates per step that make `updates` of them, or with those of PUBLISHED."""
    if name == "ppo":
        return {"n_steps": min(256, max(16, steps // 8))}
    rate = max(PUBLISHED[name], Fraction(updates / max(1, steps - prefill)).limit_denominator(8))
    often = {"learning_starts": prefill, "train_freq": rate.denominator, "gradient_steps": rate.numerator}
    explores = {"exploration_fraction": 0.5, "exploration_final_eps": 0.1} if name == "dqn" else {}
    return {**DREAM_DEFAULTS[name.upper()], **often, **explores, "buffer_size": steps}


def _pictures(space: gym.Space) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def _vectorised(env: gym.Env) -> VecEnv:
    """As SB3 sees it: pictures stacked."""
    venv = DummyVecEnv([lambda: env])
    return VecFrameStack(venv, FRAMES) if _pictures(env.observation_space) else venv


def recorded(env: EnvConfig, episodes: list[dict[str, Any]]) -> Recording:
    """Episodes of an environment as a recording."""
    one = make_env(env)
    one.close()
    known = {"layout": env.layout, "env_id": env.id, "env_options": env.options}
    return Recording.from_episodes(one.observation_space, one.action_space, episodes, origin=env.id, **known)


def played(
    model: BaseAlgorithm | None, env: EnvConfig, episodes: int, seed: int, *, random: float = 0.0, longest: int | None = None
) -> list[dict[str, Any]]:
    """Episodes with the environment's seeds from `seed` on, of SB3's greedy policy or (None) of random play.

    random   share of the steps in which the action is random
    longest  steps of an episode at most; None: the environment's limit, or DEFAULT_MAX_STEPS where it has none
    """
    limit = find_spec(env.id).max_episode_steps if env.max_episode_steps is None else env.max_episode_steps
    known = [x for x in (limit, longest) if x is not None]
    config = env.model_copy(update={"max_episode_steps": min(known, default=DEFAULT_MAX_STEPS)})
    rng, found = np.random.default_rng(seed), []
    for number in range(episodes):
        recorder = Recorder(make_env(config, number, seed))
        act = _acting(model, recorder, random, rng)
        venv = _vectorised(recorder)
        obs, done = venv.reset(), False
        while not done:
            obs, _, dones, _ = venv.step(act(obs))
            done = bool(dones[0])
        found.append(recorder.episodes()[0])
        venv.close()
    return found


def _acting(model: BaseAlgorithm | None, env: gym.Env, random: float, rng: np.random.Generator) -> Callable[[Any], np.ndarray]:
    def act(obs: Any) -> np.ndarray:
        if model is None or rng.random() < random:
            return np.array([env.action_space.sample()])
        return model.predict(obs, deterministic=True)[0]

    return act
