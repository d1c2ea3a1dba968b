"""The causal transformer: what a token sees, and that running step by step equals running over a sequence."""

from __future__ import annotations

import pytest
import torch
from conftest import generator
from torch import Tensor

from worldmodel.nn.attention import CausalTransformer

B, T, WIDTH, WINDOW = 2, 12, 8, 4


def network(layers: int = 2, window: int = WINDOW, **options) -> CausalTransformer:
    """In eval mode, with random weights and biases large enough for each token seen to count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = CausalTransformer(WIDTH, 16, layers=layers, heads=2, window=window, **options)
        for p in net.parameters():
            p.data += 0.3 * torch.randn(p.shape)
    return net.eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, T, WIDTH, generator=generator(seed))


def seen(*openings: int) -> Tensor:
    """How far back each step attends where sequences open at these steps, the same in every row."""
    return torch.stack([torch.tensor([t - max((o for o in openings if o <= t), default=0) for t in range(T)])] * B)


def outputs(net: CausalTransformer, x: Tensor, visible: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net(x, net.initial(B), seen() if visible is None else visible)[0]


def changed(net: CausalTransformer, at: int, visible: Tensor | None = None) -> list[int]:
    """The steps whose output another token at step `at` changes."""
    x = tokens()
    y = x.clone()
    y[:, at] = tokens(1)[:, at]
    difference = (outputs(net, x, visible) - outputs(net, y, visible)).abs().amax((0, 2))
    return difference.nonzero().flatten().tolist()


@pytest.mark.parametrize(("layers", "reach"), [(1, 3), (2, 6), (3, 9)])
def test_a_token_is_seen_by_itself_and_within_the_window_of_every_layer_by_later_ones(layers, reach):
    assert changed(network(layers), at=1) == list(range(1, 1 + reach + 1))


def test_nothing_is_seen_across_an_opening():
    assert changed(network(), at=3, visible=seen(0, 5)) == [3, 4]
    assert changed(network(), at=5, visible=seen(0, 5)) == [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("window", [1, 2, 4, 20], ids="window={}".format)
@pytest.mark.parametrize("lengths", [[1] * T, [5, 7], [2, 9, 1]], ids=str)
def test_in_parts_it_gives_what_it_gives_at_once(window, lengths):
    net, x, visible = network(window=window), tokens(), seen(0, 3, 4)
    whole, memory = net(x, net.initial(B), visible)
    parts, kept = [], net.initial(B)
    for new, back in zip(x.split(lengths, 1), visible.split(lengths, 1), strict=True):
        part, kept = net(new, kept, back)
        assert all(past.shape == (B, window - 1 + new.shape[1], 2 * WIDTH) for past in kept)
        kept = [past[:, past.shape[1] - (window - 1) :] for past in kept]
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for ours, past in zip(kept, memory, strict=True):
        torch.testing.assert_close(ours, past[:, T:], rtol=1e-5, atol=1e-5)


def test_what_a_token_gathers_does_not_depend_on_where_the_sequence_began():
    net, x = network(window=20), tokens()
    late = outputs(net, torch.cat([tokens(1)[:, :5], x[:, :7]], 1), seen(0, 5))
    torch.testing.assert_close(late[:, 5:], outputs(net, x)[:, :7], rtol=1e-5, atol=1e-5)


def test_an_untrained_token_attends_less_to_what_is_further_back():
    net = CausalTransformer(WIDTH, 16, layers=1, heads=2, window=5)
    torch.testing.assert_close(net.bias.detach(), torch.tensor([[0.0625], [0.00390625]]) * -torch.arange(5))


def test_distances_and_order_count():
    net, x = network(1), tokens()
    x[:, 2:] = x[:, 2:3]  # all the same, so that only the positions of the others differ
    swapped = torch.cat([x[:, [1, 0]], x[:, 2:]], 1)
    assert (outputs(net, x)[:, 2] - outputs(net, swapped)[:, 2]).abs().max() > 1e-3


def test_dropout_draws_from_the_given_generator_and_in_training_alone():
    net, x, before = network(dropout=0.5), tokens(), torch.get_rng_state()
    assert torch.equal(outputs(net, x), outputs(network(), x))
    net.train()
    runs = [net(x, net.initial(B), seen(), generator(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_leaves_the_mean_of_a_branch():
    block = network(1, dropout=0.25).blocks[0].train()
    dropped = block._drop(torch.ones(B, 5000, WIDTH), generator())
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_a_width_that_does_not_divide_by_the_heads_is_refused():
    with pytest.raises(ValueError, match=r"width of 8 must divide by 3 heads"):
        CausalTransformer(WIDTH, 16, layers=1, heads=3, window=4)


def test_under_autocast_the_memory_stays_in_full_precision():
    net = network()
    with torch.autocast("cpu", torch.bfloat16):
        y, memory = net(tokens(), net.initial(B), seen())
    assert all(past.dtype == torch.float32 for past in memory)
    torch.testing.assert_close(y.float(), outputs(net, tokens()), rtol=0.1, atol=0.2)
