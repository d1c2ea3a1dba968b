"""The transformer world model: what reaches what over time, that its cache is exact, and what its states hold."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_near, flagged, generator, known_batch, reached, small_world
from torch import Tensor

from worldmodel.data import Sampling, State, Trace
from worldmodel.dynamics import TransformerConfig
from worldmodel.errors import ConfigError
from worldmodel.learner import Learner, TrainConfig
from worldmodel.model import ModelConfig, WorldModel

B, T, WINDOW = 2, 14, 4
MODE = Sampling(mode=True)


def transformer(latent: str = "gaussian", **options) -> WorldModel:
    """Two layers in eval mode, with weights large enough for everything to count."""
    options = {"kind": "transformer", "layers": 2, "heads": 2, "window": WINDOW, **options}
    world = small_world(latent=latent, dynamics=options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for p in world.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return world.eval()


def inputs(world: WorldModel, seed: int = 0, openings: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Embeddings, actions and resets of B rows of T steps; episodes open in row 0 at `openings`."""
    g = generator(seed)
    is_first = torch.zeros(B, T, dtype=torch.bool)
    is_first[0, list(openings)] = True
    action = torch.nn.functional.one_hot(torch.randint(2, (B, T), generator=g), 2).float()
    embed = torch.randn(B, T, world.encoder.out_features, generator=g)
    return {"embed": embed, "prev_action": action * ~is_first.unsqueeze(-1), "is_first": is_first}


def observe(world: WorldModel, x: dict[str, Tensor], state: State | None = None) -> tuple[State, Trace]:
    with torch.no_grad():
        return world.dynamics.observe(state or world.initial(B), **x, sampling=MODE)


def part(x: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: y[:, start:stop] for name, y in x.items()}


def changed(world: WorldModel, name: str, at: int, openings: tuple[int, ...] = ()) -> list[int]:
    """The steps of row 0 whose h another embedding, or another action, at step `at` changes."""
    one = inputs(world, openings=openings)
    other = {key: y.clone() for key, y in one.items()}
    other[name][:, at] = 1 - one[name][:, at]
    difference = observe(world, one)[1].h[0] - observe(world, other)[1].h[0]
    return (difference.abs().amax(-1) > 1e-7).nonzero().flatten().tolist()


def test_an_observation_reaches_h_after_it_within_the_windows_and_no_others():
    assert changed(transformer(), "embed", at=2) == [3, 4, 5, 6, 7, 8, 9]  # its token is step 3's, which two layers see for 3 more
    assert changed(transformer(layers=1), "embed", at=2) == [3, 4, 5, 6]


def test_an_action_reaches_the_h_that_it_led_to_and_later_ones():
    assert changed(transformer(), "prev_action", at=3) == [3, 4, 5, 6, 7, 8, 9]


def test_nothing_reaches_over_the_opening_of_an_episode():
    assert changed(transformer(), "embed", at=2, openings=(5,)) == [3, 4]
    assert changed(transformer(), "prev_action", at=3, openings=(5,)) == [3, 4]
    assert changed(transformer(), "embed", at=4, openings=(5,)) == []


@pytest.mark.parametrize("window", [2, 4, 40])
@pytest.mark.parametrize("openings", [(), (0, 5, 6)], ids=["one episode", "three episodes"])
def test_the_cache_gives_what_the_parallel_pass_gives(window, openings):
    """Step by step, from the state of an earlier window, and by imagination, whose h needs no observation."""
    world = transformer(window=window)
    x, (before, _) = inputs(world, 0, openings), observe(world, inputs(world, 1))
    last, whole = observe(world, x, before)
    state = before
    for t in range(T):
        dreamt = world.dynamics.imagine(state, x["prev_action"][:, t], MODE)
        state, _ = observe(world, part(x, t, t + 1), state)
        torch.testing.assert_close(state["h"], whole.h[:, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["z"], whole.z[:, t], rtol=1e-5, atol=1e-5)
        goes_on = ~x["is_first"][:, t]
        for name in state.keys() - {"z"}:
            torch.testing.assert_close(dreamt[name][goes_on].detach(), state[name][goes_on], rtol=1e-5, atol=1e-5)
    for name in last:
        torch.testing.assert_close(state[name], last[name], rtol=1e-5, atol=1e-5)


def test_a_dream_may_begin_at_any_row_of_a_trace():
    world, at = transformer(), 8
    x = inputs(world, openings=(6,))
    _, whole = observe(world, x)
    rows = whole.states.index((torch.tensor([0, 1]), torch.tensor([at, at])))
    dreamt = world.dynamics.imagine(rows, x["prev_action"][:, at + 1], MODE)
    torch.testing.assert_close(dreamt["h"].detach(), whole.h[:, at + 1], rtol=1e-5, atol=1e-5)


def test_the_states_of_a_trace_are_views_into_one_memory():
    world = transformer()
    _, trace = observe(world, inputs(world))
    memory = trace.states["memory0"]
    assert memory.shape == (B, T, WINDOW - 1, 2 * world.config.dynamics.deter)
    assert memory.untyped_storage().nbytes() == 4 * B * (WINDOW - 1 + T) * 2 * world.config.dynamics.deter
    assert trace.states["age"].tolist() == [[min(t + 1, WINDOW - 1) for t in range(T)]] * B


def test_a_state_survives_the_journey_through_numpy():
    world = transformer()
    state, _ = observe(world, inputs(world))
    again = world.initial(B).like(state.numpy())
    action = torch.eye(2)
    one, other = (world.dynamics.imagine(s, action, MODE) for s in (state, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    forgotten = world.dynamics.imagine(state.reset(torch.tensor([True, False])), action, MODE)["h"]
    fresh = world.dynamics.imagine(world.initial(B), action, MODE)["h"]
    torch.testing.assert_close(forgotten[0], fresh[0])
    assert torch.equal(forgotten[1], one["h"][1])


def test_gradients_of_the_prior_side_reach_the_past_and_those_of_the_posterior_side_the_present_alone():
    world = transformer(free_nats=0.0)
    x = inputs(world)
    x["embed"].requires_grad_()
    _, trace = world.dynamics.observe(world.initial(B), **x, sampling=Sampling(noise=torch.randn(B, T, 2, generator=generator())))
    at = 6

    def steps(loss: Tensor) -> list[int]:
        (gradient,) = torch.autograd.grad(loss[:, at].sum(), x["embed"], retain_graph=True)
        return (gradient.abs().amax((0, 2)) > 0).nonzero().flatten().tolist()

    losses = world.dynamics.losses(trace, flagged(x["is_first"]), Sampling())
    assert steps(losses["dyn"].value) == [0, 1, 2, 3, 4, 5][-(2 * (WINDOW - 1) + 1) :]
    assert steps(losses["rep"].value) == [at]
    core = dict(world.dynamics.core.named_parameters())
    assert reached(losses["dyn"].value, **core) == set(core)
    assert not reached(losses["rep"].value, **core)


def test_dropout_is_of_training_and_not_of_dreams():
    world = transformer(dropout=0.5)
    x, g = inputs(world), generator()
    quiet = observe(world, x)[1]
    world.train()
    noisy = world.dynamics.observe(world.initial(B), **x, sampling=Sampling(mode=True, generator=g))[1]
    assert not torch.allclose(noisy.h, quiet.h)
    action, dreams = torch.eye(2), []
    for training in (True, False):
        dreams.append(world.train(training).dynamics.imagine(quiet.last, action, MODE)["h"])
    assert torch.equal(*dreams)


def test_a_window_of_one_row_and_a_first_state_agree_with_a_beginning():
    world = transformer("categorical")
    state = world.sample_initial(3000, Sampling(generator=generator()))
    x = part(inputs(world, openings=(0,)), 0, 1)
    torch.testing.assert_close(state["h"][0].detach(), observe(world, x)[1].h[0, 0])
    assert float(state["age"].min()) == float(state["age"].max()) == 1
    probs = world.dynamics.initial_prior.given(None).mean.detach()
    assert_near(state["z"].mean(0, keepdim=True), probs, 3000, state["z"].std(0))


def test_it_learns_under_autocast_and_compiled_parts_keep_their_names():
    world = transformer().train()
    names = list(world.state_dict())
    learner = Learner(world, TrainConfig(precision="bf16", lr=1e-3, burn_in=2))
    metrics, trace, _ = learner.update(learner.prepare(known_batch()), generator())
    assert learner.updates == 1 and trace.h.dtype == torch.float32 and torch.tensor(metrics["loss/dyn"]).isfinite()
    world.dynamics.compile_step()
    assert list(world.state_dict()) == names


def test_heads_that_do_not_divide_deter_are_refused_when_the_config_is_read():
    with pytest.raises(ValueError, match=r"deter=12 must divide by heads=5"):
        TransformerConfig(deter=12, heads=5)
    with pytest.raises(ConfigError, match=r"heads"):
        ModelConfig.parse({"dynamics": {"kind": "transformer", "deter": 10, "heads": 4}})
