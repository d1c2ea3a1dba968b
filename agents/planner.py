"""Planners: at each step a search over imagined sequences of actions (model-predictive control), as an SB3 algorithm.

| method | candidates | the action |
|---|---|---|
| `random` | uniform, once | that of the best one (random shooting) |
| `cem` | drawn from a distribution that is fitted to the elites, again and again | its mean or mode |
| `icem` | the same with coloured noise, elites kept between iterations and, shifted, between steps | that of the best one of all |
| `mppi` | as cem, elites weighted by their value | the weighted mean or mode |

Sources: Rubinstein 1999 (CEM); Pinneri et al. 2020 (iCEM); Williams et al. 2017 (MPPI), with elites, proposals of a learned
policy and a terminal value as in Hansen et al. 2024 (TD-MPC2, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.agents.actor_critic import ActorCriticConfig, lambda_return, weights
from worldmodel.agents.belief import legal_actions
from worldmodel.agents.dreamer import Dreamer, DreamerController
from worldmodel.config import Frozen
from worldmodel.data import Dream, Sampling, State
from worldmodel.model import WorldModel, needs_ensemble, needs_marginal, reward_penalty
from worldmodel.registry import register
from worldmodel.spaces import ActionSpec

UNIFORM_SHARE = 0.5
"""Share of the uniform distribution in the first one over categories and bits: what `first_std` is to numbers."""


class PlanConfig(Frozen):
    """The search for one action."""

    method: Literal["random", "cem", "icem", "mppi"] = Field("mppi", description="how candidate plans are drawn and used")
    horizon: int = Field(4, ge=1, description="imagined steps of each candidate")
    samples: int = Field(32, ge=2, description="candidates in each iteration")
    iterations: int = Field(2, ge=1, description="times that the distribution is fitted; random shooting draws once")
    elites: int = Field(6, ge=1, description="best candidates that the distribution is fitted to")
    proposals: int = Field(8, ge=0, description="candidates that the learned policy draws")
    terminal: bool = Field(True, description="the critic's value counts for what comes after the horizon")
    lam: float = Field(
        1.0,
        ge=0,
        le=1,
        description="with terminal: lambda of a candidate's value, below 1 an average over all depths at which the critic's value "
        "stands for the rest; 1: the last alone",
    )
    draws: int = Field(
        0,
        ge=0,
        description="roll-outs of each candidate that its value is the mean of, each of a member of an ensemble of transitions, or "
        "of latents as they are drawn; 0: one, of the most likely latents",
    )
    temperature: float = Field(0.5, gt=0, description="mppi: spread of the weights, in deviations of the elites' values")
    first_std: float = Field(
        1.0, gt=0, description="deviation of the first distribution over continuous actions, which are in [-1, 1]"
    )
    min_std: float = Field(0.05, gt=0, description="smallest deviation after a fit; of categories and bits the smallest share")
    momentum: float = Field(0.1, ge=0, lt=1, description="share of the distribution before in a fitted one")
    colour: float = Field(2.0, ge=0, description="icem: exponent of the noise's spectrum over time; 0: white")
    keep: int = Field(4, ge=0, description="icem: elites that are kept")
    uncertainty_penalty: float = Field(
        0.0, ge=0, description="taken off each reward, in units of the rewards' own size, per unit of the ensemble's uncertainty"
    )
    bonus: float = Field(0.0, ge=0, description="the same as a bonus on rewards while experience is collected: explores")
    goal: Literal["sum", "last"] = Field("sum", description="distance to a goal: summed over the horizon, or at its end alone")

    @property
    def rollouts(self) -> int:
        """Of each candidate."""
        return max(1, self.draws)

    @model_validator(mode="after")
    def _fits(self) -> PlanConfig:
        if self.elites > self.samples:
            raise ValueError(f"elites={self.elites} are more than the {self.samples} samples that they are chosen from")
        used = self.proposals + (self.keep if self.method == "icem" else 0)
        if used >= self.samples:
            raise ValueError(
                f"proposals={self.proposals}{f' and keep={self.keep}' if self.method == 'icem' else ''} leave none of the "
                f"samples={self.samples} to be drawn: raise samples, or lower them"
            )
        if self.method == "icem" and self.keep > self.elites:
            raise ValueError(f"keep={self.keep} is more than the {self.elites} elites")
        return self


@dataclass(frozen=True)
class PlanDistribution:
    """Independent distributions of all actions of a plan.

    center  [B H A]  means in [-1, 1], or probabilities of each category or bit
    std     [B H A]  deviations; None for categories and bits
    legal   [B A]    what may be done first: other categories have no share of the first action; None: everything
    """

    spec: ActionSpec
    center: Float[Tensor, "B H A"]
    std: Float[Tensor, "B H A"] | None
    legal: Bool[Tensor, "B A"] | None = None

    @classmethod
    def centered(
        cls, spec: ActionSpec, center: Float[Tensor, "B H A"], std: float, legal: Bool[Tensor, "B A"] | None = None
    ) -> PlanDistribution:
        """A broad one around a plan: where a search begins."""
        if spec.kind == "continuous":
            return cls(spec, center, torch.full_like(center, std))
        return cls(spec, (1 - UNIFORM_SHARE) * center + UNIFORM_SHARE * uniform(spec, center), None, legal)._restricted()

    def _restricted(self) -> PlanDistribution:
        """This one given that the first action is legal; what is legal later depends on the roll-out."""
        if self.legal is None:
            return self
        first = self.spec.restrict(self.center[:, 0], self.legal).unsqueeze(1)
        return replace(self, center=torch.cat([first, self.center[:, 1:]], 1))

    @property
    def noise_dim(self) -> int:
        """G: one number of noise for each of an action's numbers, groups or bits."""
        return len(self.spec.sizes) if self.spec.kind == "categorical" else self.spec.dim

    def sample(self, noise: Float[Tensor, "B K H G"]) -> Float[Tensor, "B K H A"]:
        """K plans from normal noise."""
        if self.std is not None:
            return (self.center.unsqueeze(1) + self.std.unsqueeze(1) * noise).clamp(-1, 1)
        quantile = torch.special.ndtr(noise)
        if self.spec.kind == "binary":
            return (quantile < self.center.unsqueeze(1)).float()
        parts = []
        for group, share in enumerate(self.center.split(self.spec.sizes, -1)):
            index = (share.cumsum(-1)[..., :-1].unsqueeze(1) <= quantile[..., group : group + 1]).sum(-1)
            parts.append(nn.functional.one_hot(index, share.shape[-1]).float())
        return torch.cat(parts, -1)

    def mode(self) -> Float[Tensor, "B H A"]:
        if self.spec.kind == "continuous":
            return self.center
        if self.spec.kind == "binary":
            return (self.center > 0.5).float()
        groups = self.center.split(self.spec.sizes, -1)
        return torch.cat([nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float() for p in groups], -1)

    def fitted(
        self, elites: Float[Tensor, "B E H A"], weight: Float[Tensor, "B E"], config: PlanConfig, max_std: float
    ) -> PlanDistribution:
        """The distribution of the weighted elites, mixed with a share of this one."""
        weight = weight[:, :, None, None]
        center = (weight * elites).sum(1)
        if self.std is None:
            center = torch.lerp(center, self.center, config.momentum)
            center = torch.lerp(center, uniform(self.spec, center), config.min_std)
            return replace(self, center=center)._restricted()
        std = (weight * (elites - center.unsqueeze(1)).square()).sum(1).sqrt()
        center, std = (torch.lerp(new, old, config.momentum) for new, old in ((center, self.center), (std, self.std)))
        return PlanDistribution(self.spec, center, std.clamp(config.min_std, max_std))


def uniform(spec: ActionSpec, like: Tensor) -> Tensor:
    """The centre [..., A] of the uninformed distribution: 0 for numbers, equal shares for categories, a half for bits."""
    if spec.kind == "continuous":
        return torch.zeros_like(like)
    share = [0.5] * spec.dim if spec.kind == "binary" else [1 / n for n in spec.sizes for _ in range(n)]
    return like.new_tensor(share).expand_as(like)


def colored_noise(white: Float[Tensor, "B K H G"], exponent: float) -> Float[Tensor, "B K H G"]:
    """Normal noise of unit variance whose power falls with frequency f as f^-exponent along time; 0: unchanged.

    Source: Timmer and Koenig 1995; Pinneri et al. 2020 (iCEM), section 3.1.
    """
    steps = white.shape[2]
    if not exponent or steps < 2:
        return white
    frequency = torch.fft.rfftfreq(steps, device=white.device).clamp_min(1 / steps)
    gain = frequency.pow(-exponent / 2)
    # A real signal's spectrum holds each frequency twice, but the first one and, of an even length, the last one.
    multiplicity = torch.full_like(gain, 2.0)
    multiplicity[0] = 1.0
    if steps % 2 == 0:
        multiplicity[-1] = 1.0
    gain = gain / ((multiplicity * gain.square()).sum() / steps).sqrt()
    return torch.fft.irfft(torch.fft.rfft(white, dim=2) * gain[:, None], n=steps, dim=2)


@dataclass(frozen=True)
class Plan:
    """What a search found for each of B states.

    distribution             of all H actions, fitted to the last elites
    best          [B H A]    the candidate of the highest value
    value         [B]        that value: imagined return, with the critic's value behind the horizon
    elites        [B E H A]  the best candidates, best first
    """

    distribution: PlanDistribution
    best: Float[Tensor, "B H A"]
    value: Float[Tensor, " B"]
    elites: Float[Tensor, "B E H A"]


class PlannerConfig(ActorCriticConfig):
    """A search at each step, with a policy and a critic that learn in imagination as Dreamer's do."""

    kind: Literal["planner"] = "planner"
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate for actor and critic")
    starts: int | None = Field(128, ge=1, description="replayed states that imagination starts from; none: all of the batch")
    plan: PlanConfig = PlanConfig()


class PlannerController(DreamerController):
    """Acts by planning; its memory is the plan of the step before, shifted by one."""

    goal: Tensor | None = None
    """Latents [1 Z], or [B Z] of each state, to be reached; None: rewards count."""

    @property
    def uses_actor_critic(self) -> bool:
        """Whether the search uses actor or critic at all."""
        return bool(self.config.plan.proposals or self.config.plan.terminal)

    def estimate(self, feature: Tensor) -> Tensor | None:
        return super().estimate(feature) if self.uses_actor_critic else None  # else the critic was never trained

    def memory(self, world: WorldModel, batch_size: int) -> State:
        config, action = self.config.plan, world.action
        empty = torch.zeros(batch_size, config.horizon, action.dim, device=world.device)
        plan = uniform(action, empty).clone()
        memory = {"plan": plan}
        if config.method == "icem" and config.keep:
            memory["elites"] = PlanDistribution(action, plan, None).mode().unsqueeze(1).repeat(1, config.keep, 1, 1)
        return State(memory)

    def act(
        self, world: WorldModel, state: State, memory: State, deterministic: bool, generator: torch.Generator, rows: Any = None
    ) -> tuple[Tensor, State]:
        config = self.config.plan
        explores = config.bonus and not deterministic
        penalty = -config.bonus if explores else config.uncertainty_penalty
        found = self.search(world, state, memory, generator, penalty, rows)
        distribution = found.distribution
        takes_best = config.method in ("random", "icem")  # the mean may lie between two good candidates
        if deterministic:
            action = (found.best if takes_best else distribution.mode())[:, 0]
        else:
            if takes_best and distribution.std is not None:
                distribution = replace(distribution, center=found.best)
            action = self._draw(distribution, 1, generator)[:, 0, 0]
        shifted = {"plan": torch.cat([found.distribution.center[:, 1:], uniform(world.action, found.best[:, -1:])], 1)}
        if "elites" in memory:
            kept = found.elites[:, : config.keep]
            shifted["elites"] = torch.cat([kept[:, :, 1:], kept[:, :, -1:]], 2)
        return action, State(shifted)

    @torch.no_grad()
    def search(
        self,
        world: WorldModel,
        state: State,
        memory: State,
        generator: torch.Generator,
        uncertainty_penalty: float = 0.0,
        observed: Mapping[str, np.ndarray] | None = None,
    ) -> Plan:
        """The plan for each of the B states; `memory` is what the search begins with.

        What may be done first is what the raw observations say, where they are given and say it; later, what the model expects.
        """
        config, size = self.config.plan, state.batch_size
        needs_ensemble(world, "agent.plan.uncertainty_penalty or agent.plan.bonus", uncertainty_penalty)
        if self.goal is not None and len(self.goal) not in (1, size):
            raise ValueError(f"{len(self.goal)} goals for {size} states: set one for all, or one for each.")
        shooting = config.method == "random"
        legal = legal_actions(world, state, observed)
        start = uniform(world.action, memory["plan"]) if shooting else memory["plan"]
        distribution = PlanDistribution.centered(world.action, start, config.first_std, legal)
        draws = config.rollouts
        rows = state.map(lambda x: x.repeat_interleave(config.samples * draws, 0))  # [B, K, D] in one: D draws of candidate k of b
        kept: tuple[Tensor, Tensor] | None = None  # plans of an iteration before, with their values, which compete again
        for iteration in range(1 if shooting else config.iterations):
            first = iteration == 0
            plans = self._draw(distribution, config.samples, generator)
            if shooting and world.action.kind == "continuous":
                plans = 2 * torch.rand(plans.shape, generator=generator, device=plans.device) - 1
            if first and "elites" in memory:
                plans[:, -config.keep :] = memory["elites"]
            proposals = config.proposals if first else 0
            dream = self._imagine(world, rows, plans, proposals, generator, distribution)
            plans = dream.action.unflatten(0, (size, config.samples, draws))[:, :, 0]
            value = self._value(world, dream, uncertainty_penalty).unflatten(0, (size, config.samples, draws)).mean(2)
            proposed = plans[:, :proposals], value[:, :proposals]
            if kept is not None:
                plans, value = torch.cat([plans, kept[0]], 1), torch.cat([value, kept[1]], 1)
            top = value.topk(config.elites, 1)
            elites = plans.gather(1, top.indices[:, :, None, None].expand(-1, -1, *plans.shape[2:]))
            distribution = distribution.fitted(elites, self._weights(top.values), config, config.first_std)
            if config.method == "icem":
                kept = elites[:, : config.keep], top.values[:, : config.keep]
            elif first and proposals:
                kept = proposed
        return Plan(distribution, elites[:, 0], top.values[:, 0], elites)

    def _draw(self, distribution: PlanDistribution, count: int, generator: torch.Generator) -> Float[Tensor, "B K H A"]:
        size, horizon, _ = distribution.center.shape
        shape = size, count, horizon, distribution.noise_dim
        noise = torch.randn(shape, generator=generator, device=distribution.center.device)
        return distribution.sample(colored_noise(noise, self.config.plan.colour if self.config.plan.method == "icem" else 0.0))

    def _imagine(
        self,
        world: WorldModel,
        rows: State,
        plans: Float[Tensor, "B K H A"],
        proposals: int,
        generator: torch.Generator,
        distribution: PlanDistribution,
    ) -> Dream:
        """Roll-outs of all candidates; the first `proposals` of each state follow the learned policy instead of their plan.

        Without `draws` latents are the transition's mode, so that candidates differ by their actions and not by chance. What a plan
        may not do where its roll-out is, by the mask or what the model expects of it, is drawn anew from the legal part of the
        distribution: candidates are draws of the distribution given that they are legal.
        """
        draws = self.config.plan.rollouts
        flat_plans = plans.flatten(0, 1).repeat_interleave(draws, 0)

        def act(feature: Tensor, step: int) -> Tensor:
            if not proposals and distribution.legal is None:
                return flat_plans[:, step]
            action = plans[:, :, step].clone()
            first = feature.unflatten(0, (*plans.shape[:2], draws))[:, :, 0]  # all draws of a candidate do as its first
            now = distribution.legal
            legal = None if now is None else world.legal(first) if step else now.unsqueeze(1).expand_as(action)
            if legal is not None:
                share = distribution.center[:, step].unsqueeze(1).expand_as(action)
                action = world.action.redraw_illegal(action, legal, generator, share)
            if proposals:
                policy = self.policy(first[:, :proposals], None if legal is None else legal[:, :proposals])
                action[:, :proposals] = world.action.project(policy.sample(generator))
            return action.flatten(0, 1).repeat_interleave(draws, 0)

        sampling = Sampling(generator=generator, mode=not self.config.plan.draws)
        return world.imagine(rows, act, plans.shape[2], sampling)

    def _value(self, world: WorldModel, dream: Dream, uncertainty_penalty: float) -> Float[Tensor, " N"]:
        """The value of each roll-out: rewards less penalties, weighted by the probability of reaching them, discounted.

        Towards a goal: minus squared distances of latents, less penalties, undiscounted. The probability that the episode has
        ended does not lower them, or plans would seek the end. Sobal et al. 2025 (PLDM) and EB-JEPA (arXiv 2602.03604),
        whose ablation has the sum 8 points of success above the last step.
        """
        penalties = reward_penalty(world, dream, uncertainty_penalty, self.config.typicality_penalty)
        if self.goal is not None:
            goal = self.goal.repeat_interleave(len(dream.reward) // len(self.goal), 0).unsqueeze(1)
            distance = (world.dynamics.z_of(dream.feature[:, 1:]) - goal).square().sum(-1)
            distance = distance[:, -1] if self.config.plan.goal == "last" else distance.sum(1)
            return -distance - penalties.sum(1)
        reward, discount = dream.reward - world.heads.scale.value * penalties, self.config.gamma * dream.cont
        if self.config.plan.terminal and self.config.plan.lam < 1:
            return lambda_return(reward, discount, self.value(dream.feature), self.config.plan.lam)[:, 0]
        reached = weights(torch.ones_like(reward[:, 0]), discount)
        value = (reached[:, :-1] * reward).sum(1)
        return value + reached[:, -1] * self.value(dream.feature[:, -1]) if self.config.plan.terminal else value

    def _weights(self, value: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """Weights of the elites in the fit: equal, or with mppi by value, on the scale of their own spread."""
        if self.config.plan.method != "mppi" or value.shape[1] < 2:
            return torch.full_like(value, 1 / value.shape[1])
        std = value.std(1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
        return ((value - value[:, :1]) / (self.config.plan.temperature * std)).softmax(1)


@register("agent", "planner", PlannerConfig)
class Planner(Dreamer):
    """Learns a world model from real steps, and plans in it: at each step a search over imagined futures.

        model = Planner("MlpPolicy", "CartPole-v1").learn(1500)
        evaluate_policy(model, env)

    A policy and a critic learn in imagination as Dreamer's do: the policy proposes candidates, and the critic values what
    follows the horizon. With `agent.plan.proposals=0 agent.plan.terminal=false` there is nothing but the search.
    """

    kind: ClassVar[str] = "planner"

    def _make_controller(self) -> PlannerController:
        plan = self.config.agent.plan
        needs_ensemble(self.world, "agent.plan.uncertainty_penalty", plan.uncertainty_penalty)
        needs_ensemble(self.world, "agent.plan.bonus", plan.bonus)
        needs_marginal(self.world, "agent.typicality_penalty", self.config.agent.typicality_penalty)
        return PlannerController(self.config.agent, self.world.feature_dim, self.action_spec)

    @property
    def improves(self) -> bool:  # type: ignore[override]
        return self.controller.uses_actor_critic

    def set_goal(self, obs: Any | None) -> None:
        """From now on plan towards this observation, by the distance of latents, instead of for reward; None: for reward again.

        A batch of observations gives each of as many environments a goal of its own. The latent is the posterior's mean for
        `obs` alone, as at an episode's first step: exact where the posterior reads nothing else
        (model.dynamics.posterior=observation), else an approximation. Raises EnvError for another space.
        """
        if obs is None:
            self.controller.goal = None
            return
        batched, _ = self.policy.batched(obs)
        self.obs_spec.check(self.obs_spec.to_raw(batched, "the goal"), "the goal")
        self.controller.goal = self.policy.world.encode(batched).mean


def flops(world: WorldModel, controller: PlannerController) -> int:
    """Floating-point operations of one search from one state, as torch counts them (a product and a sum are two)."""
    from torch.utils.flop_counter import FlopCounterMode

    generator = torch.Generator(world.device).manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        controller.search(world, world.initial(1), controller.memory(world, 1), generator)
    return counter.get_total_flops()
