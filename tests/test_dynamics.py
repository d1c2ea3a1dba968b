"""What holds for every registered dynamics, whatever its posterior reads and whatever its latents are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, get_args

import pytest
import torch
from conftest import assert_near, flagged, generator, known_batch, reached, small, small_world
from torch import Tensor

from worldmodel import registry
from worldmodel.data import Sampling, State, Trace
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, ScaleConfig, TrainConfig
from worldmodel.model import ModelConfig, WorldModel

LATENTS = registry.kinds("latent")


class Roll(NamedTuple):
    """A dynamics, what its posterior reads, a kind of latent, with or without a slow level."""

    dynamics: str
    posterior: str
    latent: str
    clocks: str = "one clock"

    def part(self) -> dict[str, object]:
        """The dynamics in a config; latents that are observations have no options."""
        fields = registry.config_class("dynamics", self.dynamics).model_fields
        return {"kind": self.dynamics, **({"latent": small("latent", self.latent)} if "latent" in fields else {})}

    def world(self, **options) -> WorldModel:
        """A world model in eval mode whose random parameters are large enough for every distribution to count."""
        own = {} if self.posterior == "own" else {"posterior": self.posterior}
        own |= {"slow": 5} if self.clocks == "two clocks" else {}
        parts = {name: options.pop(name) for name in ("marginal",) if name in options}
        world = small_world(latent=self.latent, dynamics={**self.part(), **own, **options}, **parts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for p in world.parameters():
                p.data += 0.1 * torch.randn(p.shape)
        return world.eval()


def rolls() -> Iterator[Roll]:
    """All but `diamond`, whose latents are pictures: see tests/test_diamond.py."""
    for kind in registry.kinds("dynamics"):
        if kind == "diamond":
            continue
        fields = registry.config_class("dynamics", kind).model_fields
        posteriors = get_args(fields["posterior"].annotation) if "posterior" in fields else ["own"]
        for posterior, latent in itertools.product(posteriors, LATENTS if "latent" in fields else ["gaussian"]):
            yield Roll(kind, posterior, latent)
            if "slow" in fields:
                yield Roll(kind, posterior, latent, "two clocks")


ROLLS = list(rolls())
every_dynamics = pytest.mark.parametrize("roll", ROLLS, ids="-".join)
every_stochastic = pytest.mark.parametrize("roll", [r for r in ROLLS if r.latent != "point"], ids="-".join)

B, T = 3, 6


class Inputs(NamedTuple):
    """What `observe` is given, with a reset at t = 0 and t = 3 of row 0 and at t = 4 of row 1, and noise for every draw."""

    embed: Tensor
    prev_action: Tensor
    is_first: Tensor
    noise: Tensor

    @classmethod
    def random(cls, world, seed: int = 0) -> Inputs:
        batch, g = known_batch(seed=seed), generator(seed)
        embed = torch.randn(B, T, world.encoder.out_features, generator=g)
        return cls(embed, batch.prev_action, batch.is_first, world.dynamics.latent.noise((B, T), g, "cpu"))

    def part(self, start: int, stop: int) -> Inputs:
        return Inputs(*(x[:, start:stop] for x in self))

    def rows(self, rows) -> Inputs:
        return Inputs(*(x[rows] for x in self))


def start_state(world, seed: int = 7) -> State:
    """A state as if something had been seen before."""
    state = world.initial(B).map(lambda x: torch.randn(x.shape, generator=generator(seed)))
    flags = {"known": torch.ones(B, 1), "member": torch.zeros(B, 1)}
    return State({name: flags.get(name, x) for name, x in state.items()})


@torch.no_grad()
def observe(world, state: State, inputs: Inputs, mode: bool = False) -> tuple[State, Trace]:
    sampling = Sampling(mode=True) if mode else Sampling(noise=inputs.noise)
    return world.dynamics.observe(state, inputs.embed, inputs.prev_action, inputs.is_first, sampling)


def rates(world, trace: Trace, is_first: Tensor) -> dict[str, Tensor]:
    """The two sides of the rate, by name; nothing for point latents, which have none."""
    losses = world.dynamics.losses(trace, flagged(is_first), Sampling(generator=generator()))
    return {name: losses[name].value for name in ("dyn", "rep") if name in losses}


def numbers(trace: Trace) -> dict[str, Tensor]:
    """Every tensor of a trace, by name, each [B, T, ...]; dicts are walked, for beartype checks one value only."""
    parameters: list[Tensor] = []
    trace.posterior.map(lambda x: parameters.append(x) or x)
    named = {"embed": trace.embed, "z": trace.z, "h": trace.h, "feature": trace.feature}
    named |= {f"posterior {i}": x for i, x in enumerate(parameters)}
    return named | {f"state {name}": x for name, x in trace.states.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Within `tolerance`, of one or of the number itself where numbers are large, as rates in nats are."""
    assert one.keys() == other.keys()
    for name in one:
        near = {"rtol": tolerance, "atol": tolerance, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(one[name], other[name], **near)


@every_dynamics
def test_a_trace_has_the_shapes_that_it_promises(roll):
    world = roll.world()
    state, trace = observe(world, start_state(world), Inputs.random(world))
    size = world.dynamics.latent.size
    assert trace.z.shape == trace.posterior.mean.shape == (B, T, size)
    assert trace.feature.shape == (B, T, world.feature_dim) == (*trace.h.shape[:2], world.dynamics.feature_dim)
    sides = rates(world, trace, Inputs.random(world).is_first)
    expected = {"dyn"} if roll.dynamics == "anchored" else {"dyn", "rep"}  # an observed number has no posterior to be trained
    assert set(sides) == (set() if world.dynamics.latent.deterministic else expected)
    assert all(x.shape == (B, T) for x in sides.values())
    assert all(x.shape[:2] == (B, T) and x.dtype == torch.float32 for x in numbers(trace).values())
    assert all(torch.equal(state[name], trace.states[name][:, -1]) for name in state)
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in world.initial(B).items()}
    assert world.dynamics.feature(state).shape == (B, world.feature_dim)
    assert torch.equal(world.dynamics.feature(state), trace.feature[:, -1])


@every_dynamics
@pytest.mark.parametrize("mode", [True, False], ids=["mode", "noise"])
def test_filter_equals_sequence(roll, mode):
    world = roll.world()
    inputs, state = Inputs.random(world), start_state(world)
    whole_state, whole = observe(world, state, inputs, mode)
    steps = []
    for t in range(T):
        state, trace = observe(world, state, inputs.part(t, t + 1), mode)
        steps.append(numbers(trace))
    assert_equal({name: torch.cat([step[name] for step in steps], 1) for name in steps[0]}, numbers(whole))
    assert_equal(dict(state), dict(whole_state))


@every_dynamics
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_window_split_in_two_is_continued(roll, cut):
    world = roll.world()
    inputs, state = Inputs.random(world), start_state(world)
    _, whole = observe(world, state, inputs)
    between, before = observe(world, state, inputs.part(0, cut))
    assert_equal(dict(between), dict(before.last))
    _, after = observe(world, between, inputs.part(cut, T))
    halves = numbers(before), numbers(after)
    assert_equal({name: torch.cat([half[name] for half in halves], 1) for name in halves[0]}, numbers(whole))


@every_dynamics
@pytest.mark.parametrize("mode", [True, False], ids=["mode", "noise"])
def test_a_reset_forgets_the_past(roll, mode):
    world = roll.world()
    one, other = Inputs.random(world, seed=0), Inputs.random(world, seed=1)
    past = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)  # before the last reset
    mixed = Inputs(*(torch.where(past.view(B, T, *[1] * (a.ndim - 2)), b, a) for a, b in zip(one, other)))
    mixed = mixed._replace(is_first=one.is_first)
    first, second = ({}, {})
    for found, seed, x in ((first, 7, one), (second, 8, mixed)):
        _, trace = observe(world, start_state(world, seed), x, mode)
        rows = trace.states.map(lambda y: y.flatten(0, 1))
        after = world.dynamics.imagine(rows, x.prev_action.flatten(0, 1), Sampling(mode=True))
        found |= {name: y for name, y in numbers(trace).items() if not name.startswith("state ")}
        found |= {f"after {name}": after[name].detach().unflatten(0, (B, T)) for name in ("h", "z")}
    assert_equal({k: x[:2][~past[:2]] for k, x in first.items()}, {k: x[:2][~past[:2]] for k, x in second.items()}, 0)
    assert (first["h"][2] - second["h"][2]).abs().max() > 1e-3  # where nothing resets, the state counts


@every_dynamics
def test_rows_do_not_mix_in_eval_mode(roll):
    world = roll.world()
    inputs, state, rows = Inputs.random(world), start_state(world), torch.tensor([2, 0])
    together = numbers(observe(world, state, inputs)[1])
    apart = numbers(observe(world, state.index(rows), inputs.rows(rows))[1])
    assert_equal({name: x[rows] for name, x in together.items()}, apart)


@every_dynamics
def test_imagination_takes_the_same_step_as_observation(roll):
    """h does not know the observation: from one state and action it is the same with and without one."""
    world = roll.world()
    inputs, state = Inputs.random(world).part(1, 3), start_state(world)
    last, trace = observe(world, state, inputs.part(0, 1))
    _, seen = observe(world, last, inputs.part(1, 2))
    dreamt = world.dynamics.imagine(last, inputs.prev_action[:, 1], Sampling(mode=True))
    torch.testing.assert_close(dreamt["h"], seen.h[:, 0])
    assert torch.equal(dreamt["z"], world.dynamics.transition.sample(dreamt["h"], 1, Sampling(mode=True))[0])
    assert trace.h.shape == (B, 1, world.dynamics.h_dim)


@every_dynamics
def test_the_same_seed_gives_the_same_bits(roll):
    world, before = roll.world(), torch.get_rng_state()
    inputs, state = Inputs.random(world), start_state(world)
    runs = []
    for seed in (4, 4, 5):
        sampling = Sampling(generator=generator(seed))
        with torch.no_grad():
            _, trace = world.dynamics.observe(state, inputs.embed, inputs.prev_action, inputs.is_first, sampling)
            dreamt = world.dynamics.imagine(trace.last, inputs.prev_action[:, 0], sampling)
        runs.append(numbers(trace) | dict(dreamt))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    no_draw = world.dynamics.latent.deterministic or not inputs.noise.numel()  # as where all of a latent is observed
    assert torch.equal(runs[0]["feature"], runs[2]["feature"]) == no_draw
    assert torch.equal(torch.get_rng_state(), before)
    twins = [torch.cat([p.flatten() for p in roll.world().parameters()]) for _ in range(2)]
    assert torch.equal(*twins)


@every_dynamics
def test_a_beginning_is_drawn_from_the_initial_distribution(roll):
    world, n = roll.world(), 4000
    with torch.no_grad():
        state = world.dynamics.sample_initial(n, Sampling(generator=generator()))
        again = world.dynamics.sample_initial(n, Sampling(generator=generator()))
        _, trace = observe(world, start_state(world), Inputs.random(world).part(0, 1))
        mean = world.dynamics.initial_prior.sample(None, 20_000, Sampling(generator=generator(1))).mean((0, 1))
    assert_equal(dict(state), dict(again), 0)
    assert_near(state["z"].mean(0), mean, n, state["z"].std(0))
    torch.testing.assert_close(state["h"], trace.h[:1, 0].expand(n, -1))  # row 0 begins an episode there


@every_stochastic
def test_rates_of_first_rows_come_from_the_initial_distribution_and_others_from_the_transition(roll):
    world = roll.world()
    inputs = Inputs.random(world)
    _, trace = observe(world, start_state(world), inputs)
    first, prior = inputs.is_first, world.dynamics.initial_prior
    with torch.no_grad():
        begun = prior.rate(trace.posterior.index(first), trace.z[first], None)
        moved = world.dynamics.transition.rate(trace.posterior.index(~first), trace.z[~first], trace.h[~first])
    for side in rates(world, trace, first).values():
        torch.testing.assert_close(side[first], begun)
        torch.testing.assert_close(side[~first], moved)


def test_without_free_nats_a_rate_below_0_by_its_noise_trains_like_any_other():
    world = small_world(latent="gaussian", transition=small("distribution", "mixture"))
    rate = torch.tensor([-0.3, 0.1], requires_grad=True)
    world.dynamics._free_nats(world.dynamics.transition, rate).sum().backward()
    assert torch.equal(rate.grad, torch.ones(2))


@every_stochastic
def test_free_nats_stop_the_gradient_of_each_row_for_itself_and_leave_the_rate(roll):
    world = roll.world()
    if not world.dynamics.transition.closed_form:
        pytest.skip("sampled rates are held on the batch mean")
    inputs, state = Inputs.random(world), start_state(world)
    raw = rates(world, observe(world, state, inputs)[1], inputs.is_first)["dyn"].detach()
    bound = float(raw.flatten().sort().values[8:10].mean())  # between two rows: at a rate itself the gradient is undefined
    held = roll.world(free_nats=bound)
    sampling = Sampling(noise=inputs.noise)
    _, trace = held.dynamics.observe(state, inputs.embed.requires_grad_(), inputs.prev_action, inputs.is_first, sampling)
    parts = {"embed": inputs.embed, **dict(held.dynamics.transition.named_parameters())}
    near = {"rtol": 1e-5, "atol": 1e-5}  # attention with and without a gradient are not the same code
    for side in rates(held, trace, inputs.is_first).values():
        torch.testing.assert_close(side, raw, **near)
        free = side[side < bound]
        assert 0 < len(free) < B * T
        assert not reached(free, **parts) and reached(side, **parts)


@every_stochastic
def test_the_prior_side_trains_the_prior_and_the_other_the_posterior(roll):
    world = roll.world()
    inputs = Inputs.random(world).rows(slice(2, 3)).part(0, 1)  # one step, no reset: no past through which gradients could flow
    embed = inputs.embed.requires_grad_()
    state = start_state(world).index(slice(2, 3))
    _, trace = world.dynamics.observe(state, embed, inputs.prev_action, inputs.is_first, Sampling(noise=inputs.noise))
    prior = {f"transition.{name}": p for name, p in world.dynamics.transition.named_parameters()}
    sides = rates(world, trace, inputs.is_first)
    assert reached(sides["dyn"], embed=embed, **prior) == set(prior)
    assert "rep" not in sides or reached(sides["rep"], embed=embed, **prior) == {"embed"}


def marginals(roll: Roll) -> Iterator[str | None]:
    """No marginal, and each that fits the kind of latent."""
    yield None
    for kind in registry.kinds("distribution"):
        try:
            ModelConfig.parse({"dynamics": roll.part(), "marginal": {"kind": kind}})
        except ConfigError:
            continue
        yield kind


@pytest.mark.parametrize(("roll", "marginal"), [(roll, kind) for roll in ROLLS for kind in marginals(roll)])
def test_every_parameter_moves_within_three_updates(roll, marginal):
    world = roll.world(**({"marginal": small("distribution", marginal)} if marginal else {}))
    before = {name: p.detach().clone() for name, p in world.named_parameters()}
    learner = Learner(world, TrainConfig(lr=1e-2, burn_in=0, warmup=0, scales=dict.fromkeys(ScaleConfig.model_fields, 1.0)))
    for seed in range(3):
        learner.update(learner.prepare(known_batch(seed=seed)), generator(seed))
    assert learner.updates == 3
    still = [name for name, p in world.named_parameters() if torch.equal(p, before[name]) == p.requires_grad]
    assert not still
