"""The MDN-RNN: latents of the observation alone, and an LSTM from which no gradient flows into them."""

from __future__ import annotations

import torch
from conftest import flagged, generator, reached, small_world
from torch import Tensor

from worldmodel.data import Sampling, Trace
from worldmodel.dynamics.mdn_rnn import LSTM
from worldmodel.model import WorldModel

B, T = 2, 5


def mdn_rnn(**parts) -> WorldModel:
    return small_world(latent="gaussian", dynamics={"kind": "mdn_rnn", "free_nats": 0.0}, **parts)


FIRST = torch.zeros(B, T, dtype=torch.bool)
FIRST[0, 3] = True


def traced(world: WorldModel, embed: Tensor) -> Trace:
    """Two rows of five steps; row 0 opens an episode at step 3."""
    action = torch.ones(B, T, 2) * ~FIRST.unsqueeze(-1)
    noise = torch.randn(B, T, 2, generator=generator(1))
    return world.dynamics.observe(world.initial(B), embed, action, FIRST, Sampling(noise=noise))[1]


def embedding(world: WorldModel) -> Tensor:
    return torch.randn(B, T, world.encoder.out_features, generator=generator()).requires_grad_()


def test_the_cell_equals_torchs_own():
    ours, theirs = LSTM(5), torch.nn.LSTMCell(3, 5)
    x, h, c = (torch.randn(4, n, generator=generator(n)) for n in (3, 5, 6))
    c = c[:, :5].contiguous()
    order = [0, 1, 3, 2]  # torch's gates are i, f, g, o
    i, f, o, g = (w.clone() for w in torch.randn(4, 5, 3, generator=generator(1)))
    with torch.no_grad():
        theirs.weight_ih.copy_(torch.cat([i, f, g, o]))
        theirs.weight_hh.copy_(torch.cat([ours.recurrent.weight.chunk(4)[k] for k in order]))
        theirs.bias_ih.copy_(torch.cat([torch.zeros(5), torch.ones(5), torch.zeros(10)]))
        theirs.bias_hh.zero_()
        projected = x @ torch.cat([i, f, o, g]).T
        torch.testing.assert_close(ours(projected, h, c), tuple(theirs(x, (h, c))))


def test_no_loss_of_the_recurrence_reaches_the_latents():
    world = mdn_rnn()
    embed = embedding(world)
    trace = traced(world, embed)
    own = dict(world.dynamics.lstm.named_parameters()) | {"z_in": world.dynamics.z_in.weight}
    losses = world.dynamics.losses(trace, flagged(FIRST), Sampling())
    assert reached(losses["dyn"].value, embed=embed, **own) == set(own)
    assert reached(trace.h, embed=embed, **own) == set(own)
    assert reached(losses["rep"].value, embed=embed, **own) == {"embed"}
    assert reached(trace.z, embed=embed, **own) == {"embed"}


def test_losses_at_a_latent_reach_it_at_its_own_step():
    world = mdn_rnn()
    embed = embedding(world)
    (gradient,) = torch.autograd.grad(traced(world, embed).feature[:, 2].sum(), embed)
    assert (gradient.abs().amax((0, 2)) > 0).tolist() == [False, False, True, False, False]


def test_the_recurrent_state_holds_more_than_its_output():
    """c is part of the state beside h, and both are reset where an episode opens."""
    world = mdn_rnn()
    embed = embedding(world)
    trace = traced(world, embed)
    assert list(trace.states) == ["h", "c", "z"]
    action = torch.ones(B, 2)
    state = trace.states.index((slice(None), 1))
    one = world.dynamics.imagine(state, action, Sampling(mode=True))["h"]
    other = world.dynamics.imagine(type(state)({**state, "c": state["c"] + 1}), action, Sampling(mode=True))["h"]
    assert (one - other).abs().max() > 1e-2
    first = world.dynamics.sample_initial(1, Sampling(mode=True))
    for name in ("h", "c"):
        torch.testing.assert_close(trace.states[name][0, 3], first[name][0])


def test_gradients_of_a_dream_flow_through_its_latents():
    """Only training on what was observed is separate: an actor that learns through the model needs the whole chain."""
    world = mdn_rnn()
    action = torch.zeros(B, 2, requires_grad=True)
    state = world.dynamics.imagine(world.initial(B), action, Sampling(generator=generator()))
    after = world.dynamics.imagine(
        type(state)({**state, "h": state["h"].detach(), "c": state["c"].detach()}), torch.zeros(B, 2), Sampling(mode=True)
    )
    assert reached(after["h"], action=action) == {"action"}
