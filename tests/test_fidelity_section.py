"""Roll-outs beside plain forecasts: figures of a world whose answer is known, and of the same model made worse in one way each."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import generator, small, small_world
from gymnasium import spaces

from worldmodel.data import Batch, Dream, Episodes, State
from worldmodel.diagnostics.calibration import calibrate
from worldmodel.diagnostics.evidence import Evidence, Figure
from worldmodel.diagnostics.fidelity import (
    EVERY,
    SAMPLES,
    ahead,
    calibration_error,
    climatology,
    errors_by_start,
    peer,
    ratio,
    reliability,
    rollouts,
    root,
    skill,
    slope,
    some_starts,
    transitions,
)
from worldmodel.diagnostics.geometry import filter_episodes
from worldmodel.diagnostics.rollouts import open_loop
from worldmodel.spaces import ObsSpec

PAIR = spaces.Box(-np.inf, np.inf, (2,), np.float32)
PICTURE = spaces.Box(0, 255, (16, 16, 3), np.uint8)
MIXED = spaces.Dict({"a": PAIR, "b": PICTURE, "c": spaces.Discrete(3)})
KEEPS, NOISE = 0.9, 0.3
"""x' = KEEPS x + action + NOISE e. Its reward is its first number; it goes on with probability `goes_on`."""


def goes_on(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(4 - 2 * x[..., 1])


@cache
def decaying(count: int = 60, seed: int = 0, longest: int = 40) -> Episodes:
    """Episodes of the process, played at random; the action is a category that pushes the second number up or down."""
    rng = generator(seed)
    parts = []
    for _ in range(count):
        x, actions, ended = [torch.randn(2, generator=rng)], [], False
        while len(x) < longest and not ended:
            actions.append(torch.eye(2)[int(torch.randint(2, (), generator=rng))])
            x.append(follow(x[-1], actions[-1]) + NOISE * torch.randn(2, generator=rng))
            ended = bool(torch.rand((), generator=rng) > goes_on(x[-1]))
        n = len(x)
        taken, x = torch.stack([*actions, torch.zeros(2)]), torch.stack(x)
        first, last = torch.arange(n) == 0, torch.arange(n) == n - 1
        parts.append(({"obs": x}, taken, torch.roll(taken, 1, 0), x[:, 0] * ~first, first, last, last & ended))
    obs, *columns = zip(*parts)
    return Episodes(Batch({"obs": torch.cat([x["obs"] for x in obs])[None]}, *(torch.cat(column)[None] for column in columns)))


def follow(x: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return KEEPS * x + 0.5 * torch.stack([torch.zeros_like(action[..., 0]), action[..., 1] - action[..., 0]], -1)


def known_world(keeps: float = KEEPS, noise: float = NOISE, bias: float = 0.0, gain: float = 1.0, doubt: float = 0.0):
    """A model of the process: it may forget at another rate, be noisier, and err in rewards and ends. `gain`, `bias`: of rewards;
    `doubt`: share of the odds of going on that it denies."""
    world, rng = small_world(PAIR, vector_scaling="raw").eval(), generator(3)

    def trace(batch, state=None, sampling=None):
        return SimpleNamespace(last=State({"x": batch.obs["obs"][:, -1]}), feature=batch.obs["obs"])

    def imagine(state, policy, horizon, sampling=None):
        x, actions = [state["x"]], []
        for step in range(horizon):
            actions.append(policy(x[-1], step))
            moved = follow(x[-1], actions[-1]) + (keeps - KEEPS) * x[-1]
            x.append(moved + noise * torch.randn(moved.shape, generator=rng))
        feature = torch.stack(x, 1)
        after = feature[:, 1:]
        cont = (1 - doubt) * goes_on(after)
        return Dream(torch.stack(actions, 1), gain * after[..., 0] + bias, cont, 0 * cont, feature, State({"x": x[-1]}))

    world.trace, world.imagine, world.decode = trace, imagine, lambda feature: {"obs": feature}
    world.decoder.sample = lambda feature, sampling: {"obs": feature}
    return world


@cache
def filtered(seed: int):
    return filter_episodes(small_world(PAIR, vector_scaling="raw").eval(), decaying(seed=seed))


def evidence_of(world) -> Evidence:
    return Evidence(world, "runs/some", *map(filtered, (1, 2, 3)), decaying(seed=3))


@pytest.fixture(scope="module")
def right():
    return rollouts(evidence_of(known_world()), updates=200)


def section(**faults):
    return rollouts(evidence_of(known_world(**faults)), updates=0)


def value(found, name: str) -> float:
    return found.figures[name].value


# Estimators -------------------------------------------------------------------------------------------------------------


def test_ratios_roots_and_skills_are_those_of_means_and_their_intervals_hold_them():
    rng = generator()
    one, other, episode = torch.rand(400, generator=rng), 1 + torch.rand(400, generator=rng), torch.arange(400) // 4
    found = ratio(one, other, episode)
    assert found.value == pytest.approx(float(one.mean() / other.mean()), rel=1e-6) and found.low < found.value < found.high
    rooted, skilled = root(found), skill(found)
    assert rooted.value == pytest.approx(found.value**0.5) and rooted.low == pytest.approx(found.low**0.5)
    assert skilled.value == 1 - found.value and skilled.low == 1 - found.high and skilled.high == 1 - found.low
    nothing = ratio(one, torch.zeros(400), episode)
    assert nothing.value > 1e6 and root(Figure(None)).value is None and skill(Figure(None)).value is None


def test_the_slope_of_real_on_predicted_is_one_where_they_agree_on_average():
    x = torch.randn(20_000, generator=generator())
    noise = torch.randn(20_000, generator=generator(1))
    assert slope(x, x + noise) == pytest.approx(1, abs=0.03)
    assert slope(2 * x, x + noise) == pytest.approx(0.5, abs=0.03) and slope(x / 2, x) == pytest.approx(2, abs=0.03)
    assert math.isnan(slope(torch.ones(50), x[:50])) and math.isnan(slope(x, torch.ones(20_000)))


def test_reliability_of_a_calibrated_forecast_is_the_diagonal():
    rng, edges = generator(), torch.linspace(0, 0.9, 10)
    predicted = torch.rand(50_000, generator=rng)
    happened = (torch.rand(50_000, generator=rng) < predicted).double()
    mean, frequency, count = reliability(predicted, happened, edges)
    torch.testing.assert_close(mean, frequency, atol=0.03, rtol=0)
    assert int(count.sum()) == 50_000 and calibration_error(predicted, happened, edges) < 0.01
    assert calibration_error(predicted.square(), happened, edges) > 0.1
    mean, frequency, count = reliability(torch.tensor([0.05, 1.0]), torch.tensor([1.0, 0.0]), edges)
    assert count.tolist() == [1] + [0] * 8 + [1] and mean[1:9].isnan().all() and frequency[0] == 1


def test_replayed_rows_become_episodes_again_cut_where_rows_are_missing():
    seen = filter_episodes(small_world(PAIR).eval(), decaying(5), max_steps=10)
    episodes = transitions(seen)
    assert episodes.lengths.tolist() == decaying(5).lengths.clamp_max(10).tolist()
    assert bool(episodes.rows.is_last[0, -1]) and int(episodes.rows.is_last.sum()) == 5


# The known world --------------------------------------------------------------------------------------------------------


def test_figures_of_the_true_model_are_those_of_its_process(right):
    assert right.skipped is None
    for h in (1, 5, 15):
        assert value(right, f"spread over error at {h}") == pytest.approx(1, abs=0.12)
        assert value(right, f"coverage of 50 % at {h}") == pytest.approx(0.5, abs=0.08)
        assert value(right, f"coverage of 90 % at {h}") == pytest.approx(0.9, abs=0.06)
        assert value(right, f"crps skill over climatology at {h}") > 0 and value(right, f"crps skill over persistence at {h}") > 0
        for other in ("persistence", "climatology"):
            assert right.figures[f"error over {other} at {h}"].surely_below(1)
    noise = NOISE * math.sqrt(1 + 1 / SAMPLES)
    assert value(right, "error at 1") == pytest.approx(noise, rel=0.07)
    assert value(right, "reward error at 1") == pytest.approx(noise, rel=0.12)
    assert value(right, "reward slope") == pytest.approx(1, abs=0.05) and abs(value(right, "reward bias")) < 0.03
    assert value(right, "continue calibration error") < 0.03 and right.figures["continue brier skill"].surely_above(0)
    assert set(right.curves) == {"error by horizon", "reliability of continue", "reliability of rewards"}
    assert set(right.curves["error by horizon"].lines) == {"model", "persistence", "climatology", "mlp"}
    assert not [text for text in right.sentences if "`" in text], right.sentences


def test_intervals_hold_their_figures_and_names_are_lower_case_words(right):
    for name, figure in right.figures.items():
        assert name == name.lower() and figure.known, name
        assert figure.low is not None and figure.low <= figure.value <= figure.high, name


def test_figures_are_those_of_the_estimators_that_worldmodel_dream_shows(right):
    episodes = decaying(seed=3)
    errors = open_loop(known_world(noise=0.0), episodes, samples=2)
    still = rollouts(evidence_of(known_world(noise=0.0)), updates=0)
    for h in (1, 5, 15):
        assert value(still, f"error at {h}") == pytest.approx(float(errors.error()[h - 1]), rel=1e-4)
        assert value(still, f"error over persistence at {h}") == pytest.approx(float(errors.ratio()[h - 1]), rel=1e-4)
        assert value(still, f"reward error at {h}") == pytest.approx(float(errors.reward[h - 1]), rel=1e-4)
    found = calibrate(known_world(), episodes, every=EVERY)
    for h in (1, 5, 15):
        assert value(right, f"spread over error at {h}") == pytest.approx(float(found.spread_skill[h - 1]), abs=0.06)
        assert value(right, f"crps at {h}") == pytest.approx(float(found.crps[h - 1]), rel=0.1)


def test_the_truth_beats_the_ensemble_which_beats_a_model_that_forgets_too_fast(right):
    evidence = evidence_of(known_world(keeps=0.2))
    broken = rollouts(evidence, updates=200)
    for h in (1, 5):
        assert value(right, f"error over mlp at {h}") < 1.05 < 1.2 < value(broken, f"error over mlp at {h}")
    text = next(text for text in broken.sentences if "MLP ensemble" in text)
    assert str(value(broken, "error over mlp at 1"))[:3] in text and text.endswith("model=anchored`.")


def test_a_model_that_errs_more_than_persistence_is_told_to_learn_for_longer():
    found = section(keeps=-0.9)
    assert found.figures["error over persistence at 1"].surely_above(1)
    assert found.figures["error over climatology at 1"].surely_above(1)
    assert any(
        "repeating the last observation; learn for longer: `worldmodel train runs/some --resume" in x for x in found.sentences
    )
    assert "not asked for" in found.skipped


@pytest.mark.parametrize(("noise", "word"), [(0.05, "too sure"), (1.2, "too wide")])
def test_a_spread_that_is_wrong_is_seen_in_coverage_score_and_ratio(right, noise, word):
    found = section(noise=noise)
    ratio_at = value(found, "spread over error at 1")
    assert ratio_at < 0.5 if noise < NOISE else ratio_at > 2
    covered = value(found, "coverage of 90 % at 1")
    assert covered < 0.5 if noise < NOISE else covered > 0.97
    assert value(found, "crps at 1") > 1.1 * value(right, "crps at 1")
    assert value(found, "crps skill over climatology at 1") < value(right, "crps skill over climatology at 1")
    assert any(word in text and "`worldmodel " in text for text in found.sentences)


def test_wrong_rewards_are_seen_in_bias_slope_and_error(right):
    biased, steep = section(bias=1.0), section(gain=3.0)
    assert value(biased, "reward bias") == pytest.approx(1, abs=0.05) and value(biased, "reward slope") == pytest.approx(
        1, abs=0.05
    )
    assert value(steep, "reward slope") == pytest.approx(1 / 3, abs=0.05)
    assert any("overshoot" in text for text in steep.sentences)
    for wrong in (biased, steep):
        assert value(wrong, "reward error over its mean at 1") > 2 * value(right, "reward error over its mean at 1")
    assert any("train.scales.reward" in text for text in section(gain=5.0).sentences)
    constant = section(gain=0.0)
    assert constant.figures["reward slope"].value is None and any("rewards are all alike" in text for text in constant.sentences)


def test_ends_that_are_expected_too_often_are_seen_in_reliability_and_brier(right):
    found = section(doubt=0.4)
    assert found.figures["continue calibration error"].surely_above(0.3)
    assert value(found, "continue brier") > 2 * value(right, "continue brier")
    assert found.figures["continue brier skill"].surely_below(0)
    assert sum("train.terminal_fraction" in text for text in found.sentences) == 2
    curve = found.curves["reliability of continue"]
    assert max(curve.x) < 0.61 and curve.lines["observed"][-1] > 0.9 and curve.lines["right"] == curve.x


# What a model lacks -----------------------------------------------------------------------------------------------------


def circling(observation, count: int = 4, length: int = 12, seed: int = 0) -> Episodes:
    """Random observations of any space, without an end."""
    spec, rows, rng = ObsSpec.from_space(observation), count * length, np.random.default_rng(seed)
    obs = {}
    for name, key in spec.keys.items():
        space = key.space  # a new one at each call
        space.seed(seed)
        x = np.stack([space.sample() for _ in range(rows)])
        obs[name] = torch.from_numpy(x.reshape(1, rows, *key.raw_shape).astype(key.raw_dtype))
    first = (torch.arange(rows) % length == 0).unsqueeze(0)
    action = torch.eye(2)[torch.from_numpy(rng.integers(0, 2, rows))].unsqueeze(0)
    return Episodes(Batch(obs, action, action.roll(1, 1), torch.ones(1, rows), first, first.roll(-1, 1), first & False))


POINTS = {
    "latent": "point",
    "dynamics": {"posterior": "observation"},
    "transition": small("distribution", "gaussian", std="fitted"),
}
ANCHORED = {"dynamics": {"kind": "anchored"}, "transition": None, "initial": None}
KINDS = {
    "gaussian": (PAIR, {"latent": "gaussian"}),
    "categorical": (PAIR, {"latent": "categorical"}),
    "anchored": (PAIR, ANCHORED),
    "anchored with pictures": (MIXED, ANCHORED),
    "jepa": (PAIR, {**POINTS, "objective": small("objective", "jepa")}),
    "jepa without a decoder": (PAIR, {**POINTS, "objective": small("objective", "jepa", probe=False)}),
    "pictures": (PICTURE, {"latent": "gaussian"}),
    "categories": (spaces.Discrete(3), {"latent": "categorical"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_world_raises_and_what_it_lacks_is_said(kind):
    observation, parts = KINDS[kind]
    world = small_world(observation, **parts).eval()
    seen = [filter_episodes(world, circling(observation, seed=seed)) for seed in range(3)]
    found = rollouts(Evidence(world, "runs/some", *seen, circling(observation, seed=2)), horizon=4, updates=2)
    assert ("error over persistence at 1" in found.figures) == (kind != "jepa without a decoder")
    assert ("crps at 1" in found.figures) == (kind not in ("jepa without a decoder", "pictures"))
    assert found.figures["continue brier"].known and found.figures["reward error at 1"].known
    assert "because" in found.skipped and "no replayed or no held-out episode terminates" in found.skipped
    assert found.figures["reward slope"].value is None  # rewards that never change


def test_episodes_that_are_too_short_are_skipped_with_the_reason():
    evidence = evidence_of(known_world())
    found = rollouts(evidence, context=60)
    assert not found.figures and "because no held-out episode has more than 60 rows" in found.skipped


def test_too_few_replayed_steps_have_no_peer():
    world = small_world(PAIR).eval()
    seen = filter_episodes(world, circling(PAIR))
    assert "because 44 replayed steps" in peer(Evidence(world, "runs/some", seen, seen, seen, circling(PAIR)))


def test_the_peer_leaves_torchs_own_generator_alone_and_is_the_same_again():
    evidence = evidence_of(known_world())
    torch.manual_seed(5)
    one, two = (peer(evidence, updates=2) for _ in range(2))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3)) and all(torch.equal(a, b) for a, b in zip(one.net.parameters(), two.net.parameters()))


def test_starts_are_thinned_evenly_and_the_mean_observation_is_that_of_replayed_rows():
    episodes = decaying(40)
    episode, start = some_starts(episodes, 5, 1, 50)
    assert len(start) == 50 and int(episode[0]) == 0 and int(episode[-1]) == 39
    world = small_world(PAIR).eval()
    seen = filter_episodes(world, episodes, max_steps=1000)
    torch.testing.assert_close(climatology(world, seen)["obs"], episodes.rows.obs["obs"][0].double().mean(0))
    errors = errors_by_start(world, world, episodes, climatology(world, seen), 5, 3, samples=1)
    assert errors.inside[:, 0].all() and errors.model.shape == errors.climatology.shape == (len(errors.episode), 3)


def test_one_step_is_no_steps():
    assert ahead(1) == "1 step ahead" and ahead(15) == "15 steps ahead"
