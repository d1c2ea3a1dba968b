"""Dreamer: an actor and a critic that learn in imagination, as an SB3 algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from worldmodel.agents.actor_critic import ActorCritic, ActorCriticConfig, ActorCriticLearner
from worldmodel.agents.belief import Controller
from worldmodel.agents.loop import WorldModelAlgorithm
from worldmodel.agents.novelty import Novelty
from worldmodel.data import State
from worldmodel.model import WorldModel
from worldmodel.registry import register


class DreamerConfig(ActorCriticConfig):
    """Actor-critic in imagination."""

    kind: Literal["dreamer"] = "dreamer"


class DreamerController(Controller, ActorCritic):
    """Acts by a sample of the actor, or by its mode."""

    def act(
        self, world: WorldModel, state: State, memory: State, deterministic: bool, generator: torch.Generator, rows: Any = None
    ) -> tuple[Tensor, State]:
        feature = world.dynamics.feature(state)
        policy = self.policy(feature, world.legal(feature, rows))
        return policy.mode() if deterministic else policy.sample(generator), memory

    def estimate(self, feature: Tensor) -> Tensor | None:
        return self.value(feature)


@register("agent", "dreamer", DreamerConfig)
class Dreamer(WorldModelAlgorithm):
    """Learns a world model from real steps, and a policy from imagined ones (`ActorCriticLearner`).

        model = Dreamer("MlpPolicy", "CartPole-v1").learn(1500)
        action, belief = model.predict(obs, belief, episode_start, deterministic=True)

    Source: Hafner et al. 2023, 2025 (DreamerV3); what differs here is listed in docs/architecture.md.
    """

    kind: ClassVar[str] = "dreamer"

    @property
    def gamma(self) -> float:
        """Discount per step, by SB3's name."""
        return self.config.agent.gamma

    def _make_controller(self) -> DreamerController:
        return DreamerController(self.config.agent, self.world.feature_dim, self.action_spec)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.behaviour = ActorCriticLearner(self.learner.ema, self.controller)
        self.exploration.novelty = Novelty(self.learner.ema, self.obs_spec)

    @property
    def optimizers_by_name(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().optimizers_by_name, "actor": self.behaviour.actor_optimizer, "critic": self.behaviour.critic_optimizer}

    def _behaviour_state(self) -> dict[str, Any]:
        scale = self.behaviour.scale
        return {
            "return_low": scale.low,
            "return_high": scale.high,
            "updates": self.behaviour.updates,
            "is_intrinsic": self.behaviour.is_intrinsic,
        }

    def _restore_behaviour(self, state: Mapping[str, Any]) -> None:
        self.behaviour.scale.low, self.behaviour.scale.high = state["return_low"], state["return_high"]
        self.behaviour.updates = state.get("updates", 0)  # checkpoints of 0.1.0 have neither
        self.behaviour.is_intrinsic = state.get("is_intrinsic", False)
