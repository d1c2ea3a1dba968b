"""Real environments: an id and its options -> wrappers -> VecEnv."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import TimeLimit
from pydantic import Field, field_validator, model_validator
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from worldmodel.config import Frozen, Options
from worldmodel.envs.extras import known_categories, missing_extra, register_for, remedy
from worldmodel.envs.masks import MaskedActions, can_be_masked, gives_masks
from worldmodel.envs.named import FORM, imported, named_wrapper, wrapped
from worldmodel.envs.vectors.adapter import GymVecEnvAdapter
from worldmodel.envs.vectors.restarts import LocalVecEnv, ReportFaults, Restarts
from worldmodel.envs.vectors.workers import WorkerVecEnv
from worldmodel.envs.wrappers import ActionRepeat, CheckedEnv, FlattenSpaces, RenderObservation, no_pictures
from worldmodel.errors import ConfigError, EnvError, did_you_mean
from worldmodel.registry import register
from worldmodel.spaces.layouts import Layout

_log = logging.getLogger(__name__)


@register("group", "env")
class EnvConfig(Frozen):
    """The environment, how it is observed, and what happens where it fails."""

    id: str = Field(description='Gymnasium id, "module:Name-v0" imports the module first')
    kwargs: dict[str, Any] = Field({}, description="keyword arguments of the environment's constructor")
    wrappers: tuple[str | dict[str, Options], ...] = Field(
        (),
        description="classes of gymnasium.Wrapper around the environment, from the inside out: [module:Class, {module:Class: "
        "{argument: value}}]",
    )
    ignore: tuple[str, ...] = Field((), description="keys of a Dict observation that are left out, such as texts")
    categories: tuple[int, ...] | dict[str, tuple[int, ...]] | None = Field(
        None,
        description="integers of an observation that are categories: how many there are, along its last side, by key for Dict "
        "spaces; null: those of MiniGrid's and BabyAI's own observations",
    )
    num_envs: int = Field(1, ge=1, description="copies that step together")
    layout: Layout | dict[str, Layout] | None = Field(
        None, description="order of the axes of images where the shape leaves it open; by key for Dict spaces"
    )
    names: tuple[str, ...] | dict[str, tuple[str, ...]] | None = Field(
        None,
        description="what tables and figures call the numbers of an observation: a word for each, by key for Dict spaces; "
        "null: obs[0], obs[1], ...",
    )
    pixels: int | None = Field(
        None, ge=8, description="observe the rendered picture, this many pixels a side, instead of the observation"
    )
    max_episode_steps: int | None = Field(
        None, ge=1, description="truncates there; null: the limit that the environment is registered with"
    )
    action_repeat: int = Field(1, ge=1, description="environment steps per action; the step limit counts environment steps")
    action_masks: bool | None = Field(
        None,
        description="observe which discrete actions are legal, from action_masks() or info['action_mask'], and take no others; "
        "null: a new run looks whether the environment says it; false: try all",
    )
    vectorize: Literal["dummy", "subproc"] = Field("dummy", description="all copies in this process, or one process each")
    timeout: float | None = Field(
        60.0,
        gt=0,
        description="seconds that a step or a reset may take before it is an error; null: for ever. With env.vectorize=subproc "
        "only: in this process nothing can interrupt an environment",
    )
    restarts: int = Field(
        0,
        ge=0,
        description="how often, within env.restart_window, an environment that fails is made anew, its episode truncated before "
        "the failed step; all copies count together. 0: the first failure ends the run, its state saved",
    )
    restart_window: float = Field(300.0, gt=0, description="seconds after which a restart no longer counts")

    @field_validator("wrappers", mode="before")
    @classmethod
    def _are_named(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"should be a list of {FORM}, not {value!r}.")
        return tuple({name: kwargs} if kwargs else name for name, kwargs in map(named_wrapper, value))

    @model_validator(mode="after")
    def _have_keys(self) -> EnvConfig:
        given = [name for name in ("ignore", "categories") if getattr(self, name)]
        if given and self.pixels is not None:
            raise ValueError(f"pixels replaces the observation, so {' and '.join(given)} would do nothing. Leave one of them out.")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options that change the environment of this id, as plain data."""
        named = {"kwargs", "wrappers", "ignore", "categories", "pixels", "max_episode_steps", "action_repeat", "action_masks"}
        return self.model_dump(mode="json", include=named, exclude_defaults=True)

    def declared(self, space: gym.Space) -> dict[str, Any]:
        """`ignore` and `categories` for an observation space, with what is known of the environment's own one."""
        own = self.categories is None and self.pixels is None and not self.wrappers
        known = known_categories(self.id, space, self.ignore) if own else self.categories
        return {"ignore": self.ignore, "categories": known or {}}


def make_env(config: EnvConfig | str, index: int = 0, seed: int | None = None) -> gym.Env:
    """One environment with all wrappers, from the inside out: `env.wrappers`, then checked, limited, repeated, rendered, flat and
    monitored.

    Its first reset and its action space are seeded with seed + index.
    Raises ConfigError (unknown id or wrapper, wrong kwargs, no pictures for `pixels`, unknown keys), MissingExtraError, EnvError (a
    constructor raised).
    """
    config = EnvConfig(id=config) if isinstance(config, str) else config
    spec = find_spec(config.id)
    kwargs = dict(config.kwargs)
    if config.pixels is not None:
        kwargs.setdefault("render_mode", "rgb_array")
    try:
        # The time limit goes around the checks: unpacking a malformed step, it would hide the error.
        with warnings.catch_warnings():  # many environments render without an entry in their metadata
            warnings.filterwarnings("ignore", ".*not in the possible render_modes", UserWarning)
            env = gym.make(spec, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    except Exception as error:
        _raise_creation_error(error, config, index)
    for name, arguments in map(named_wrapper, config.wrappers):
        env = wrapped(env, name, arguments, f"environment {index}: '{config.id}'")
    limit = spec.max_episode_steps if config.max_episode_steps is None else config.max_episode_steps
    if config.action_masks and config.action_repeat > 1:
        raise ConfigError(
            f"env.action_repeat={config.action_repeat} takes an action again where it may be illegal by then, and "
            "env.action_masks=true forbids that. Leave env.action_repeat out, or set env.action_masks=false."
        )
    options = {"repeat": config.action_repeat, "pixels": config.pixels, "masks": bool(config.action_masks)}
    return _wrapped(env, index, seed, config.declared(env.observation_space), limit=limit, **options)


def make_vec(config: EnvConfig | str, num_envs: int | None = None, seed: int | None = None) -> VecEnv:
    """SB3 VecEnv of num_envs (default: the config's) such environments; number i is seeded with seed + i.

    With `restarts` one that fails is made anew; the infos of that step hold `worldmodel.restarted`, as restarts.py says.
    """
    config = EnvConfig(id=config) if isinstance(config, str) else config
    count = config.num_envs if num_envs is None else num_envs
    if count < 1:
        raise ConfigError(f"env.num_envs is {count}; expected at least 1.")
    reporting = [partial(_make_reporting, config, index, seed) for index in range(count)]
    restarts = Restarts(config.restarts, config.restart_window)
    if config.vectorize == "subproc":
        # A worker cannot report why its environment could not be made: find out here.
        make_env(config).close()
        venv: VecEnv = WorkerVecEnv(reporting, timeout=config.timeout, restarts=restarts)
    elif config.restarts:
        venv = LocalVecEnv(reporting, restarts)
    else:
        venv = DummyVecEnv([partial(make_env, config, index, seed) for index in range(count)])
    if seed is not None:
        venv.seed(seed)
    return venv


def finds_masks(config: EnvConfig) -> bool:
    """Whether the environment of a config says which actions are legal: one is made for this, and reset where only that can tell.

    False where it fails, which whoever makes it next will report.
    """
    try:
        venv = make_vec(config.model_copy(update={"action_masks": False, "restarts": 0}), 1, seed=0)
        try:
            if not can_be_masked(venv.action_space):
                return False
            venv.reset()
            return gives_masks(venv)
        finally:
            venv.close()
    except Exception:  # whatever an environment may raise
        return False


def as_vec_env(
    env: str | EnvConfig | gym.Env | gym.vector.VectorEnv | VecEnv, num_envs: int | None = None, seed: int | None = None
) -> VecEnv:
    """A VecEnv of an id, a config, a Gymnasium environment or vector environment; a VecEnv is returned as it is."""
    if isinstance(env, gym.vector.VectorEnv):
        env = VecMonitor(GymVecEnvAdapter(env))
    if isinstance(env, VecEnv):
        if num_envs not in (None, env.num_envs):
            raise ConfigError(f"The VecEnv has {env.num_envs} environments, but {num_envs} were asked for. Leave num_envs out.")
        if seed is not None:
            seed_envs(env, seed)
        return env
    if isinstance(env, (str, EnvConfig)):
        return make_vec(env, num_envs, seed)
    if not isinstance(env, gym.Env):
        raise ConfigError(f"Expected a Gymnasium id, a gymnasium.Env, a VectorEnv or an SB3 VecEnv; got {type(env).__name__}.")
    if num_envs not in (None, 1):
        raise ConfigError(f"One environment cannot be {num_envs}. Pass its id, or a VecEnv.")
    venv = DummyVecEnv([partial(_wrapped, env, 0, seed)])
    if seed is not None:
        venv.seed(seed)
    return venv


def seed_envs(venv: VecEnv, seed: int) -> None:
    """Seeds the next reset of environment i with seed + i; logs a warning for a VecEnv that cannot be seeded."""
    try:
        venv.seed(seed)
    except Exception as error:
        _log.warning(
            "The VecEnv (%s) cannot be seeded: %s: %s. Its episodes do not follow from the seed.",
            type(venv).__name__, type(error).__name__, error,
        )  # fmt: skip


def id_of(env: gym.Env | gym.vector.VectorEnv | VecEnv | None) -> str | None:
    """The Gymnasium id of an environment, or of all in a VecEnv; None where it is unknown or differs.

    Environments in processes of their own are not asked: a spec that cannot be pickled would end the process.
    """
    inner = env.unwrapped if isinstance(env, VecEnv) else env
    inner = getattr(inner, "vector_env", inner)  # of an adapter
    held = getattr(inner, "envs", ()) if isinstance(inner, VecEnv) else [inner]
    ids = {getattr(getattr(one, "spec", None), "id", None) for one in held}
    return ids.pop() if len(ids) == 1 else None


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The registered spec of an id, importing what registers it. Raises ConfigError with the nearest registered ids."""
    module, _, name = env_id.rpartition(":")
    if module:
        imported(module, f"env.id '{env_id}'", "registers the environment")
    if name not in gym.registry:
        register_for(name)
    if name in gym.registry:
        return gym.registry[name]
    base = re.sub(r"-v\d+$", "", name)
    known = [other for other in gym.registry if re.fullmatch(re.escape(base) + r"-v\d+", other)] or list(gym.registry)
    hint = did_you_mean(name, known)
    hint = hint if hint.startswith(" Did") else " Import the package that registers it by writing 'module:Name-v0'."
    raise ConfigError(f"env.id '{env_id}' is not registered with Gymnasium.{hint}")


def _make_reporting(config: EnvConfig, index: int, seed: int | None) -> gym.Env:
    return ReportFaults(make_env(config, index, seed))


def _wrapped(
    env: gym.Env,
    index: int,
    seed: int | None,
    declared: Mapping[str, Any] = MappingProxyType({}),
    *,
    limit: int | None = None,
    repeat: int = 1,
    pixels: int | None = None,
    masks: bool = False,
) -> gym.Env:
    seed = None if seed is None else seed + index
    env = CheckedEnv(env, index, seed, **declared)
    if limit is not None:
        env = TimeLimit(env, limit)
    if repeat > 1:
        env = ActionRepeat(env, repeat)
    if pixels is not None:
        env = RenderObservation(env, pixels)
    monitored = _has_outer_monitor(env)
    env = FlattenSpaces.wrap(env, plain=False, **declared)
    env = MaskedActions(env) if masks else env
    env = env if monitored else Monitor(env)
    env.action_space.seed(seed)
    return env


def _has_outer_monitor(env: gym.Env) -> bool:
    """Whether a Monitor is around it that sees every truncation: one inside of a time limit does not."""
    while isinstance(env, gym.Wrapper) and not isinstance(env, Monitor | TimeLimit):
        env = env.env
    return isinstance(env, Monitor)


def _raise_creation_error(error: Exception, config: EnvConfig, index: int) -> None:
    """Raises the error of an environment's constructor as one with a remedy."""
    extra = missing_extra(error)
    if extra is not None:
        raise extra from error
    if config.pixels is not None and "render_mode" not in config.kwargs and isinstance(error, TypeError):
        try:
            gym.make(find_spec(config.id), disable_env_checker=True, **config.kwargs).close()
        except Exception:  # the render mode is not what it lacks
            pass
        else:
            raise no_pictures(config.id) from error
    if isinstance(error, TypeError) and "argument" in str(error):
        raise ConfigError(f"env.kwargs {config.kwargs} do not fit '{config.id}': {error}. Correct env.kwargs.") from error
    other, newest = "Correct the environment or env.kwargs", _newest(config.id)
    if newest and isinstance(error, ImportError | gym.error.Error):  # what retired versions raise: HalfCheetah-v2, Gymnasium itself
        other = f"Use '{newest}', the newest version that is registered"
    raise EnvError(
        f"environment {index}: '{config.id}' could not be made: it raised {type(error).__name__}: {error}. {remedy(error, other)}."
    ) from error


def renders(config: EnvConfig) -> bool:
    """Whether the environment renders pictures; MissingExtraError where it only lacks a package for that."""
    try:
        env = make_env(config.model_copy(update={"kwargs": {**config.kwargs, "render_mode": "rgb_array"}}), seed=0)
    except (ConfigError, EnvError):  # its constructor takes no render_mode
        return False
    try:
        env.reset(seed=0)
        frame = env.render()
        return isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
    except EnvError:
        return False
    finally:
        env.close()


def _newest(env_id: str) -> str | None:
    """The id of the newest registered version of an environment; None where it is that one."""
    module, _, name = env_id.rpartition(":")
    base, _, own = name.rpartition("-v")
    found = (re.fullmatch(re.escape(base) + r"-v(\d+)", other) for other in gym.registry)
    last = max((int(match[1]) for match in found if match), default=0)
    return f"{module}:{base}-v{last}".lstrip(":") if own.isdigit() and last > int(own) else None


def frames_per_second(env_id: str) -> float:
    """The frame rate of an environment's pictures, by its class; 30 where that has none."""
    entry = find_spec(env_id).entry_point
    maker = gym.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    return float(getattr(maker, "metadata", {}).get("render_fps") or 30)
