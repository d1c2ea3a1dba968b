"""What SB3's scripts give that has another form here: names of arguments, policy classes, images with their channels first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from worldmodel.agents.belief import BeliefPolicy
from worldmodel.config import Config, describe
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


def require_own_policy(algorithm: str, policy: Any) -> None:
    """ConfigError for another policy class, as SB3's are: this algorithm would never make its networks."""
    if isinstance(policy, str) or policy is BeliefPolicy:
        return
    named = policy.__name__ if isinstance(policy, type) else repr(policy)
    raise ConfigError(
        f"{algorithm} has no use for the policy {named}: it acts on a world model's belief, with networks of its own. Expected "
        "'MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy' as a string, after the observations."
    )


def with_spec_layout(spec: ObsSpec, space: spaces.Space) -> spaces.Space:
    """The space with the axes of its images as the spec has them: SB3 turns images to channels first, or has not turned them."""
    if not isinstance(space, spaces.Dict):
        return _match_layout(spec.keys.get("obs"), space)
    return spaces.Dict({name: _match_layout(spec.keys.get(name), sub) for name, sub in space.items()})


def _match_layout(key: KeySpec | None, space: spaces.Space) -> spaces.Space:
    if key is None or not isinstance(space, spaces.Box) or space.shape != key.transposed_shape or space.shape == key.raw_shape:
        return space
    source, target = (0, -1) if key.layout == "hwc" else (-1, 0)
    low, high = (np.moveaxis(bound, source, target) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype.type)
