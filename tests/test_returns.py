"""Returns of imagined rollouts, by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import generator
from jaxtyping import TypeCheckError

from worldmodel.agents.actor_critic import ReturnScale, lambda_return, weights


def test_lambda_returns_are_those_computed_by_hand():
    reward, discount, value = (torch.tensor([x]) for x in ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [9.0, 4.0, 8.0, 10.0]))
    # R3 = 3 + .5*10 = 8;  R2 = 2 + .5*(.5*8 + .5*8) = 6;  R1 = 1 + .5*(.5*4 + .5*6) = 3.5
    torch.testing.assert_close(lambda_return(reward, discount, value, 0.5), torch.tensor([[3.5, 6.0, 8.0]]))
    # lambda 0: one step each; lambda 1: the discounted sum and the last value
    torch.testing.assert_close(lambda_return(reward, discount, value, 0.0), torch.tensor([[3.0, 6.0, 8.0]]))
    torch.testing.assert_close(lambda_return(reward, discount, value, 1.0), torch.tensor([[4.0, 6.0, 8.0]]))


def test_the_value_of_the_start_does_not_count():
    reward, discount, value = torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 5)
    other = torch.cat([value[:, :1] + 100, value[:, 1:]], 1)
    assert torch.equal(lambda_return(reward, discount, value), lambda_return(reward, discount, other))


@pytest.mark.parametrize("g", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("lam", [0.0, 0.7, 0.95, 1.0])
def test_a_constant_reward_of_one_is_worth_one_over_one_minus_g(g, lam):
    h, worth = 12, 1 / (1 - g)
    reward, discount = torch.ones(1, h), torch.full((1, h), g)
    torch.testing.assert_close(lambda_return(reward, discount, torch.full((1, h + 1), worth), lam), torch.full((1, h), worth))


def test_a_long_sum_reaches_the_worth_without_any_value():
    reward, discount = torch.ones(1, 600), torch.full((1, 600), 0.95)
    assert float(lambda_return(reward, discount, torch.zeros(1, 601), 1.0)[0, 0]) == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_termination_cuts_off_all_that_follows(lam):
    reward, value = torch.ones(2, 5), torch.full((2, 6), 7.0)
    discount = torch.full((2, 5), 0.9)
    discount[:, 2] = 0  # the world ends on arriving at the third step
    reward[1, 3:], value[1, 3:] = 1000, 1000
    returns = lambda_return(reward, discount, value, lam)
    torch.testing.assert_close(returns[0, :3], returns[1, :3])
    torch.testing.assert_close(returns[:, 2], torch.ones(2))


def test_returns_have_the_gradient_of_their_rewards_and_values():
    reward, value = torch.rand(1, 3, requires_grad=True), torch.rand(1, 4, requires_grad=True)
    by_reward, by_value = torch.autograd.grad(lambda_return(reward, torch.full((1, 3), 0.5), value, 1.0)[0, 0], (reward, value))
    torch.testing.assert_close(by_reward, torch.tensor([[1.0, 0.5, 0.25]]))
    torch.testing.assert_close(by_value, torch.tensor([[0.0, 0.0, 0.0, 0.125]]))


def test_a_step_weighs_how_likely_it_is_reached():
    discount = torch.tensor([[0.9, 0.5, 0.0, 0.8]]).expand(2, 4)
    expected = torch.tensor([[1.0, 0.9, 0.45, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(weights(torch.tensor([1.0, 0.0]), discount), expected)


def test_the_scale_is_the_range_from_the_5th_to_the_95th_percentile():
    scale = ReturnScale()
    assert scale.value() == 1.0
    assert scale.update(torch.arange(101.0)) == pytest.approx(90)
    assert scale.value() == pytest.approx(90)


def test_a_unit_that_moves_takes_the_range_with_it():
    scale, returns = ReturnScale(), torch.arange(101.0)
    assert scale.update(returns, unit=8.0) == pytest.approx(90)
    assert scale.value(2.0) == pytest.approx(4 * 90)
    assert scale.update(4 * returns, unit=2.0) == pytest.approx(4 * 90)


def test_small_returns_are_not_blown_up():
    assert ReturnScale().update(torch.rand(50, 3, generator=generator()) * 0.1) == 1.0


def test_the_scale_follows_slowly():
    scale = ReturnScale(rate=0.1)
    scale.update(torch.arange(101.0))
    assert scale.update(torch.arange(101.0) * 2 + 1000) == pytest.approx(0.9 * 90 + 0.1 * 180)
    outlier = torch.zeros(1000)
    outlier[0] = 1e6
    assert ReturnScale().update(outlier) == 1.0


def test_returns_that_are_not_finite_leave_the_scale_as_it_is():
    scale = ReturnScale()
    scale.update(torch.arange(101.0))
    for bad in (torch.nan, torch.inf):
        assert scale.update(torch.tensor([1.0, bad, 3.0])) == pytest.approx(90)
    assert scale.update(torch.arange(101.0)) == pytest.approx(90)


def test_shape_annotations_are_executed():
    with pytest.raises(TypeCheckError):
        lambda_return(torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(TypeCheckError):
        lambda_return(torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2, 6))
