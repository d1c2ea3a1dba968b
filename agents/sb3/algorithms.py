"""SB3's algorithms: found by name, opened from files, made for imagined environments, and their random draws seeded."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from worldmodel.envs.extras import absent, install
from worldmodel.errors import ConfigError, MissingExtraError, TrustError
from worldmodel.storage.weights import cpu_randomness

ALGORITHMS = {
    **{name: ("stable_baselines3", name.upper()) for name in ("ppo", "a2c", "dqn", "sac", "td3")},
    **{"recurrent_ppo": ("sb3_contrib", "RecurrentPPO"), "tqc": ("sb3_contrib", "TQC"), "qrdqn": ("sb3_contrib", "QRDQN")},
}
"""Name in configs -> (package, class)."""

OFF_POLICY = {"learning_starts": 0, "train_freq": 1, "gradient_steps": 4}
VALUE_BASED = {**OFF_POLICY, "buffer_size": 50_000, "batch_size": 128, "learning_rate": 1e-3, "target_update_interval": 256}
ON_POLICY = {"n_steps": 16, "gamma": 0.99, "gae_lambda": 0.95}
DREAM_DEFAULTS: dict[str, dict[str, Any]] = {
    "PPO": {**ON_POLICY, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3, "ent_coef": 1e-3},
    "A2C": {**ON_POLICY, "n_steps": 8, "learning_rate": 1e-3},
    "RecurrentPPO": {**ON_POLICY, "batch_size": 256, "n_epochs": 4, "learning_rate": 1e-3},
    "DQN": VALUE_BASED,
    "QRDQN": {**VALUE_BASED, "gradient_steps": 1},
    "SAC": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
    "TD3": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
    "TQC": {**OFF_POLICY, "buffer_size": 50_000, "learning_rate": 1e-3},
}
"""Arguments that suit some dozens of imagined worlds, where SB3's defaults suit one real environment; options override them."""


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """SB3's class of a name. Raises MissingExtraError, and ConfigError where its package is broken."""
    package, attribute = ALGORITHMS[name]
    try:
        return getattr(importlib.import_module(package), attribute)
    except ImportError as error:
        if package.partition(".")[0] not in absent(error):
            raise ConfigError(
                f"agent.algo={name} comes with the package '{package}', which is installed and cannot be imported: {error}. "
                "Correct that installation: it may be of another version than stable-baselines3."
            ) from error
        raise MissingExtraError(
            f"agent.algo={name} comes with the package '{package}', which is not installed. {install('contrib')}"
        ) from error


def open_algorithm(algorithm: type[BaseAlgorithm], path: str | Path, *, trust: bool, device: Any) -> BaseAlgorithm:
    """What SB3's save() wrote. Raises TrustError without `trust`, ConfigError where there is no such algorithm in the file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"'{path}' is no file. Expected the zip that {algorithm.__name__}.save() wrote, suffix included.")
    if not trust:
        raise TrustError(
            f"'{path}' is a file of Stable-Baselines3: opening it unpickles, which can run any code. Expected --trust, or "
            "trust=True: give it where the file comes from you, or from somebody you trust."
        )
    try:
        return algorithm.load(path, device=device)
    except Exception as error:  # whatever its pickles raise
        raise ConfigError(
            f"'{path}' could not be opened as {algorithm.__name__}: {type(error).__name__}: {error}. Expected the zip that its "
            "save() wrote: check agent.algo, or that the file is whole."
        ) from error


@contextmanager
def seeded_globals(generator: torch.Generator, algorithm: BaseAlgorithm | None = None) -> Iterator[None]:
    """SB3 draws from the process's global random states: inside they are seeded by `generator`, outside they are unchanged.

    So is the action space of `algorithm`, from which DQN draws its random actions. CUDA's generators are left as the user seeded
    them: an SB3 algorithm on a GPU draws from those.
    """
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    python, legacy = random.getstate(), np.random.get_state()
    with cpu_randomness(seed):
        random.seed(seed)
        np.random.seed(seed)
        if algorithm is not None:
            algorithm.action_space.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def make_algorithm(
    algorithm: type[BaseAlgorithm], dream: VecEnv, seed: int, device: Any, options: Mapping[str, Any]
) -> BaseAlgorithm:
    """The algorithm in an imagined environment. ConfigError where the action space or an argument does not fit.

    Mappings among the options are copied: SB3 writes into policy_kwargs.
    """
    space = dream.observation_space
    image = getattr(space, "shape", None) is not None and len(space.shape) == 3
    kind = "MultiInput" if hasattr(space, "spaces") else "Cnn" if image else "Mlp"
    recurrent = any("Recurrent" in c.__name__ for c in algorithm.__mro__)
    policy = f"{kind}{'LstmPolicy' if recurrent else 'Policy'}"
    fitting = next((DREAM_DEFAULTS[c.__name__] for c in algorithm.__mro__ if c.__name__ in DREAM_DEFAULTS), {})
    own = {name: dict(value) if isinstance(value, Mapping) else value for name, value in options.items()}
    given = {**fitting, "seed": seed, "device": device, **own}
    try:
        return algorithm(given.pop("policy", policy), dream, **given)
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if "action spaces" in reason:
            raise ConfigError(
                f"{algorithm.__name__} does not fit this environment: {reason}. Choose one that does: ppo, a2c or recurrent_ppo "
                "take any actions, dqn and qrdqn discrete ones, sac, td3 and tqc continuous ones."
            ) from None
        raise ConfigError(f"{algorithm.__name__} refused its arguments: {reason}. Correct agent.options or algo_kwargs.") from error
