"""Models and data that are right, slightly wrong and broken in one way: what a diagnosis reads of the three of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import gymnasium as gym
import pytest
import torch
from conftest import generator, small, small_world
from test_bounds import noisy
from test_decisions import PredictingAgent, agent_of, chain_world
from test_exploitation import verdict
from test_fidelity_section import evidence_of as evidence_of_process
from test_fidelity_section import known_world
from test_holes import of_pictures, spoilt, squares, wide
from test_prior_section import gaussian, normal, rows
from test_probe import found as probed_squares
from test_probe import going_round
from test_smoothness import cliff, drawing_wide, with_decoder
from test_usage import KINDS, changed, circling, evidence_of, learned, world_of
from torch import Tensor

from worldmodel.agents import exploitation
from worldmodel.agents.decisions import Decisions, decisions
from worldmodel.agents.exploitation import correlation_by_step, missed, spearman
from worldmodel.agents.random import RandomController
from worldmodel.data import Episodes
from worldmodel.diagnostics import fidelity
from worldmodel.diagnostics import holes as holes_of_priors
from worldmodel.diagnostics import smoothness as slopes
from worldmodel.diagnostics.bounds import likelihood
from worldmodel.diagnostics.calibration import SAMPLES, draw_scores
from worldmodel.diagnostics.evidence import Evidence, Figure, resampled
from worldmodel.diagnostics.fidelity import _calibrated, _draws, _next, rollouts
from worldmodel.diagnostics.geometry import filter_episodes, usage
from worldmodel.diagnostics.holes import holes
from worldmodel.diagnostics.prior import compare
from worldmodel.diagnostics.probe import States
from worldmodel.diagnostics.smoothness import smoothness
from worldmodel.diagnostics.usage import latents
from worldmodel.distributions import CategoricalPosterior, GaussianPosterior
from worldmodel.envs.make import EnvConfig
from worldmodel.envs.tiny import Chain

Figures = dict[str, Figure]
PLANTED: dict[str, Callable[[], list[Figures]]] = {}
"""{what goes wrong: the figures of the right, the slightly wrong and the broken version}."""


def fewer_resamples(patch: pytest.MonkeyPatch) -> None:
    """Intervals of figures that are no means cost most of a section's time."""
    for module in (fidelity, holes_of_priors, slopes, exploitation):
        patch.setattr(module, "resampled", partial(resampled, resamples=100))


def planted(function: Callable[[], list[Figures]]) -> Callable[[], list[Figures]]:
    """Names what a function plants after it, and computes it once, with intervals of fewer resamples."""

    @cache
    def found() -> list[Figures]:
        with pytest.MonkeyPatch.context() as patch:
            fewer_resamples(patch)
            return function()

    PLANTED[function.__name__.replace("_", " ")] = found
    return function


# Roll-outs ----------------------------------------------------------------------------------------------------------------


@planted
def dreams_run_away() -> list[Figures]:
    """The model forgets less than the process does, and then nothing at all."""
    return [rollouts(evidence_of_process(known_world(keeps=keeps)), updates=0).figures for keeps in (0.9, 1.0, 1.2)]


@planted
def draws_are_too_sure() -> list[Figures]:
    return [_draws(evidence_of_process(known_world(noise=noise)), 5, 15).figures for noise in (0.3, 0.18, 0.05)]


@planted
def draws_are_too_wide() -> list[Figures]:
    return [_draws(evidence_of_process(known_world(noise=noise)), 5, 15).figures for noise in (0.3, 0.45, 1.2)]


@planted
def spread_means_nothing() -> list[Figures]:
    """The spread of all starts, of half of them, and of none is that of their error; it has the right size on average."""
    rng, starts = generator(2), 1000
    size = (torch.randn(starts, 1, generator=rng) / 2).exp()
    error, noise = size * torch.randn(starts, 1, generator=rng), torch.randn(starts, SAMPLES, 1, 1, generator=rng)
    found = []
    for wrong in (0, starts // 2, starts):
        spread = torch.cat([size[:wrong][torch.randperm(wrong, generator=generator(3))], size[wrong:]])
        scores, square, variance = (x[:, 0] for x in draw_scores(spread[:, None, None] * noise - error[:, None, None]))
        found.append(_calibrated(scores, square, variance, {}, 1, torch.arange(starts) // 20))
    return found


@planted
def rewards_and_ends_are_wrong() -> list[Figures]:
    faults = {}, {"bias": 0.3, "gain": 1.5, "doubt": 0.15}, {"bias": 1.0, "gain": 3.0, "doubt": 0.4}
    return [_next(evidence_of_process(known_world(**fault)), 5).figures for fault in faults]


# Priors -------------------------------------------------------------------------------------------------------------------


def compared_prior(mean: float, count: int) -> Figures:
    """Draws of N(mean, 1) beside latents of N(0, 1)."""
    form = gaussian(mean)
    return compare(form, rows(normal(count, 1), form, 4), generator(), "marginal").figures


@planted
def the_prior_is_off() -> list[Figures]:
    return [compared_prior(mean, 400) for mean in (0.0, 0.15, 1.0)]


@planted
def rows_to_compare_are_few() -> list[Figures]:
    return [compared_prior(0.0, count) for count in (300, 120, 40)]


# Latents ------------------------------------------------------------------------------------------------------------------


def collapsed(numbers: Sequence[int]) -> Evidence:
    """Of a world that has learned, some of whose latent numbers are those that its transition expects, always the same."""
    world = copy.deepcopy(learned().world)
    for latent in {id(x): x for x in (world.dynamics.latent, world.dynamics.transition.latent)}.values():
        distribution, dead = latent.distribution, [*numbers, *(latent.size + i for i in numbers)]

        def bare(raw: Tensor, distribution: Any = distribution, dead: list[int] = dead) -> Any:
            return distribution(raw.index_fill(-1, torch.tensor(dead, dtype=torch.int64), 0.0))

        object.__setattr__(latent, "distribution", bare)
    return evidence_of(world)


@planted
def latents_collapse() -> list[Figures]:
    """One number after the other, the one with the larger KL first."""
    order = usage(learned().world, learned().test).argsort(descending=True).tolist()
    return [latents(collapsed(order[:count])).figures for count in range(3)]


@planted
def latents_are_expected() -> list[Figures]:
    """The posterior comes nearer to the transition, and is the same."""
    evidence, found = learned(), []
    own, prior = evidence.test.posterior, evidence.world.dynamics.transition.given(evidence.test.h)
    for share in (0.0, 0.3, 1.0):
        nearer = GaussianPosterior(*(torch.lerp(getattr(own, x), getattr(prior, x).detach(), share) for x in ("mean", "std")))
        found.append(latents(changed(evidence, posterior=nearer)).figures)
    return found


@planted
def classes_die() -> list[Figures]:
    """Of three classes of each variable two, one and none are in use beside the first."""
    evidence, found = evidence_of(*world_of("categorical")), []
    for used in (3, 2, 1):
        probs = evidence.test.posterior.probs.clone()
        probs[..., used:] = 0
        found.append(latents(changed(evidence, posterior=CategoricalPosterior(probs / probs.sum(-1, keepdim=True)))).figures)
    return found


@planted
def rows_that_tell_are_few() -> list[Figures]:
    return [latents(learned(), count).figures for count in (240, 60, 20)]


# Holes and slopes -----------------------------------------------------------------------------------------------------------


@cache
def long() -> Evidence:
    """Of a trained world, with episodes that have room for dreams."""
    return evidence_of(learned().world, count=10, length=60)


@planted
def the_transition_draws_too_wide() -> list[Figures]:
    return [holes(spoilt(long(), wide(share)), "transition").figures for share in (0.0, 1.0, 6.0)]


@planted
def the_transition_draws_too_little() -> list[Figures]:
    """Its draws shrink to the middle of all latents."""
    return [holes(drawing_wide(long(), share), "transition").figures for share in (1.0, 0.95, 0.05)]


@planted
def draws_lie_on_cliffs() -> list[Figures]:
    return [smoothness(drawing_wide(with_decoder(learned(), cliff), share), "transition").figures for share in (1.0, 2.5, 12.0)]


# Pictures -------------------------------------------------------------------------------------------------------------------


@planted
def draws_show_other_pictures() -> list[Figures]:
    """Of squares that are nearer to the middle than any real one."""
    given = inspect.unwrap(squares)()
    return [of_pictures(given, lambda z, share=share: share * z).figures for share in (1.0, 0.9, 0.4)]


@cache
def round_trip() -> tuple[Evidence, States]:
    """Pictures of a square on a circle, and where it is."""
    return inspect.unwrap(going_round)()


def probed_of(evidence: Evidence, states: States, noise: float = 0.0, drawn: float = 1.0) -> Figures:
    """Of dreams that are `noise` off in each step, and draws `drawn` times as far from the middle."""
    with pytest.MonkeyPatch.context() as patch:
        return probed_squares((evidence, states), patch, noise, drawn, jumps=True).figures


@planted
def dreams_lose_the_state() -> list[Figures]:
    return [probed_of(*round_trip(), noise, drawn) for noise, drawn in ((0.0, 1.0), (0.15, 0.8), (0.6, 0.6))]


@planted
def pictures_are_noisy() -> list[Figures]:
    (evidence, states), rows = round_trip(), round_trip()[0].episodes.rows
    noise, found = torch.rand(rows.obs["obs"].shape, generator=generator()), []
    for size in (0, 100, 250):
        pixels = (rows.obs["obs"] + size * noise).clamp(0, 255).to(torch.uint8)
        found.append(probed_of(replace(evidence, episodes=Episodes(rows.with_obs({"obs": pixels}))), states))
    return found


@planted
def pictures_show_fewer_numbers() -> list[Figures]:
    """Of three numbers that pictures show one, and another, are in truth drawn at random."""
    evidence, states = round_trip()
    east, north, hidden = states.numbers.unbind(1)
    columns = [east, north, east - north], [east, north, hidden], [east, hidden, hidden]
    return [probed_of(evidence, States(torch.stack(x, 1), ("a", "b", "c"))) for x in columns]


# Likelihoods ----------------------------------------------------------------------------------------------------------------


def worse_part(evidence: Evidence, part: str, sizes: Sequence[float], draws: int) -> list[Figures]:
    """Noise of some sizes on the weights of a part."""
    world = evidence.world
    module = {"transition": world.dynamics.transition, "decoder": world.decoder}[part]
    return [likelihood(replace(evidence, world=noisy(world, module, size)), draws).figures for size in sizes]


@planted
def the_transition_expects_less() -> list[Figures]:
    return worse_part(learned(), "transition", (0.0, 0.15, 0.5), 50)


@planted
def the_decoder_is_worse() -> list[Figures]:
    return worse_part(learned(), "decoder", (0.0, 0.15, 0.5), 50)


@planted
def pictures_are_worse() -> list[Figures]:
    """Of pixels at random, by a decoder of levels from 0 to 255."""
    observation, parts = KINDS["pictures"]
    world = small_world(observation, **parts, decoder=small("decoder", "standard", image="logistic")).eval()
    rows = circling(observation, 2, 6).rows
    pixels = {name: torch.randint(256, x.shape, generator=generator()).to(x) for name, x in rows.obs.items()}
    episodes = Episodes(rows.with_obs(pixels))
    seen = filter_episodes(world, episodes)
    return worse_part(Evidence(world, "runs/some", seen, seen, seen, episodes), "decoder", (0.0, 0.1, 1.0), 4)


# Dreams that flatter --------------------------------------------------------------------------------------------------------


@planted
def rewards_are_raised() -> list[Figures]:
    """Where the model has never been: a stranger and the agent itself come there."""
    found = [verdict(raised, 0).figures for raised in (0.0, 0.5, 1.0)]
    return [{name: figure for name, figure in figures.items() if not name.startswith("random")} for figures in found]


@planted
def uncertainty_guesses() -> list[Figures]:
    """It is the error, the error and as much noise, and noise alone."""
    found, rng = [], generator()
    error, noise = torch.rand(2, 300, 10, generator=rng)
    inside = torch.ones(300, 10, dtype=torch.bool)
    for share in (0.0, 0.5, 1.0):
        unsure = (1 - share) * error + share * noise
        flat, said = error.flatten(), unsure.flatten()
        found.append(
            {
                "uncertainty rank correlation": Figure(spearman(flat, said)),
                "uncertainty rank correlation by step": Figure(correlation_by_step(error, unsure, inside)),
                "worst errors missed": Figure(missed(flat, said, 0.1)),
                "worst errors in the lower half": Figure(missed(flat, said, 0.5)),
            }
        )
    return found


# Decisions ------------------------------------------------------------------------------------------------------------------


def decided(noise: float = 0.0, equal: float = 0.0, tied: int = 1) -> Figures:
    """Returns of five plans and as imagined, with noise; a share of states whose plans are equal, and some best ones in each."""
    real = torch.randn(400, 5, generator=generator()).double()
    real[:, :tied] = 4.0
    real[: int(equal * 400)] = 4.0
    imagined = real + noise * torch.randn(400, 5, generator=generator(1)).double()
    return Decisions(real, imagined, torch.arange(400) // 10).figures()


@planted
def plans_are_judged_by_chance() -> list[Figures]:
    return [decided(noise) for noise in (0.0, 2.0, 50.0)]


@planted
def plans_are_equal() -> list[Figures]:
    return [decided(equal=share) for share in (0.0, 0.3, 0.8)]


@planted
def several_plans_are_best() -> list[Figures]:
    return [decided(tied=count) for count in (1, 2, 4)]


class CostlyChain(Chain):
    """A chain whose every step costs something more."""

    def __init__(self, cost: float = 0.0, length: int = 7, limit: int = 200):
        super().__init__(length, limit)
        self.cost = cost

    def step(self, action: Any) -> tuple:
        obs, reward, *rest = super().step(action)
        return obs, reward - self.cost, *rest


gym.register("CostlyChain-v0", entry_point=CostlyChain)


class Pushes(RandomController):
    """Goes to the right with some probability."""

    def __init__(self, right: float):
        super().__init__()
        self.right = right

    def act(self, world: Any, state: Any, memory: Any, deterministic: bool, generator: Any, rows: Any = None) -> tuple:
        right = (torch.rand(state.batch_size, 1, generator=generator) < self.right).float()
        return torch.cat([1 - right, right], 1), memory


def planned(cost: float = 0.0, right: float = 1.0, **world: float) -> Figures:
    """Planning in both worlds and the agent beside, in a chain with a cost, whose model may be wrong."""
    env = EnvConfig(id="CostlyChain-v0", kwargs={"cost": cost})
    evidence = Evidence(chain_world(**world), "runs/some", None, None, None, None)
    agent = PredictingAgent(agent_of(evidence.world, Pushes(right)))
    return decisions(agent, env, evidence, episodes=2, horizon=4, plan_episodes=3, plan_steps=8).figures


@planted
def steps_cost() -> list[Figures]:
    return [planned(cost) for cost in (0.0, 0.1, 1.0)]


@planted
def the_model_misleads_planning() -> list[Figures]:
    return [planned(noise=noise, sign=sign) for noise, sign in ((0.0, 1.0), (2.0, 1.0), (0.0, -1.0))]


@planted
def the_agent_acts_worse() -> list[Figures]:
    return [planned(right=right) for right in (1.0, 0.6, 0.0)]
