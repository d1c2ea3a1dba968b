"""Wrappers of Gymnasium environments: checked, flat, actions repeated, rendered pictures as observations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from types import MappingProxyType
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

from worldmodel.envs.extras import missing_extra
from worldmodel.envs.vectors.batches import describe
from worldmodel.envs.vectors.plain import PlainSpaces
from worldmodel.errors import ConfigError, EnvError, UnsupportedSpaceError, did_you_mean
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.casts import cast, join_path, numbers, warn_once, warning_due
from worldmodel.spaces.keys import FLOAT32_MAX, discrete

_log = logging.getLogger(__name__)

Categories = Sequence[int] | Mapping[str, Sequence[int]]
SHOWN = 16
"""Numbers of an observation that an error prints whole."""
PathAndSpace = tuple[tuple[Any, ...], spaces.Space]
"""(path of keys and numbers, space) of one array of a nested space."""


class CheckedEnv(gym.Wrapper):
    """Passes on copies of elements of the spaces; anything else is an EnvError with the environment, episode and step.

    index               the number of the environment among its siblings, used in messages
    seed                for the first reset without a seed of its own
    ignore, categories  as in Flattener: keys that pass as they are, and integers that are compared with their categories

    Observations are compared with the space at the time of wrapping: keys, shape, dtype, finite numbers, categories. Rewards are
    finite numbers, flags are booleans, `info` is a dict. Numbers of another dtype, 0 and 1 for flags, and lists for arrays are
    converted where the declared form can hold them, with one warning for each key. Exceptions of the environment, `SystemExit`
    included, become EnvErrors; only KeyboardInterrupt and a missing optional package pass. `options` are passed on only where
    given: an environment need not take them.
    """

    def __init__(
        self,
        env: gym.Env,
        index: int = 0,
        seed: int | None = None,
        *,
        ignore: Sequence[str] = (),
        categories: Categories = MappingProxyType({}),
    ):
        super().__init__(env)
        self.index, self.episode, self.steps = index, 0, 0
        self._seed = seed
        self._space = env.observation_space
        self.ignored = frozenset(ignore)
        self.categorical = categorical_keys(env.observation_space, categories) if categories else {}

    def place(self) -> str:
        """`environment 3, episode 12, step 40`: episodes count from 1, step 0 is the reset."""
        return f"environment {self.index}, episode {self.episode}, step {self.steps}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        seed, self._seed = (self._seed if seed is None else seed), None
        given = {"seed": seed} if options is None else {"seed": seed, "options": options}
        result = self._call("reset", lambda: self.env.reset(**given))
        if not isinstance(result, tuple) or len(result) != 2:
            self._fail(f"reset returned {describe(result)}", "(observation, info)", "Return both, as Gymnasium does since 0.26")
        obs, info = result
        return self._observation(obs), self._info(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if isinstance(self.action_space, spaces.Box):
            action = np.asarray(action)  # a VecEnv gives a number where the space has no dimensions
        result = self._call("step", lambda: self.env.step(action))
        if not isinstance(result, tuple) or len(result) != 5:
            self._fail(
                f"step returned {describe(result)}",
                "(observation, reward, terminated, truncated, info)",
                "Split `done` into terminated and truncated, as Gymnasium does since 0.26",
            )
        obs, reward, terminated, truncated, info = result
        terminated, truncated = self._flag("terminated", terminated), self._flag("truncated", truncated)
        return self._observation(obs), self._reward(reward), terminated, truncated, self._info(info)

    def render(self) -> Any:
        return self._call("render", self.env.render)

    def close(self) -> None:
        """Logs errors as warnings: raised, they would hide the error that the environment is closed for."""
        try:
            self._call("close", self.env.close)
        except EnvError as error:
            _log.warning("%s", error)

    def _call(self, name: str, function: Any) -> Any:
        try:
            return function()
        except EnvError:
            raise
        except (Exception, SystemExit) as error:
            missing = missing_extra(error)
            if missing is not None:
                raise missing from error
            what = (
                f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {type(error).__name__}: {error}"
            )
            raise EnvError(
                f"{self.place()}: {name} {what}. Expected it to return. Correct the environment or its kwargs."
            ) from error

    def _observation(self, value: Any) -> Any:
        return _checked(self._space, value, (), self)

    def _reward(self, reward: Any) -> float:
        number = numbers(reward)
        if number is None or number.size != 1:
            self._fail(f"the reward is {describe(reward)}", "one number", "Return float(reward)")
        if number.shape or number.dtype.kind == "b":
            self._warn_once("the reward", describe(reward), "one number", "Return float(reward)")
        if not abs(value := float(number.item())) <= FLOAT32_MAX:
            self._fail(f"the reward is {value}", "a finite 32-bit float", "Find where the environment computes it, or clip it")
        return value

    def _flag(self, name: str, flag: Any) -> bool:
        if not isinstance(flag, (bool, np.bool_)):
            number = numbers(flag)
            if number is None or number.size != 1 or number.item() not in (0, 1):
                self._fail(f"'{name}' is {describe(flag)}", "a bool", f"Return bool({name})")
            self._warn_once(f"'{name}'", describe(flag), "a bool", f"Return bool({name})")
        return bool(flag)

    def _warn_once(self, what: str, given: str, declared: str, remedy: str) -> None:
        if self.index == 0:  # its siblings would warn of the same, perhaps in other processes
            warn_once(what, given, declared, remedy)

    def _info(self, info: Any) -> dict[str, Any]:
        if not isinstance(info, dict):
            self._fail(f"info is {describe(info)}", "a dict", "Return {} where there is nothing to say")
        return dict(info)

    def _fail(self, found: str, expected: str, remedy: str) -> NoReturn:
        raise EnvError(f"{self.place()}: {found}; expected {expected}. {remedy}.")


def _checked(space: spaces.Space, value: Any, path: tuple[Any, ...], env: CheckedEnv) -> Any:
    """A copy of `value` as an element of `space`; EnvError with the key path where it is none."""
    key = join_path(path)
    if key in env.ignored:
        return value
    space, name = env.categorical.get(key, space), f"observation '{key or 'obs'}'"
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping):
            env._fail(f"{name} is {describe(value)}", f"a dict with the keys {list(space.spaces)}", "Return one value a key")
        if value.keys() != space.spaces.keys():
            missing, extra = [k for k in space.spaces if k not in value], [k for k in value if k not in space.spaces]
            env._fail(
                f"{name} has missing keys {missing} and extra keys {extra}", f"{list(space.spaces)}", "Return what the space says"
            )
        return {key: _checked(sub, value[key], (*path, key), env) for key, sub in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space.spaces):
            env._fail(f"{name} is {describe(value)}", f"a tuple of {len(space.spaces)}", "Return one value an item")
        return tuple(_checked(sub, item, (*path, i), env) for i, (sub, item) in enumerate(zip(space.spaces, value)))
    if isinstance(space, spaces.Discrete):
        return _checked_category(space, value, name, env)
    if isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)):
        return _checked_array(space, value, name, env)
    if not space.contains(value):
        env._fail(f"{name} is {describe(value)}", f"an element of {space}", "Return what the space says")
    return copy.deepcopy(value)


def _checked_category(space: spaces.Discrete, value: Any, name: str, env: CheckedEnv) -> np.integer:
    given = numbers(value)
    array = None if given is None or given.size != 1 else cast(given.reshape(()), np.dtype(np.int64))
    if array is None:
        env._fail(f"{name} is {describe(value)}", f"one integer of {space}", "Return int(observation)")
    if given.shape or given.dtype.kind not in "iu":
        env._warn_once(name, describe(given), "one integer", "Return int(observation)")
    if not space.start <= array < space.start + space.n:
        env._fail(f"{name} is {int(array)}", f"a category of {space}", "Correct the environment or its observation_space")
    return np.dtype(space.dtype).type(array)


def _checked_array(space: spaces.Space, value: Any, name: str, env: CheckedEnv) -> np.ndarray:
    dtype, shape = np.dtype(space.dtype), tuple(space.shape)
    given = numbers(value)
    if given is None or given.shape != shape:
        env._fail(f"{name} is {describe(value)}", f"an array of shape {shape}", "Correct the environment or its observation_space")
    if isinstance(space, spaces.Box):
        remedy = f"Return it as {dtype}, or declare what comes with gymnasium.wrappers.DtypeObservation"
        value = cast(given, dtype)
        if value is None:
            found = f"{name} has dtype {given.dtype} and holds numbers that {dtype} cannot represent"
            env._fail(found, f"{dtype}", "Rescale the observation" if dtype.kind == "f" else remedy)
        if warning_due(given, dtype):
            env._warn_once(name, str(given.dtype), str(dtype), remedy)
        if dtype.kind == "f" and not np.isfinite(value).all():
            env._fail(f"{name} holds NaN or infinity", "finite numbers", "Find where the environment computes it")
        if dtype.kind == "f" and dtype.itemsize > 4 and (np.abs(value) > FLOAT32_MAX).any():
            env._fail(f"{name} holds {np.abs(value).max()}", "numbers that fit a 32-bit float", "Rescale the observation")
        return value
    value = cast(given, np.dtype(np.int64))
    if value is None:
        env._fail(f"{name} is {given.tolist()}", "integers", "Return it as integers")
    if given.dtype.kind == "f":
        env._warn_once(name, str(given.dtype), "integers", "Return it as integers")
    low = np.asarray(getattr(space, "start", 0))
    high = low + (space.nvec if isinstance(space, spaces.MultiDiscrete) else 2)
    wrong = (value < low) | (value >= high)
    if wrong.any():
        found, expected = f"{name} is {np.asarray(value).tolist()}", f"an element of {space}"
        if value.size > SHOWN:
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            ends = (int(np.broadcast_to(end, shape)[place]) for end in (low, high - 1))
            found, expected = f"{name} holds {value[place]} at {list(place)}", "{} to {} there".format(*ends)
        env._fail(found, expected, "Correct the environment or its observation_space, or env.categories")
    return np.array(value, dtype)


def leaf_arrays(space: spaces.Space, path: tuple[Any, ...] = ()) -> Iterator[PathAndSpace]:
    """The arrays of a nested space, in its order."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, sub in space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces):
            yield from leaf_arrays(sub, (*path, key))
    else:
        yield path, space


def categorical_keys(space: spaces.Space, categories: Categories) -> dict[str, spaces.Space]:
    """{flat key: space} of integers that are categories; the key of an observation that is no Dict is "".

    categories  {flat key: sizes}, or the sizes alone where the observation is no Dict: how many categories there are, along the
                last side of its Box, counted from its lower bound. Values keep their dtype where that holds the sizes

    Raises ConfigError for unknown keys, for what is no Box of integers, and for sizes that do not fit it.
    """
    leaves = {join_path(path): sub for path, sub in leaf_arrays(space)}
    if not isinstance(categories, Mapping):
        if "" not in leaves:
            raise ConfigError(
                f"env.categories is a list, and the observation has the keys {sorted(leaves)}. Expected {{key: [sizes]}}."
            )
        categories = {"": categories}
    categories = {"" if name == "obs" and "" in leaves else name: sizes for name, sizes in categories.items()}
    _require_known("env.categories", categories, leaves)
    return {name: _categorical(name, leaves[name], sizes) for name, sizes in categories.items()}


def _require_known(option: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{option}: the observation has no key '{name}'.{did_you_mean(name, known)}")


def _categorical(name: str, box: spaces.Space, sizes: Sequence[int]) -> spaces.Space:
    where = f"env.categories.{name}".rstrip(".")
    if not isinstance(box, spaces.Box) or np.dtype(box.dtype).kind not in "iu":
        raise ConfigError(f"{where}: {box} is no Box of integers. Leave it out, or give whole numbers in an integer dtype.")
    if len(sizes) not in {1, *box.shape[-1:]} or min(sizes) < 1:
        raise ConfigError(
            f"{where} is {list(sizes)}; expected at least 1 category for each of the {(1, *box.shape)[-1]} numbers along the last "
            f"side of {box}, or one number for all."
        )
    nvec = np.broadcast_to(np.asarray(sizes if box.shape else sizes[0], np.int64), box.shape)
    too_far = box.low.astype(object) + nvec - 1 > box.high.astype(object)
    if too_far.any():
        raise ConfigError(
            f"{where} is {list(sizes)}, counted from the lower bound {box.low.min()}: that exceeds the bounds of {box}. Expected "
            "as many as these hold, or fewer."
        )
    dtype = box.dtype if max(sizes) <= np.iinfo(box.dtype).max else np.int64
    if not box.shape:
        return discrete(sizes[0], int(box.low), dtype)
    return spaces.MultiDiscrete(nvec.astype(dtype), dtype=dtype, start=box.low.astype(dtype))


class Flattener:
    """Nested Dict and Tuple spaces as one flat Dict, whose keys are joined with "."; any other space stays as it is.

    ignore      flat keys that are left out, or the beginnings of several: "arm" of "arm.angle"
    categories  of `categorical_keys`: integers that become categories, their values as they are

    Raises UnsupportedSpaceError where two keys would be the same, and where there is none; ConfigError for unknown keys, and where
    all are left out.
    """

    def __init__(self, space: spaces.Space, ignore: Sequence[str] = (), categories: Categories = MappingProxyType({})):
        leaves = list(leaf_arrays(space))
        self._single = not isinstance(space, (spaces.Dict, spaces.Tuple))
        if ignore:
            leaves = _without(leaves, ignore, space)
        names = [join_path(path) for path, _ in leaves]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            what = f"its flat keys {twice} would be made twice" if twice else "it holds no array"
            raise UnsupportedSpaceError(
                f"The observation space {space} cannot be flattened: {what}. Rename or add keys in the environment."
            )
        self._paths = dict(zip(names, (path for path, _ in leaves)))
        parts = dict(zip(names, (sub for _, sub in leaves)))
        categorical = categorical_keys(space, categories) if categories else {}
        _require_known("env.categories", categorical, parts)
        parts |= categorical
        self.space = parts[""] if self._single else spaces.Dict(parts)

    def __call__(self, obs: Any) -> Any:
        """One observation, or many [T, ...], as an element of the flat space."""
        return obs if self._single else {name: reduce(getitem, path, obs) for name, path in self._paths.items()}


def _without(leaves: list[PathAndSpace], ignore: Sequence[str], space: spaces.Space) -> list[PathAndSpace]:
    """The leaves of a nested space that are not ignored. ConfigError for unknown keys, and where none is left."""
    above = {path: [join_path(path[:end]) for end in range(1, len(path) + 1)] for path, _ in leaves}
    known = [join_path(path) for path in above]
    if known == [""]:
        raise ConfigError(f"env.ignore is {list(ignore)}, and the observation, {space}, has no keys. Leave env.ignore out.")
    _require_known("env.ignore", ignore, {name for names in above.values() for name in names})
    kept = [(path, sub) for path, sub in leaves if not set(above[path]) & set(ignore)]
    if not kept:
        raise ConfigError(f"env.ignore is {list(ignore)}, all keys of the observation. Leave out one of {known} at least.")
    return kept


class FlattenSpaces(gym.Wrapper):
    """Nested Dict and Tuple observations as one flat Dict, whose keys are joined with "." (items of a Tuple are "0", "1", ...).

    plain               also converts spaces to the form that SB3's own algorithms need (see plain.py): Discrete and MultiDiscrete
                        start at 0, as observation and as action, grids of them become one row, a Box without dimensions gets one
    ignore, categories  as in Flattener: keys that are left out, and integers that are categories

    Everything else is passed on. Raises UnsupportedSpaceError, ConfigError.
    """

    def __init__(
        self,
        env: gym.Env,
        *,
        plain: bool = True,
        ignore: Sequence[str] = (),
        categories: Categories = MappingProxyType({}),
    ):
        super().__init__(env)
        self._flatten = Flattener(env.observation_space, ignore, categories)
        self._plain = PlainSpaces(self._flatten.space, env.action_space) if plain else None
        self.observation_space = self._plain.observation if plain else self._flatten.space
        self.action_space = self._plain.action if plain else env.action_space
        single = not isinstance(self.observation_space, spaces.Dict)
        for name, sub in {"obs": self.observation_space}.items() if single else self.observation_space.items():
            if not isinstance(sub, spaces.Box):  # a Box may still need a layout, which is given later
                ObsSpec.from_space(sub if single else spaces.Dict({name or "obs": sub}))

    @classmethod
    def wrap(cls, env: gym.Env, **options: Any) -> gym.Env:
        """The environment in this wrapper, or itself where nothing would change."""
        wrapped = cls(env, **options)
        same = wrapped.observation_space == env.observation_space and wrapped.action_space == env.action_space
        return env if same else wrapped

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observation(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        action = action if self._plain is None else self._plain.from_plain_action(action)
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(obs), reward, terminated, truncated, info

    def _observation(self, obs: Any) -> Any:
        flat = self._flatten(obs)
        return flat if self._plain is None else self._plain.to_plain_obs(flat)


class RenderObservation(gym.Wrapper):
    """The rendered picture as observation, resized to uint8 [size, size, 3].

    Raises ConfigError where the render mode is not rgb_array or the environment cannot draw, MissingExtraError where a package
    for that is absent, EnvError where `render` gives no picture.
    """

    def __init__(self, env: gym.Env, size: int = 64):
        if env.render_mode != "rgb_array":
            raise ConfigError(
                f"Observing pixels needs render_mode 'rgb_array'; {env} has {env.render_mode!r}. Pass render_mode='rgb_array' when "
                "the environment is made."
            )
        super().__init__(env)
        self.size = size
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        return self._picture(), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self.env.step(action)
        return self._picture(), reward, terminated, truncated, info

    def _picture(self) -> np.ndarray:
        try:
            frame = self.env.render()
        except EnvError as error:
            if isinstance(error.__cause__, NotImplementedError):  # what Gymnasium's Env does where nobody wrote another
                raise no_pictures(self.unwrapped.spec.id if self.unwrapped.spec else str(self.unwrapped)) from error
            raise
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            place = self.get_wrapper_attr("place")() if self.has_wrapper_attr("place") else "the environment"
            raise EnvError(f"{place}: render gave {describe(frame)}; expected uint8 [height, width, 3]. Correct its render method.")
        if frame.shape[:2] == (self.size, self.size):
            return frame.copy()
        return np.array(Image.fromarray(frame).resize((self.size, self.size), Image.Resampling.BOX))


def no_pictures(name: str) -> ConfigError:
    """The error where pictures of an environment are asked for that has none."""
    return ConfigError(
        f"env.pixels observes what '{name}' renders with render_mode='rgb_array', and it renders nothing so. Leave env.pixels out, "
        "or give its constructor a `render_mode` and let `render` return uint8 [height, width, 3]."
    )


class ActionRepeat(gym.Wrapper):
    """Repeats each action `times` times, or until the episode ends; gives the sum of rewards and the last observation."""

    def __init__(self, env: gym.Env, times: int):
        if times < 1:
            raise ConfigError(f"env.action_repeat is {times}; expected at least 1.")
        super().__init__(env)
        self.times = times

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.times):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info
