"""A checker for SB3 VecEnvs. SB3's own and Gymnasium's check single environments only."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.envs.vectors.batches import describe, take
from worldmodel.errors import ConfigError, EnvError

PLAIN = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""The spaces that SB3's policies take."""


def check_vec_env(venv: VecEnv, steps: int = 200, seed: int = 0) -> None:
    """Plays `steps` random steps three times and raises EnvError at the first violation of what SB3's algorithms rely on.

    - spaces are of the kinds that SB3 takes; observations, `terminal_observation` included, are elements of theirs, in its dtype
    - `step` gives (obs, rewards, dones, infos): float and bool arrays [N], N distinct dicts
    - an ended environment is reset in the same step, and its info holds `terminal_observation`; `TimeLimit.truncated` is a
      bool, and true at ends only
    - the same seed gives the same episodes
    - returned arrays are not written to again, and writing into them has no effect
    - `has_attr`, `get_attr`, `env_method` and `env_is_wrapped` answer for each environment

    The environments stay where the play ended. Warns if no episode ended. Of SB3's wrappers two fail by design: VecNormalize,
    whose statistics change between plays, and VecFrameStack, which returns its buffer.
    """
    if not isinstance(venv, VecEnv):
        raise ConfigError(f"check_vec_env expects a Stable-Baselines3 VecEnv; got {type(venv).__name__}.")
    check = _Check(venv)
    check.spaces()
    check.attributes()
    venv.action_space.seed(seed)
    actions = [np.stack([venv.action_space.sample() for _ in range(venv.num_envs)]) for _ in range(steps)]
    first = check.play(actions, seed, checked=True)
    check.ends(first)
    check.same(first, check.play(actions, seed), "two plays of the same seed and actions differ", "Seed everything in reset")
    corrupted = check.play(actions, seed, corrupt=True)
    check.same(first, corrupted, "what the caller writes into returned arrays changes later ones", "Return copies")


class _Check:
    def __init__(self, venv: VecEnv):
        self.venv, self.count = venv, venv.num_envs

    def fail(self, found: str, expected: str, remedy: str = "Correct the VecEnv") -> NoReturn:
        raise EnvError(f"{type(self.venv).__name__}: {found}; expected {expected}. {remedy}.")

    def spaces(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            self.fail(f"num_envs is {self.count!r}", "a whole number of at least 1")
        observation, action = self.venv.observation_space, self.venv.action_space
        parts = observation.spaces.values() if isinstance(observation, spaces.Dict) else [observation]
        for part in parts:
            if not isinstance(part, PLAIN):
                self.fail(
                    f"the observation space is {observation}", "Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of them"
                )
        if not isinstance(action, PLAIN):
            self.fail(f"the action space is {action}", "Box, Discrete, MultiDiscrete or MultiBinary")
        if isinstance(action, spaces.Box) and not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
            self.fail(f"the action space is {action}", "finite bounds", "Rescale the actions")
        if isinstance(action, spaces.Discrete) and action.start != 0:
            self.fail(f"the action space is {action}", "actions that start at 0", "Wrap it in worldmodel.envs.PlainVecEnv")

    def attributes(self) -> None:
        venv = self.venv
        if venv.has_attr("an_attribute_that_no_environment_has"):
            self.fail("has_attr says yes to an attribute that is not there", "False")
        questions = {
            "get_attr": lambda indices: venv.get_attr("render_mode", indices),
            "env_is_wrapped": lambda indices: venv.env_is_wrapped(gym.Wrapper, indices),
            "env_method": lambda indices: venv.env_method("__str__", indices=indices),
        }
        for name, ask in questions.items():
            for indices, count in ((None, self.count), (0, 1), ([self.count - 1], 1)):
                try:
                    answer = ask(indices)
                except NotImplementedError:  # native vector environments may have no single ones
                    continue
                if not isinstance(answer, list) or len(answer) != count:
                    self.fail(f"{name} with indices={indices} gave {describe(answer)}", f"a list of {count}")

    # Play -----------------------------------------------------------------------------------------------------------

    def play(self, actions: list[np.ndarray], seed: int, *, checked: bool = False, corrupt: bool = False) -> list[dict[str, Any]]:
        """Copies of all returned: obs of the reset, then obs, rewards, dones and terminal observations of each step."""
        venv = self.venv
        venv.seed(seed)
        obs = venv.reset()
        if checked:
            self.observations(obs, "reset")
            if not isinstance(venv.reset_infos, list | tuple) or len(venv.reset_infos) != self.count:
                self.fail(f"reset_infos is {describe(venv.reset_infos)}", f"a list of {self.count} dicts")
        transcript = [{"obs": copy.deepcopy(obs)}]
        returned: dict[str, Any] = {"obs": obs}
        for action in actions:
            if corrupt:
                _corrupt(returned)
            result = venv.step(action)
            if checked:
                self.step(result)
                self.fresh(returned, transcript[-1], result)
            obs, rewards, dones, infos = result
            ends = [infos[i]["terminal_observation"] for i in np.flatnonzero(dones)]
            returned = {"obs": obs, "rewards": rewards, "dones": dones, "ends": ends}
            transcript.append(copy.deepcopy(returned))
        return transcript

    def observations(self, obs: Any, where: str) -> None:
        if isinstance(obs, tuple):
            self.fail(f"{where} gave a tuple of {len(obs)}", "observations alone; the infos go into reset_infos")
        space = self.venv.observation_space
        if isinstance(space, spaces.Dict) and (not isinstance(obs, dict) or obs.keys() != space.spaces.keys()):
            self.fail(f"{where} gave {describe(obs)}", f"a dict with the keys {list(space.spaces)}")
        for name, part, x in _parts(space, obs):
            what = f"{where}: observation{f' {name!r}' if name else ''}"
            if not isinstance(x, np.ndarray) or x.shape != (self.count, *part.shape) or x.dtype != part.dtype:
                self.fail(f"{what} is {describe(x)}", f"an array of shape {(self.count, *part.shape)}, dtype {part.dtype}")
            for i in range(self.count):
                if not part.contains(x[i]):
                    self.fail(f"{what} of environment {i} is outside the space", f"an element of {part}")

    def step(self, result: Any) -> None:
        if not isinstance(result, tuple) or len(result) != 4:
            self.fail(f"step gave {describe(result)}", "(obs, rewards, dones, infos)", "Join terminated and truncated in dones")
        obs, rewards, dones, infos = result
        self.observations(obs, "step")
        for name, x, kind, words in (("rewards", rewards, "f", "floats"), ("dones", dones, "b", "bools")):
            if not isinstance(x, np.ndarray) or x.shape != (self.count,) or x.dtype.kind != kind:
                self.fail(f"{name} is {describe(x)}", f"an array of {self.count} {words}")
        if not np.isfinite(rewards).all():
            self.fail(f"rewards are {rewards}", "finite numbers")
        if not rewards.flags.writeable:
            self.fail("rewards are read-only", "an array that SB3 can add bootstrapped values to", "Return a copy")
        if not isinstance(infos, list | tuple) or len(infos) != self.count or not all(isinstance(x, dict) for x in infos):
            self.fail(f"infos is {describe(infos)}", f"a list of {self.count} dicts")
        if len({id(info) for info in infos}) != self.count:
            self.fail("infos holds one dict twice", "a dict for each environment: VecMonitor writes into them")
        for i, info in enumerate(infos):
            truncated = info.get("TimeLimit.truncated", False)
            if not isinstance(truncated, bool | np.bool_):
                self.fail(f"TimeLimit.truncated of environment {i} is {truncated!r}", "a bool")
            if truncated and not dones[i]:
                self.fail(f"TimeLimit.truncated of environment {i} is true, but it is not done", "it to be true at ends only")
            if dones[i]:
                self.last(i, info)

    def last(self, i: int, info: dict[str, Any]) -> None:
        """The terminal observation of an environment that ended."""
        if "terminal_observation" not in info:
            self.fail(
                f"environment {i} ended without terminal_observation in its info",
                "the last observation of the episode, from which algorithms bootstrap after a truncation",
            )
        space, last = self.venv.observation_space, info["terminal_observation"]
        named = isinstance(space, spaces.Dict)
        if named != isinstance(last, dict) or (named and last.keys() != space.spaces.keys()):
            self.fail(f"terminal_observation is {describe(last)}", f"an element of {space}")
        for _, part, x in _parts(space, last):
            if getattr(x, "dtype", part.dtype) != part.dtype or not part.contains(x):
                self.fail(f"terminal_observation is {describe(x)}", f"an element of {part}, without a batch axis")

    def fresh(self, returned: dict[str, Any], copied: dict[str, Any], result: tuple[Any, ...]) -> None:
        """Checks that a step leaves the arrays of the one before unchanged, and returns other ones."""
        if not _same(returned, copied):
            self.fail("arrays of one step were written to in the next", "fresh arrays every time", "Return copies")
        obs, rewards, dones, infos = result
        ends = [info["terminal_observation"] for info, done in zip(infos, dones) if done]
        for new in _arrays([obs, rewards, dones]):
            if any(np.shares_memory(new, old) for old in [*_arrays(returned), *_arrays(ends)]):
                self.fail("arrays that were returned share memory", "fresh arrays every time", "Return copies")

    # Transcripts ------------------------------------------------------------------------------------------------------

    def ends(self, transcript: list[dict[str, Any]]) -> None:
        """Checks that ended environments are reset in the same step: its observation differs from the terminal one."""
        pairs = [
            (last, take(step["obs"], i)) for step in transcript[1:] for last, i in zip(step["ends"], np.flatnonzero(step["dones"]))
        ]
        if not pairs:
            warnings.warn(
                f"check_vec_env: no episode ended in {len(transcript) - 1} steps, so ends were not checked. Raise `steps`.",
                stacklevel=3,
            )
            return
        varied = any(not _same(transcript[0]["obs"], step["obs"]) for step in transcript[1:])
        if varied and all(_same(last, first) for last, first in pairs):
            self.fail(
                "the observation after an end is the terminal one",
                "the first of a new episode: SB3 knows no reset in between",
                "Reset ended environments within step, and return what the reset gave",
            )

    def same(self, one: list[dict[str, Any]], other: list[dict[str, Any]], found: str, remedy: str) -> None:
        for t, (a, b) in enumerate(zip(one, other, strict=True)):
            for name in a:
                if not _same(a[name], b[name]):
                    self.fail(f"{found} ({name} of step {t})", "the same", remedy)


def _parts(space: spaces.Space, obs: Any) -> list[tuple[str, spaces.Space, Any]]:
    """(key, space, value) of a Dict's parts; "" is the key of any other space."""
    if isinstance(space, spaces.Dict):
        return [(name, part, obs[name]) for name, part in space.spaces.items()]
    return [("", space, obs)]


def _arrays(value: Any) -> list[np.ndarray]:
    """All arrays in nested dicts and lists, in order."""
    if isinstance(value, dict):
        return [x for item in value.values() for x in _arrays(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _arrays(item)]
    return [value] if isinstance(value, np.ndarray) else [np.asarray(value)]


def _same(one: Any, other: Any) -> bool:
    ours, theirs = _arrays(one), _arrays(other)
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def _corrupt(returned: dict[str, Any]) -> None:
    """Writes other numbers into every array that can be written to."""
    for x in _arrays(returned):
        if x.flags.writeable:
            x[...] = ~x if x.dtype.kind in "biu" else x + 1
