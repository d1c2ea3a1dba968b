"""An agent that acts at random while its world model learns: the world model alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from worldmodel.agents.belief import Controller, keep_legal
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.config import Frozen
from worldmodel.data import State
from worldmodel.model import WorldModel
from worldmodel.registry import register


class RandomConfig(Frozen):
    """Nothing to choose."""

    kind: Literal["random"] = "random"


class RandomController(Controller):
    """Uniform over the legal actions; `deterministic` changes nothing."""

    def act(
        self, world: WorldModel, state: State, memory: State, deterministic: bool, generator: torch.Generator, rows: Any = None
    ) -> tuple[Tensor, State]:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        action = torch.as_tensor(world.action.sample(state.batch_size, np.random.default_rng(seed)), device=world.device)
        return keep_legal(world, action, state, generator, rows), memory


@register("agent", "random", RandomConfig)
class RandomAgent(WorldModelAlgorithm):
    """Trains the world model on uniformly random experience."""

    kind: ClassVar[str] = "random"
    improves = False

    def _make_controller(self) -> RandomController:
        return RandomController()
