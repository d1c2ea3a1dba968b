"""Networks: scales that invert, recurrences that equal their dense form, convolutions for every picture."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import descend, generator
from torch import nn

from worldmodel.nn.networks import (
    MLP,
    BlockGRU,
    BlockLinear,
    ChannelNorm,
    ConvDecoder,
    ConvEncoder,
    ParallelGRU,
    TwoHot,
    by_group,
    halved_sizes,
    initialise,
    linear,
    negative_log_likelihood,
    symexp,
    symlog,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def test_symexp_undoes_symlog():
    x = torch.tensor([-1e4, -3.0, -1e-3, 0.0, 1e-6, 0.5, 1.0, 250.0, 1e6])
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(symlog(torch.tensor([math.e - 1, 1 - math.e])), torch.tensor([1.0, -1.0]))


def test_fan_in_weights_keep_the_variance():
    torch.manual_seed(0)
    x = random(4000, 256)
    for layer in (linear(256, 256), initialise(BlockLinear(256, 256, 4)), initialise(torch.nn.Conv2d(16, 64, 4))):
        y = layer(x) if not isinstance(layer, torch.nn.Conv2d) else layer(x.view(-1, 16, 4, 4))
        assert float(y.detach().std()) == pytest.approx(1, abs=0.06)
        assert float(layer.bias.detach().abs().max()) == 0


def test_scale_zero_makes_the_first_output_exactly_zero():
    assert torch.equal(MLP(5, 8, 2, 3, scale=0)(random(4, 5)), torch.zeros(4, 3))


def test_a_perceptron_without_layers_passes_its_input_on():
    x = random(4, 5)
    assert torch.equal(MLP(5, 8, 0)(x), x) and MLP(5, 8, 0).out_features == 5
    assert MLP(5, 8, 2).out_features == 8 and MLP(5, 8, 2, 3)(x).shape == (4, 3)


# Two-hot ---------------------------------------------------------------------------------------------------------------

two_hots = pytest.mark.parametrize("two_hot", [TwoHot(21, 3.0), TwoHot(127, 10.0), TwoHot(255, 20.0), TwoHot(3, 1.0)], ids=repr)


@two_hots
def test_equal_logits_mean_exactly_zero(two_hot):
    for logits in (torch.zeros(3, two_hot.bins), torch.full((3, two_hot.bins), 4.2)):
        assert torch.equal(two_hot.mean(logits), torch.zeros(3))


@two_hots
def test_mirrored_logits_mean_the_opposite(two_hot):
    logits = random(50, two_hot.bins)
    torch.testing.assert_close(two_hot.mean(logits), -two_hot.mean(logits.flip(-1)), rtol=1e-4, atol=1e-5)
    assert torch.equal(two_hot.mean(logits + logits.flip(-1)), torch.zeros(50))
    assert torch.equal(two_hot.values, -two_hot.values.flip(0)) and float(two_hot.values[two_hot.bins // 2]) == 0


def one_step_optimum(two_hot: TwoHot, target: torch.Tensor) -> torch.Tensor:
    """The probabilities that minimise the loss: its own gradient at zero logits, which is softmax minus target."""
    logits = torch.zeros(len(target), two_hot.bins, requires_grad=True)
    (gradient,) = torch.autograd.grad(two_hot.loss(logits, target).sum(), logits)
    return 1 / two_hot.bins - gradient


@two_hots
def test_a_target_is_split_between_its_two_neighbours_so_that_their_mean_is_the_target(two_hot):
    edge = float(two_hot.values[-1])
    target = torch.tensor([0.0, 1.0, -1.0, 0.3, -0.01, 1e-5, 0.999 * edge, -edge, edge]).clamp(-edge, edge)
    p = one_step_optimum(two_hot, target)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
    assert ((p > 1e-5).sum(-1) <= 2).all() and (p > -1e-5).all()
    torch.testing.assert_close((p.double() * two_hot.values.double()).sum(-1).float(), target, rtol=1e-4, atol=1e-4 * edge)


@two_hots
def test_targets_beyond_the_last_bin_count_as_the_last_bin(two_hot):
    edge = two_hot.values[-1]
    logits = random(2, two_hot.bins)
    beyond = two_hot.loss(logits, torch.stack([edge * 10, -edge * 10]))
    torch.testing.assert_close(beyond, two_hot.loss(logits, torch.stack([edge, -edge])))
    assert beyond.isfinite().all()


def test_the_mean_of_fitted_logits_is_the_target():
    two_hot, target = TwoHot(41, 5.0), torch.tensor([0.0, 1.0, -0.4, 17.3, -120.0])
    logits = torch.zeros(5, 41, requires_grad=True)
    descend(lambda step: two_hot.loss(logits, target).sum(), [logits], 0.3, 400)
    torch.testing.assert_close(two_hot.mean(logits), target, rtol=0.02, atol=0.02)


def test_the_loss_of_logits_is_the_cross_entropy_of_their_log_probabilities_and_targets_get_no_gradient():
    two_hot, logits, target = TwoHot(21, 3.0), random(6, 21), random(6, seed=1).requires_grad_()
    loss = two_hot.loss(logits.requires_grad_(), target)
    torch.testing.assert_close(loss, two_hot.cross_entropy(logits.log_softmax(-1), target))
    assert torch.autograd.grad(loss.sum(), target, allow_unused=True) == (None,)


@pytest.mark.parametrize("bins", [2, 20, 1])
def test_bins_without_a_middle_are_refused(bins):
    with pytest.raises(ValueError, match="odd"):
        TwoHot(bins, 3.0)


# Recurrence ------------------------------------------------------------------------------------------------------------


def as_dense(layer: BlockLinear) -> torch.Tensor:
    """Its weight as one matrix [out, in]."""
    return torch.block_diag(*(w.T for w in layer.weight.detach()))


def test_a_block_linear_layer_is_a_dense_one_with_a_block_diagonal_matrix():
    layer, x = BlockLinear(12, 18, 3), random(5, 12)
    layer.bias.data = random(18)
    torch.testing.assert_close(layer(x), x @ as_dense(layer).T + layer.bias)
    with pytest.raises(ValueError, match="divide"):
        BlockLinear(10, 12, 3)


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_block_gru_is_a_dense_one_with_block_diagonal_weights(blocks):
    torch.manual_seed(0)
    cell, dense, units = BlockGRU(5, 6, blocks), BlockGRU(5, 6), 6
    weights = as_dense(cell.recurrent)  # rows: block, gate, unit of the block
    rows = weights.view(blocks, 3, units // blocks, units).transpose(0, 1).reshape(3 * units, units)  # gate, block, unit
    dense.load_state_dict({**cell.state_dict(), "recurrent.weight": rows})
    x, h = random(4, 5), random(4, 6, seed=1)
    torch.testing.assert_close(cell(cell.inputs(x), h), dense(dense.inputs(x), h))
    for gate in rows.view(3, units, units):
        inside = torch.block_diag(*[torch.ones(units // blocks, units // blocks)] * blocks).bool()
        assert (gate[inside] != 0).all() and (gate[~inside] == 0).all()


def test_a_gru_mixes_its_candidate_into_its_state_as_written():
    torch.manual_seed(0)
    cell, x, h = BlockGRU(5, 4), random(3, 5), random(3, 4, seed=1)
    r, c, u = cell.norm(x @ cell.inputs.weight.T + h @ cell.recurrent.weight.T).chunk(3, -1)
    share = torch.sigmoid(u - 1)
    torch.testing.assert_close(cell(cell.inputs(x), h), share * torch.tanh(torch.sigmoid(r) * c) + (1 - share) * h)


# Pictures --------------------------------------------------------------------------------------------------------------


def test_parallel_cells_are_as_many_cells_of_their_own():
    many, x, h = ParallelGRU(2, 5, 4), random(2, 3, 5), random(2, 3, 4, seed=1)
    for p in many.parameters():
        nn.init.normal_(p, generator=generator(2))
    both = many(many.inputs(x), h)
    for k in range(2):
        one = BlockGRU(5, 4)
        with torch.no_grad():
            one.recurrent.weight.copy_(many.recurrent[k].T)
            one.norm.weight.copy_(many.gain[k, 0])
            one.norm.bias.copy_(many.shift[k, 0])
        torch.testing.assert_close(both[k], one(x[k] @ many.inputs.weight[k] + many.inputs.bias[k], h[k]))


@pytest.mark.parametrize("size", [(64, 64), (84, 84), (33, 40), (8, 8), (9, 31)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_size_are_encoded_and_come_back_in_their_size(size, channels):
    shape = (channels, *size)
    encoder, decoder = ConvEncoder(shape, 2), ConvDecoder(7, shape, 2)
    image = torch.rand(2, *shape, generator=generator())
    assert encoder(image).shape == (2, encoder.out_features)
    assert decoder(random(2, 7)).shape == (2, *shape)
    smallest = halved_sizes(size)[-1]
    assert 4 <= min(smallest) < 8 and len(halved_sizes(size)) == int(math.log2(min(size))) - 1


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (4, 4)])
def test_pictures_too_small_for_a_convolution_are_refused_with_the_way_out(size):
    for part in (lambda: ConvEncoder((3, *size), 2), lambda: ConvDecoder(7, (3, *size), 2)):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*too small.*8x8.*layout=vector"):
            part()


def test_every_pixel_is_encoded_and_decoded():
    shape = (1, 33, 40)
    encoder, decoder = ConvEncoder(shape, 2), ConvDecoder(7, shape, 2)
    image = torch.rand(1, *shape, generator=generator()).requires_grad_()
    (encoded,) = torch.autograd.grad(encoder(image).square().sum(), image)
    feature = random(1, 7).requires_grad_()
    corners = decoder(feature)[0, 0, [0, 0, 32, 32], [0, 39, 0, 39]]
    decoded = [torch.autograd.grad(corner, feature, retain_graph=True)[0].abs().sum() for corner in corners]
    assert (encoded != 0).all() and min(decoded) > 0


def test_an_untrained_picture_is_grey():
    torch.manual_seed(0)
    assert float(ConvDecoder(7, (3, 16, 16), 4)(torch.zeros(1, 7)).detach().mean()) == pytest.approx(0.5, abs=0.02)


def test_channels_are_normalised_at_each_pixel():
    x = 3 + 5 * random(2, 8, 4, 6)
    y = ChannelNorm(8)(x)
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 4, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(1, unbiased=False), torch.ones(2, 4, 6), atol=1e-3, rtol=0)


def test_the_negative_log_likelihood_is_a_normals_own():
    x, mean, log_std = random(5, 3), random(5, 3, seed=1), random(5, 3, seed=2)
    reference = -torch.distributions.Normal(mean, log_std.exp()).log_prob(x)
    torch.testing.assert_close(negative_log_likelihood(x, mean, log_std), reference)


@pytest.mark.parametrize("sizes", [(3,), (3, 5, 2), (4,) * 7, (3, 5) * 6, (11, 6, 3) * 49], ids=str)
def test_groups_at_once_give_each_group_its_own_numbers_bit_for_bit(sizes):
    x, weight = random(4, 5, sum(sizes)), random(4, 5, sum(sizes), seed=1)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    alone = torch.cat([part.log_softmax(-1) for part in one.split(sizes, -1)], -1)
    together = by_group(partial(torch.log_softmax, dim=-1), sizes, other)
    (alone * weight).sum().backward(), (together * weight).sum().backward()
    assert torch.equal(together, alone) and torch.equal(other.grad, one.grad)
    sums = torch.stack([(p * q).sum(-1) for p, q in zip(x.split(sizes, -1), weight.split(sizes, -1), strict=True)], -1)
    assert torch.equal(by_group(lambda p, q: (p * q).sum(-1, keepdim=True), sizes, x, weight), sums)


def test_a_grid_of_equal_cells_is_a_few_calls():
    calls = []
    by_group(lambda part: calls.append(part.shape) or part, (11, 6, 3) * 49, random(2, 980))
    assert calls == [(2, 49, 11), (2, 49, 6), (2, 49, 3)]
