"""Planners: what to do is found anew at each step, by imagining many sequences of actions; as an SB3 algorithm.

| method | candidates | what it does with the best of them |
|---|---|---|
| `random` | uniform, once | takes the best one (random shooting) |
| `cem` | drawn from a law that is fitted to the elites, again and again | takes the law's mean or mode |
| `icem` | the same with coloured noise, elites kept between iterations and, shifted, between steps | takes the best one ever seen |
| `mppi` | as cem, elites weighted by their value | takes the law's weighted mean or mode |

Sources: Rubinstein 1999 (CEM); Pinneri et al. 2020 (iCEM); Williams et al. 2017 (MPPI), with elites, proposals of a learned
policy and a terminal value as in Hansen et al. 2024 (TD-MPC2, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from worldmodel.agents.actor_critic import ActorCriticConfig, weights
from worldmodel.agents.dreamer import Dreamer, DreamerController
from worldmodel.config import Frozen
from worldmodel.data import Dream, Sampling, State
from worldmodel.model import WorldModel, needs_ensemble, needs_marginal, reward_penalty
from worldmodel.registry import register
from worldmodel.spaces import ActionSpec

UNIFORM_SHARE = 0.5
"""Share of the uniform distribution in the first law over categories and bits: what the first deviation is to numbers."""


class PlanConfig(Frozen):
    """The search for one action."""

    method: Literal["random", "cem", "icem", "mppi"] = Field("mppi", description="how candidates are drawn and used")
    horizon: int = Field(4, ge=1, description="imagined steps of each candidate")
    samples: int = Field(32, ge=2, description="candidates of each iteration")
    iterations: int = Field(2, ge=1, description="times that the law is fitted; random shooting draws once")
    elites: int = Field(6, ge=1, description="best candidates that the law is fitted to")
    proposals: int = Field(8, ge=0, description="candidates that the learned policy draws")
    terminal: bool = Field(True, description="the critic's value counts for what comes behind the horizon")
    temperature: float = Field(0.5, gt=0, description="mppi: spread of the weights, in deviations of the elites' values")
    first_std: float = Field(1.0, gt=0, description="deviation of the first law over continuous actions, which are in [-1, 1]")
    min_std: float = Field(0.05, gt=0, description="least deviation of a fitted law; of categories and bits the least share")
    momentum: float = Field(0.1, ge=0, lt=1, description="share of the law before in a fitted one")
    colour: float = Field(2.0, ge=0, description="icem: exponent of the noise's spectrum over time; 0: white")
    keep: int = Field(4, ge=0, description="icem: elites that are kept")
    uncertainty_penalty: float = Field(
        0.0, ge=0, description="taken off each reward, in units of the rewards' own size, per unit of the ensemble's uncertainty"
    )
    bonus: float = Field(0.0, ge=0, description="added instead, while experience is collected: plans that explore")
    goal: Literal["sum", "last"] = Field("sum", description="distance to a goal: summed over the horizon, or at its end alone")

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
    spread  [B H A]  deviations; None for categories and bits
    """

    spec: ActionSpec
    center: Float[Tensor, "B H A"]
    std: Float[Tensor, "B H A"] | None

    @classmethod
    def centered(cls, spec: ActionSpec, center: Float[Tensor, "B H A"], std: float) -> PlanDistribution:
        """A broad law around a plan: where a search begins."""
        if spec.kind == "continuous":
            return cls(spec, center, torch.full_like(center, std))
        return cls(spec, (1 - UNIFORM_SHARE) * center + UNIFORM_SHARE * uniform(spec, center), None)

    def sample(self, noise: Float[Tensor, "B K H G"]) -> Float[Tensor, "B K H A"]:
        """Actions from normal noise, one number for each of the action's numbers, groups or bits."""
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
        """The law of the weighted elites, with some of this one's in it."""
        weight = weight[:, :, None, None]
        center = (weight * elites).sum(1)
        if self.std is None:
            center = torch.lerp(center, self.center, config.momentum)
            return PlanDistribution(self.spec, torch.lerp(center, uniform(self.spec, center), config.min_std), None)
        std = (weight * (elites - center.unsqueeze(1)).square()).sum(1).sqrt()
        center, std = (torch.lerp(new, old, config.momentum) for new, old in ((center, self.center), (std, self.std)))
        return PlanDistribution(self.spec, center, std.clamp(config.min_std, max_std))


def uniform(spec: ActionSpec, like: Tensor) -> Tensor:
    """The centre [..., A] of a law that knows nothing: 0 for numbers, equal shares for categories, a half for bits."""
    if spec.kind == "continuous":
        return torch.zeros_like(like)
    share = [0.5] * spec.dim if spec.kind == "binary" else [1 / n for n in spec.sizes for _ in range(n)]
    return like.new_tensor(share).expand_as(like)


def colored_noise(white: Float[Tensor, "B K H G"], exponent: float) -> Float[Tensor, "B K H G"]:
    """Normal noise of unit variance whose power falls with frequency f as f^-exponent along time; 0: as it came.

    Source: Timmer and Koenig 1995; Pinneri et al. 2020 (iCEM), section 3.1.
    """
    steps = white.shape[2]
    if not exponent or steps < 2:
        return white
    frequency = torch.fft.rfftfreq(steps, device=white.device).clamp_min(1 / steps)
    gain = frequency.pow(-exponent / 2)
    multiplicity = torch.full_like(
        gain, 2.0
    )  # a real signal's spectrum holds each frequency twice but the first and, if even, the last
    multiplicity[0] = 1.0
    if steps % 2 == 0:
        multiplicity[-1] = 1.0
    gain = gain / ((multiplicity * gain.square()).sum() / steps).sqrt()
    return torch.fft.irfft(torch.fft.rfft(white, dim=2) * gain[:, None], n=steps, dim=2)


@dataclass(frozen=True)
class Plan:
    """What a search found for each of B states.

    law     PlanLaw        of all H actions, fitted to the last elites
    best    [B H A]        the candidate of the highest value
    value   [B]            that value: imagined return, with the critic's value behind the horizon
    elites  [B E H A]      the best candidates, best first
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
    """Codes [1 Z], or [B Z] of each state, to be reached; None: rewards count."""

    @property
    def uses_actor_critic(self) -> bool:
        """Whether the search uses actor or critic at all."""
        return bool(self.config.plan.proposals or self.config.plan.terminal)

    def estimate(self, feature: Tensor) -> Tensor | None:
        return super().estimate(feature) if self.uses_actor_critic else None  # a critic that never learns knows nothing

    def memory(self, world: WorldModel, batch_size: int) -> State:
        plan, dim, device = self.config.plan, world.action.dim, world.device
        empty = torch.zeros(batch_size, plan.horizon, dim, device=device)
        memory = {"plan": uniform(world.action, empty).clone()}
        if plan.method == "icem" and plan.keep:
            start = PlanDistribution(
                world.action, memory["plan"], torch.ones_like(empty) if world.action.kind == "continuous" else None
            )
            memory["elites"] = start.mode().unsqueeze(1).repeat(1, plan.keep, 1, 1)
        return State(memory)

    def act(
        self, world: WorldModel, state: State, memory: State, deterministic: bool, generator: torch.Generator, rows: Any = None
    ) -> tuple[Tensor, State]:
        config = self.config.plan
        found = self.search(
            world, state, memory, generator, config.uncertainty_penalty if deterministic or not config.bonus else -config.bonus
        )
        single = config.method in ("random", "icem")  # these take one candidate: a law's mean may lie between two good ones
        if deterministic:
            action = (found.best if single else found.distribution.mode())[:, 0]
        else:
            centered = (
                replace(found.distribution, center=found.best)
                if single and found.distribution.std is not None
                else found.distribution
            )
            action = centered.sample(self._noise(centered, 1, generator))[:, 0, 0]
        last = uniform(world.action, found.best[:, -1:])
        next_memory = {"plan": torch.cat([found.distribution.center[:, 1:], last], 1)}
        if "elites" in memory:
            kept = found.elites[:, : config.keep]
            next_memory["elites"] = torch.cat([kept[:, :, 1:], kept[:, :, -1:]], 2)
        return action, State(next_memory)

    @torch.no_grad()
    def search(
        self, world: WorldModel, state: State, memory: State, generator: torch.Generator, uncertainty_penalty: float = 0.0
    ) -> Plan:
        """The plan for each of the B states; `memory` is what the search begins with, `penalty` weighs uncertainty."""
        config, spec = self.config.plan, world.action
        needs_ensemble(world, "agent.plan.uncertainty_penalty or agent.plan.bonus", uncertainty_penalty)
        if self.goal is not None and len(self.goal) not in (1, state.batch_size):
            raise ValueError(f"{len(self.goal)} goals for {state.batch_size} states: set one for all, or one for each.")
        shooting = config.method == "random"
        start = uniform(spec, memory["plan"]) if shooting else memory["plan"]
        distribution = PlanDistribution.centered(spec, start, config.first_std)
        size = state.batch_size
        rows = state.map(lambda x: x.repeat_interleave(config.samples, 0))  # candidate k of state b is row b * samples + k
        pool: tuple[Tensor, Tensor] | None = None
        for iteration in range(1 if shooting else config.iterations):
            plans = distribution.sample(self._noise(distribution, config.samples, generator))
            if shooting and spec.kind == "continuous":
                plans = 2 * torch.rand(plans.shape, generator=generator, device=plans.device) - 1
            first = iteration == 0
            if first and "elites" in memory:
                plans[:, -config.keep :] = memory["elites"]
            drawn = config.proposals if first else 0
            dream = self._imagine(world, rows, plans, drawn, generator)
            plans = dream.action.unflatten(0, (size, config.samples))
            value = self._value(world, dream, uncertainty_penalty).unflatten(0, (size, config.samples))
            policy_candidates = plans[:, :drawn], value[:, :drawn]
            if pool is not None:
                plans, value = torch.cat([plans, pool[0]], 1), torch.cat([value, pool[1]], 1)
            top = value.topk(config.elites, 1)
            elites = plans.gather(1, top.indices[:, :, None, None].expand(-1, -1, *plans.shape[2:]))
            distribution = distribution.fitted(elites, self._weights(top.values), config, config.first_std)
            if config.method == "icem":
                pool = elites[:, : config.keep], top.values[:, : config.keep]
            elif first and drawn:
                pool = policy_candidates
        return Plan(distribution, elites[:, 0], top.values[:, 0], elites)

    def _noise(self, distribution: PlanDistribution, count: int, generator: torch.Generator) -> Tensor:
        """Normal noise [B, count, H, G]."""
        parts = len(distribution.spec.sizes) if distribution.spec.kind == "categorical" else distribution.spec.dim
        shape = distribution.center.shape[0], count, distribution.center.shape[1], parts
        white = torch.randn(shape, generator=generator, device=distribution.center.device)
        return colored_noise(white, self.config.plan.colour) if self.config.plan.method == "icem" else white

    def _imagine(self, world: WorldModel, rows: State, plans: Tensor, proposals: int, generator: torch.Generator) -> Dream:
        """Roll-outs of all candidates; the first `proposals` of each state follow the learned policy instead of their plan.

        They follow the transition's mode, so that candidates differ by what they do and not by luck.
        """
        flat_plans = plans.flatten(0, 1)

        def act(feature: Tensor, step: int) -> Tensor:
            if not proposals:
                return flat_plans[:, step]
            action = plans[:, :, step].clone()
            seen = feature.unflatten(0, plans.shape[:2])[:, :proposals]
            action[:, :proposals] = world.action.project(self.policy(seen).sample(generator))
            return action.flatten(0, 1)

        return world.imagine(rows, act, plans.shape[2], Sampling(generator=generator, mode=True))

    def _value(self, world: WorldModel, dream: Dream, uncertainty_penalty: float) -> Float[Tensor, " N"]:
        """What each roll-out is worth: rewards less their doubt, each for as much as it is likely to be reached, discounted.

        Towards a goal: the squared distances of codes, less the doubt, undiscounted. The chance that the world has ended
        does not lower them, or plans would seek the end. Sobal et al. 2025 (PLDM) and EB-JEPA (arXiv 2602.03604), whose
        ablation has the sum 8 points of success above the last step.
        """
        penalties = reward_penalty(world, dream, uncertainty_penalty, self.config.typicality_penalty)
        if self.goal is not None:
            goal = self.goal.repeat_interleave(len(dream.reward) // len(self.goal), 0).unsqueeze(1)
            distance = (world.dynamics.z_of(dream.feature[:, 1:]) - goal).square().sum(-1)
            distance = distance[:, -1] if self.config.plan.goal == "last" else distance.sum(1)
            return -distance - penalties.sum(1)
        weight = weights(torch.ones_like(dream.reward[:, 0]), self.config.gamma * dream.cont)
        value = (weight[:, :-1] * (dream.reward - world.heads.scale.value * penalties)).sum(1)
        return value + weight[:, -1] * self.value(dream.feature[:, -1]) if self.config.plan.terminal else value

    def _weights(self, value: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """Of the elites in the fit: equal, or with mppi by value, on the scale of their own spread."""
        if self.config.plan.method != "mppi" or value.shape[1] < 2:
            return torch.full_like(value, 1 / value.shape[1])
        std = value.std(1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
        return ((value - value[:, :1]) / (self.config.plan.temperature * std)).softmax(1)


@register("agent", "planner", PlannerConfig)
class Planner(Dreamer):
    """Learns a world model from real steps, and plans in it: at each step a search over imagined futures.

        model = Planner("MlpPolicy", "CartPole-v1").learn(1500)
        evaluate_policy(model, env)

    A policy and a critic learn in imagination as Dreamer's do: they propose candidates, and the critic tells what comes
    behind the horizon. With `agent.plan.proposals=0 agent.plan.terminal=false` there is nothing but the search.
    """

    kind: ClassVar[str] = "planner"

    def _make_controller(self) -> PlannerController:
        plan = self.config.agent.plan
        needs_ensemble(self.world, "agent.plan.uncertainty_penalty", plan.uncertainty_penalty)
        needs_ensemble(self.world, "agent.plan.bonus", plan.bonus)
        needs_marginal(self.world, "agent.typicality_penalty", self.config.agent.typicality_penalty)
        return PlannerController(self.config.agent, self.world.feature_dim, self.action_spec)

    @property
    def improves(self) -> bool:
        return self.controller.uses_actor_critic

    def set_goal(self, obs: Any | None) -> None:
        """From now on plan towards this observation, by the distance of codes, instead of for reward; None: for reward again.

        A batch of observations gives each of as many environments a goal of its own. The code is the mean belief about `obs`
        alone, as at an episode's first step: exact where the posterior looks at nothing else
        (model.dynamics.posterior=observation), else near it. Raises EnvError for another space.
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
