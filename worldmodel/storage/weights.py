"""Weights and optimiser states as named arrays: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel import renamed
from worldmodel.errors import ConfigError


@contextmanager
def cpu_randomness(seed: int | None = None) -> Iterator[None]:
    """Draws from torch's CPU generator inside follow from `seed` (None: from its current state); outside, it is unchanged.

    The process's CUDA generators are left alone, which torch.manual_seed would reseed.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def as_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """The parameters and buffers of a module by name."""
    return {name: x.detach().cpu().numpy() for name, x in module.state_dict().items()}


def load_arrays(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `as_arrays` gave. Raises ConfigError where names or shapes differ; then nothing is changed."""
    names = renamed.array_names(arrays)
    own, arrays = module.state_dict(), {names[name]: x for name, x in arrays.items()}
    renamed.take_over_statistics(module, arrays)
    wrong = sorted(set(own) ^ set(arrays)) or [name for name, x in own.items() if tuple(x.shape) != arrays[name].shape]
    if wrong:
        raise ConfigError(
            f"The saved weights do not fit this config: {', '.join(wrong[:4])}. Use the config that was saved with them."
        )
    module.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in arrays.items()})


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """The optimiser's state, one array for each parameter and quantity."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{name}": x.detach().cpu().numpy() for i, slot in state.items() for name, x in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `optimizer_arrays` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in arrays.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = torch.from_numpy(np.array(x))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
