"""Arguments of an algorithm, as scripts of SB3 give them: config, policy, device, environments, images with channels first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_wrapper

from worldmodel.agents.belief import BeliefPolicy
from worldmodel.config import Config, describe
from worldmodel.config.recipes import combine
from worldmodel.envs.make import as_vec_env, finds_masks, id_of
from worldmodel.envs.masks import MaskedVecEnv
from worldmodel.errors import ConfigError, did_you_mean
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.keys import KeySpec

SAME = {
    "batch_size": ["train.batch_size"],
    "buffer_size": ["train.capacity"],
    "ent_coef": ["agent.entropy"],
    "gae_lambda": ["agent.lam"],
    "gamma": ["agent.gamma"],
    "gradient_steps": ["train.ratio"],
    "learning_rate": ["train.lr", "agent.lr"],
    "learning_starts": ["train.prefill"],
    "max_grad_norm": ["train.clip", "agent.clip"],
    "n_envs": ["env.num_envs"],
    "n_epochs": ["train.ratio"],
    "n_steps": ["agent.horizon"],
    "policy_kwargs": ["size", "agent.units", "agent.layers"],
    "tau": ["agent.slow"],
    "train_freq": ["train.ratio"],
}
"""SB3's name -> dotted keys of what comes nearest to it."""


def reject_unknown_arguments(algorithm: type, given: Mapping[str, Any], config: Config) -> None:
    """ConfigError that names each argument which the algorithm does not have, and the dotted keys of `config` that mean it."""
    words, rows = [], [row.key for row in describe(config)]
    parameters = {name for cls in algorithm.__mro__ for name in inspect.signature(cls.__init__).parameters if name[0] != "_"}
    own = parameters - {"self", "args", "kwargs", "others", *SAME, *(key.rpartition(".")[2] for key in rows)}
    for name in given:
        keys = [key for key in SAME.get(name, []) if key == "size" or key in rows]
        keys = keys or [key for key in rows if key.rpartition(".")[2] == name]
        if keys:
            words.append(f"{name} is " + " or ".join(f"config={{'{key}': ...}}" for key in keys[:4]))
        else:
            near = did_you_mean(name, own | {key.rpartition(".")[2] for key in rows})
            words.append(f"{name} means nothing here" + (f" ({near.strip()})" if "Did" in near else ""))
    if words:
        raise ConfigError(f"{algorithm.__name__} has no argument {', '.join(given)}. Options stand in config: {'; '.join(words)}.")


def resolve_config(kind: str, recipe: Any, overrides: Any, env: Any) -> Config:
    """The config of a new agent of this kind: a whole Config, or a recipe (without: the environment's) and what differs."""
    if isinstance(overrides, Config):
        if recipe is not None:
            raise ConfigError(f"recipe={recipe!r} stands beside a whole Config, which came from a recipe. Leave one of them out.")
        return overrides
    if isinstance(overrides, Mapping) and "recipe" in overrides:
        raise ConfigError(
            f"config={{'recipe': {overrides['recipe']!r}}} names a recipe, and config holds only what differs from one. "
            f"Use recipe={overrides['recipe']!r} beside config."
        )
    overrides, own = [] if overrides is None else overrides, {"agent.kind": kind}
    agent = combine(overrides)[1].get("agent", {})
    if not isinstance(agent, str) and "kind" not in agent:  # else options of this kind would be unknown to the recipe's
        overrides = {**overrides, **own} if isinstance(overrides, Mapping) else [*overrides, f"agent.kind={kind}"]
    env_id = env if isinstance(env, str) else id_of(env)
    config = read_config(recipe, overrides, env_id or "custom", env)
    return config if config.agent.kind == kind else config.override(own)


def read_config(recipe: Any, overrides: Any, env_id: str | None = None, env: Any = None) -> Config:
    """`Config.from_recipe`; where no recipe was made for the environment, its observations choose the default.

    Vectors, categories and bits have configs/default/vectors.yaml, in which they are their own latents; pictures have the options'
    own defaults.
    env   what the observations are of; None: the environment of the config is made for a moment
    """
    config = Config.from_recipe(recipe, overrides, env_id=env_id)
    if config.recipe is not None or config.train.data or (config.env.id == "custom" and env is None):
        return config
    chosen = Config.from_recipe(recipe, overrides, env_id=env_id, default="vectors")
    if chosen == config:
        return config
    space = getattr(env, "single_observation_space", getattr(env, "observation_space", None))
    if space is None:
        venv = as_vec_env(config.env)
        space = venv.observation_space
        venv.close()
    kinds = {key.kind for key in ObsSpec.from_space(space, config.env.layout).keys.values()}
    return config if "image" in kinds else chosen


def with_masks(config: Config, env_id: str | None = None) -> Config:
    """The config, with env.action_masks=true where that is left open and its environment, or that of an id, gives masks."""
    env = config.env if env_id is None else config.env.model_copy(update={"id": env_id})
    if env.action_masks is not None or config.train.data or not finds_masks(env):
        return config
    return config.override({"env.action_masks": True})


def with_masks_if_any(env: Any, config: Config, seed: int, is_complete: bool) -> tuple[VecEnv, Config]:
    """(the environments that an agent was given, its config): with masks where it wants them, or leaves it open and there are some.

    is_complete  the config leaves nothing open
    """
    if isinstance(env, str):
        config = with_masks(config, env)
        return as_vec_env(config.env.model_copy(update={"id": env}), seed=seed), config
    masks = config.env.action_masks
    return MaskedVecEnv.around(as_vec_env(env, seed=seed), bool(masks) if is_complete else masks), config


def find_device(device: torch.device | str) -> torch.device:
    """SB3's get_device; ConfigError where CUDA is asked for and there is none."""
    if torch.device("cpu" if device == "auto" else device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda was asked for, but torch finds no CUDA device. Use device=cpu, or install a CUDA build of torch."
        )
    return get_device(device)


def policy_name(spec: ObsSpec) -> str:
    """SB3's name of a policy for such observations."""
    if set(spec.keys) != {"obs"}:
        return "MultiInputPolicy"
    return "CnnPolicy" if spec.keys["obs"].kind == "image" else "MlpPolicy"


def fitting_policy(policy: str | type, spec: ObsSpec, space: spaces.Space) -> str:
    """The name of the policy; that of BeliefPolicy follows the observations. ConfigError for a name that does not fit them."""
    if not isinstance(policy, str):
        return policy_name(spec)
    if policy == "CnnPolicy" and all(key.kind != "image" for key in spec.keys.values()):
        raise ConfigError(f"CnnPolicy needs an image, but the observations are {space}. Use MlpPolicy.")
    if policy == "MultiInputPolicy" and spec.single:
        raise ConfigError(f"MultiInputPolicy needs a Dict, but the observations are {space}. Use MlpPolicy.")
    return policy


def require_own_policy(algorithm: str, policy: Any) -> None:
    """ConfigError for another policy class, such as SB3's: this algorithm never makes its networks."""
    if isinstance(policy, str) or policy is BeliefPolicy:
        return
    named = policy.__name__ if isinstance(policy, type) else repr(policy)
    raise ConfigError(
        f"{algorithm} has no use for the policy {named}: it acts on a world model's belief, with networks of its own. Expected "
        "'MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy' as a string, after the observations."
    )


def refuse_normalization(env: VecEnv) -> None:
    """ConfigError where VecNormalize scales what the replay would hold, by statistics that move."""
    normalizer = unwrap_vec_wrapper(env, VecNormalize)
    if normalizer is not None and normalizer.norm_obs:
        raise ConfigError(
            "VecNormalize is around the environment: its statistics would change what the replay holds. Expected plain "
            "observations: take it off, the world model standardises vectors itself (model.vector_scaling=standardise)."
        )
    if normalizer is not None and normalizer.norm_reward:
        raise ConfigError(
            "VecNormalize(norm_obs=False) scales the rewards by a scale that moves: the replay would hold one reward in many "
            "units. Expected plain rewards: take it off, they are learned in units of their own size."
        )


def with_spec_layout(spec: ObsSpec, space: spaces.Space) -> spaces.Space:
    """The space with the channels of its images where the spec has them; SB3 may have moved them to the front."""
    if not isinstance(space, spaces.Dict):
        return _match_layout(spec.keys.get("obs"), space)
    return spaces.Dict({name: _match_layout(spec.keys.get(name), sub) for name, sub in space.items()})


def _match_layout(key: KeySpec | None, space: spaces.Space) -> spaces.Space:
    if key is None or not isinstance(space, spaces.Box) or space.shape != key.transposed_shape or space.shape == key.raw_shape:
        return space
    source, target = (0, -1) if key.layout == "hwc" else (-1, 0)
    low, high = (np.moveaxis(bound, source, target) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)
