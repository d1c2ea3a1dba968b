"""Runs of some seconds' fraction, and an environment that misbehaves when it is told to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from worldmodel.agents.training.session import TrainResult
from worldmodel.commands.train import train

CHAIN = "worldmodel.envs:Chain-v0"
OPTIONS: dict[str, Any] = {
    "train.prefill": 16,
    "train.pretrain": 1,
    "train.ratio": 0.25,
    "train.batch_size": 3,
    "train.batch_length": 6,
    "train.capacity": 1000,
    "eval.every": 25,
    "eval.episodes": 2,
    "checkpoint.every": 20,
    "log.tensorboard": False,
    "agent.units": 8,
    "agent.layers": 1,
    "agent.horizon": 3,
    "agent.bins": 15,
    "model.encoder.units": 8,
    "model.encoder.layers": 1,
    "model.decoder.units": 8,
    "model.decoder.layers": 1,
    "model.dynamics.deter": 8,
    "model.dynamics.units": 8,
    "model.dynamics.kind": "rssm",
    "model.dynamics.latent.kind": "categorical",
    "model.dynamics.latent.variables": 2,
    "model.dynamics.latent.classes": 3,
    "model.heads.units": 8,
    "model.heads.bins": 15,
}


def small_train(
    folder: Path | None, steps: int | None = 60, recipe: Any = CHAIN, *, options: dict[str, Any] | None = None, **kwargs: Any
) -> TrainResult:
    """`train` at a size for tests."""
    return train(recipe, steps=steps, run_dir=folder, overrides=merged(options), device="cpu", **kwargs)


def merged(options: dict[str, Any] | None = None) -> dict[str, Any]:
    """OPTIONS with others over them; another agent has none of the options of Dreamer."""
    options = options or {}
    return {**{k: v for k, v in OPTIONS.items() if "agent" not in options or not k.startswith("agent.")}, **options}


def words(options: dict[str, Any] | None = None) -> list[str]:
    """The same options as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in merged(options).items()]


class Nervous(gym.Env):
    """Counts its steps over all episodes of all its copies; episodes end after 7.

    signals  sent to the process at step `at`, one after the other
    raises   whether step `at` fails
    noisy    whether each step prints, in Python and below it
    """

    steps = 0
    metadata = {"render_modes": []}

    def __init__(self, at: int = -1, signals: list[int] = (), raises: bool = False, noisy: bool = False):
        self.at, self.signals, self.raises, self.noisy = at, signals, raises, noisy
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.own = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.own = 0
        return self._observe(), {}

    def step(self, action):
        Nervous.steps += 1
        self.own += 1
        if self.noisy:
            print("an environment that talks")
            os.write(1, b"and one that talks below Python\n")
        if Nervous.steps == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
            if self.raises:
                raise RuntimeError("the simulator fell over")
        return self._observe(), float(action), self.own >= 7, False, {}

    def _observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


gym.register("Nervous-v0", entry_point=Nervous)
