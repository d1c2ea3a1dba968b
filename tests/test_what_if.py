"""What a world model expects of plans: known answers, shapes of every space, reproducible draws, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import IMAGE, VECTOR, generator, small, small_world, unchecked
from gymnasium import spaces
from small_runs import CHAIN, small_train
from test_cli import command  # noqa: F401 (a fixture)

import worldmodel as wm
from worldmodel import forecasts
from worldmodel.commands.what_if import what_if as of_files
from worldmodel.data import Batch, Sampling
from worldmodel.envs.sources import recording
from worldmodel.errors import ConfigError, CorruptError, NumericsError
from worldmodel.forecasts import Forecast, PlanRanking, what_if

EYE = np.eye(5, dtype=np.float32)
LEARNED = {
    **{"agent": "random", "train.prefill": 120, "train.pretrain": 140, "train.lr": 6e-3, "eval.every": 0, "eval.episodes": 1},
    **{"train.ratio": 1.0, "train.batch_size": 16, "train.batch_length": 5, "model.heads.bins": 41, "model.dynamics.deter": 32},
    **{f"model.{part}.units": 32 for part in ("dynamics", "encoder", "decoder", "heads")},
    **{"model.dynamics.latent.variables": 4, "model.dynamics.latent.classes": 6},
    "env.names": ["first", "second", "third", "fourth", "last"],
}
EVERY = spaces.Dict(
    at=spaces.Discrete(3, start=1),
    bits=spaces.MultiBinary(2),
    camera=IMAGE,
    clock=spaces.Box(0, 1e10, (1,), np.float64),
    count=spaces.Box(-5, 5, (2,), np.int32),
    dials=spaces.MultiDiscrete([2, 3]),
    matrix=spaces.Box(-1, 1, (2, 3)),
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A run whose model has learned the chain of five cells."""
    folder = tmp_path_factory.mktemp("what_if") / "chain"
    with unchecked():
        small_train(folder, 121, options=LEARNED)
    return wm.Run.open(folder)


def drawn(space, count, seed=0):
    """So many samples of a space, as an environment would give them one by one."""
    space.seed(seed)
    return [space.sample() for _ in range(count)]


# Known answers ----------------------------------------------------------------------------------------------------------


def test_the_chain_leads_where_it_is_known_to_lead(chain):
    forecast = chain.what_if(EYE[[0, 1]], [1], [1, 1, 1, 1, 1])  # from the second cell to the last, where the episode ends
    assert isinstance(forecast, Forecast) and forecast.actions.tolist() == [1] * 5
    assert forecast.observation_mean[:3].argmax(1).tolist() == [2, 3, 4]
    np.testing.assert_allclose(forecast.observation_mean[:3], EYE[2:], atol=0.2)
    np.testing.assert_allclose(forecast.reward_mean[:3], [-0.2, -0.1, 1.0], atol=0.1)
    np.testing.assert_allclose(forecast.survival, [1, 1, 0, 0, 0], atol=0.05)
    assert forecast.return_mean == pytest.approx(0.7, abs=0.1)  # what would follow the end does not count
    assert forecast.uncertainty is None and (forecast.observation_std >= 0).all()


def test_what_was_done_before_decides_where_a_plan_starts(chain):
    assert chain.what_if(EYE[[0, 1, 2]], [1, 1], [1]).observation_mean[0].argmax() == 3
    assert chain.what_if(EYE[0], [], [1]).observation_mean[0].argmax() == 1


def test_plans_are_ranked_by_return_with_a_certainty(chain):
    plans = {"left": [0] * 4, "right": [1] * 4, "both": [1, 0, 1, 0]}
    ranking = chain.what_if(EYE[0], [], plans)
    assert isinstance(ranking, PlanRanking) and list(ranking) == ["right", "both", "left"]
    assert ranking.best is ranking["right"] and len(ranking) == 3
    assert ranking.best.return_mean == pytest.approx(0.4, abs=0.2)
    assert ranking["left"].return_mean == pytest.approx(-1.6, abs=0.15)
    assert ranking.win_share[0] > 0.95 and ranking.win_share.sum() == pytest.approx(1)
    assert ranking.behind[0] == 0 and ranking.behind[2] == pytest.approx(2, abs=0.3)
    assert ranking.behind_error[0] == 0 and 0 < ranking.behind_error[2] < 0.2
    assert "1. right" in repr(ranking) and "of 32 samples" in repr(ranking)


def test_ties_are_shared_and_samples_are_compared_one_by_one():
    forecast = what_if(small_world(), np.zeros(4), [], [1], samples=4)
    returns = {"a": [1.0, 2, 3, 8], "b": [0.0, 1, 2, 7], "c": [1.0, 2, 3, 8]}
    ranking = PlanRanking.of([replace(forecast, name=name, returns=np.array(x)) for name, x in returns.items()])
    assert list(ranking) == ["a", "c", "b"] and ranking.win_share.tolist() == [0.5, 0.5, 0]
    assert ranking.behind.tolist() == [0, 0, 1] and ranking.behind_error.tolist() == [0, 0, 0]


def test_a_discount_makes_late_rewards_count_less(chain):
    whole, discounted = (chain.what_if(EYE[0], [], [1] * 4, discount=d) for d in (1.0, 0.5))
    reached = np.r_[1, whole.survival[:-1]]
    expected = (0.5 ** np.arange(4) * whole.reward_mean * reached).sum()
    assert discounted.return_mean == pytest.approx(expected, abs=0.02) and discounted.return_mean < whole.return_mean


def test_signals_have_the_names_of_the_config(chain):
    signals = chain.what_if(EYE[0], [], [1]).signals
    assert list(signals) == LEARNED["env.names"] and signals["second"][0] > 0.7


# The same numbers -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_moves_no_other_random_state(chain):
    before = torch.get_rng_state()
    one, same, other = (chain.what_if(EYE[0], [], [1, 0, 1], seed=seed) for seed in (3, 3, 4))
    assert one.to_dict() == same.to_dict() and one.returns.tolist() != other.returns.tolist()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_has_the_same_forecast_alone_and_among_others(chain):
    alone = chain.what_if(EYE[0], [], [1, 0, 1])
    among = chain.what_if(EYE[0], [], [[0, 0, 0], [1, 0, 1]])
    assert sorted(among) == ["plan 1", "plan 2"]
    assert among["plan 2"].returns.tolist() == alone.returns.tolist()


def test_it_is_the_roll_out_of_the_models_own_verbs():
    world = small_world(EVERY, spaces.Box(-2, 2, (2,))).requires_grad_(False)
    for parameter in world.heads.parameters():  # which predict 0 until they have learned
        parameter.copy_(torch.randn(parameter.shape, generator=generator()))
    observations, actions, plan = drawn(EVERY, 3), [[0.5, -1], [2, 0]], [[1, 1], [-2, 0]]
    forecast = what_if(world, observations, actions, plan, samples=4, seed=5)
    rows = {name: torch.as_tensor(np.stack([obs[name] for obs in observations]))[None] for name in EVERY}
    taken = torch.tensor([[[0, 0], [0.25, -0.5], [1, 0]]])
    first = torch.tensor([[True, False, False]])
    batch = Batch(world.preprocess(rows), taken, taken, torch.zeros(1, 3), first, first & False, first & False)
    state = world.trace(batch.map(lambda x: x.repeat_interleave(4, 0)), None, Sampling(generator=generator(5))).last
    tried = torch.tensor([[0.5, 0.5], [-1, 0]])
    dream = world.imagine(state, lambda feature, step: tried[step].expand(4, 2), 2, Sampling(generator=generator(6)))
    expected = {name: x.unflatten(0, (4, 2)) for name, x in world.decode(dream.feature[:, 1:].flatten(0, 1)).items()}
    for name, x in expected.items():
        mean, std = forecast.observation_mean[name], forecast.observation_std[name]
        if name in ("at", "dials", "bits", "clock", "count", "matrix"):
            np.testing.assert_allclose(mean.reshape(2, -1), x.double().mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(std.reshape(2, -1), x.double().std(0), rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_allclose(mean, x.mean(0).clamp(0, 1).movedim(1, -1) * 255, atol=0.51)
            np.testing.assert_allclose(std, x.std(0).movedim(1, -1) * 255, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(forecast.reward_mean, dream.reward.mean(0), rtol=1e-5)
    np.testing.assert_allclose(forecast.reward_std, dream.reward.std(0), rtol=1e-4)
    reached = torch.cat([torch.ones(4, 1), dream.cont[:, :1]], 1)
    np.testing.assert_allclose(forecast.returns, (dream.reward * reached).sum(1), rtol=1e-5)
    np.testing.assert_allclose(forecast.survival, dream.cont.cumprod(1).mean(0), rtol=1e-5)


def test_pieces_of_a_long_history_and_plan_are_those_of_the_whole(monkeypatch):
    world, seen = small_world(EVERY, latent="point"), drawn(EVERY, 5)  # which draws nothing
    whole = what_if(world, seen, [1, 0, 0, 1], [1] * 7, samples=3)
    monkeypatch.setattr(forecasts, "NUMBERS_AT_ONCE", 1)
    pieces = what_if(world, seen, [1, 0, 0, 1], [1] * 7, samples=3)
    for name in EVERY:
        np.testing.assert_allclose(pieces.observation_mean[name], whole.observation_mean[name], rtol=1e-5, atol=1e-4)


# Spaces -----------------------------------------------------------------------------------------------------------------

SHAPES = {
    "at": ((4, 3), np.dtype("float32")),
    "bits": ((4, 2), np.dtype("float32")),
    "camera": ((4, 16, 16, 3), np.dtype("uint8")),
    "clock": ((4, 1), np.dtype("float64")),
    "count": ((4, 2), np.dtype("float64")),
    "dials": ((4, 5), np.dtype("float32")),
    "matrix": ((4, 2, 3), np.dtype("float32")),
}
ACTIONS = {
    "Discrete": spaces.Discrete(3, start=2),
    "Box": spaces.Box(np.array([0, -10], np.float32), np.array([1, 10], np.float32)),
    "MultiDiscrete": spaces.MultiDiscrete([2, 4]),
    "MultiBinary": spaces.MultiBinary(3),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_every_space_has_its_documented_shapes(action):
    world = small_world(EVERY, action, ensemble=small("ensemble", "standard", members=2))
    forecast = what_if(world, drawn(EVERY, 3), drawn(action, 2), drawn(action, 4), samples=3)
    assert {name: (x.shape, x.dtype) for name, x in forecast.observation_mean.items()} == SHAPES
    assert {name: x.shape for name, x in forecast.observation_std.items()} == {name: shape for name, (shape, _) in SHAPES.items()}
    assert forecast.observation_std["camera"].dtype == np.float32
    np.testing.assert_allclose(forecast.observation_mean["at"].sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(forecast.observation_mean["dials"][:, :2].sum(1), 1, rtol=1e-5)
    for per_step in (forecast.reward_mean, forecast.reward_std, forecast.survival, forecast.uncertainty):
        assert per_step.shape == (4,)
    assert forecast.returns.shape == (3,) and (forecast.uncertainty > 0).all()
    assert len(forecast.signals) == 3 + 2 + 1 + 2 + 5 + 6 and "dials[1]=2" in forecast.signals


@pytest.mark.parametrize("space", [IMAGE, VECTOR, spaces.Discrete(4), EVERY], ids=["image", "vector", "discrete", "dict"])
def test_forecasts_are_json_without_their_pictures(space):
    forecast = what_if(small_world(space), drawn(space, 2), [1], [0, 1, 0], samples=2)
    plain = json.loads(json.dumps(forecast.to_dict(), allow_nan=False))
    if space is IMAGE:
        assert plain["observation_mean"] is None and np.shape(forecast.to_dict(pictures=True)["observation_mean"]) == (3, 16, 16, 3)
    elif space is EVERY:
        assert plain["observation_mean"].keys() == set(EVERY) - {"camera"} and "camera" in forecast.to_dict(True)["observation_std"]
    else:
        assert np.shape(plain["observation_mean"]) == (3, 4)
    assert plain["actions"] == [0, 1, 0] and len(plain["returns"]) == 2


def test_histories_may_be_arrays_or_lists_of_what_the_environment_gave():
    world, seen = small_world(EVERY), drawn(EVERY, 3)
    arrays = {name: np.stack([obs[name] for obs in seen]) for name in EVERY}
    one, other = (what_if(world, given, np.array([0, 1]), [1, 1]) for given in (seen, arrays))
    assert one.to_dict(True) == other.to_dict(True)
    nested = small_world(spaces.Dict({"arm.angle": VECTOR, "load": spaces.Discrete(2)}))
    given = {"arm": {"angle": np.zeros((2, 4))}, "load": [0, 1]}
    assert what_if(nested, given, [1], [0]).observation_mean.keys() == {"arm.angle", "load"}
    alone, of_one = (what_if(world, given, None, [1, 1]) for given in (seen[0], seen[:1]))
    assert alone.to_dict(True) == of_one.to_dict(True)


def test_a_model_without_a_decoder_predicts_rewards_and_survival_alone():
    world = small_world(
        latent="point",
        objective=small("objective", "jepa", probe=False),
        dynamics={"posterior": "observation"},
    )
    forecast = what_if(world, np.zeros(4), [], [1, 0])
    assert forecast.observation_mean is None and forecast.observation_std is None and not forecast.signals
    assert forecast.reward_mean.shape == (2,) and forecast.to_dict()["observation_mean"] is None


# What is refused --------------------------------------------------------------------------------------------------------

ZERO = np.zeros((2, 4), np.float32)
NAN = np.full((2, 4), np.nan, np.float32)
REFUSED = {
    "as many actions as observations": (ZERO, [0, 1], [1], "2 observations .* and 2 actions. Expected one less"),
    "an action of no category": (ZERO, [2], [1], "history's actions: action 0 holds 2, which is no category"),
    "a planned action of no category": (ZERO, [1], [0, 5], "the plan: action 1 holds 5"),
    "half an action": (ZERO, [0.5], [1], "history's actions has dtype float64"),
    "an action that is NaN": (ZERO, [1], [np.nan], "the plan: action 0 is NaN"),
    "an observation that is NaN": (NAN, [1], [1], "observation 'obs' of step 0 is not a finite"),
    "observations of another shape": (np.zeros((2, 3)), [1], [1], r"has shape \[2, 3\]; expected \[2, 4\]"),
    "words": ("hello", [], [1], "no array of numbers"),
    "another key": ({"ob": ZERO}, [1], [1], "observes no 'ob'. Did you mean 'obs'"),
    "no plan": (ZERO, [1], [], "the plan holds no actions"),
    "no plans": (ZERO, [1], {}, "there is no plan"),
    "plans of different lengths": (ZERO, [1], {"a": [1], "b": [1, 0]}, "different lengths"),
    "a plan beyond memory": (ZERO, [1], np.zeros(10**6, np.int64), "Expected at most [0-9]+ actions"),
    "a deep plan": (ZERO, [1], [[[1]]], "'plan 1' has shape"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_fits_no_space_is_refused_with_what_is_wrong(case):
    observations, actions, plan, message = case
    with pytest.raises(ConfigError, match=message):
        what_if(small_world(), observations, actions, plan)


def test_actions_outside_of_a_box_are_refused_and_its_bounds_are_not():
    world = small_world(action=spaces.Box(np.float32([0, -10]), np.float32([0.1, 10])))
    assert what_if(world, ZERO[0], [], np.array([[0.1, 10]])).actions.dtype == np.float32  # 0.1 is more in float64
    with pytest.raises(ConfigError, match=r"the plan: action 1 is \[0.0, 11.0\], outside of Box"):
        what_if(world, ZERO[0], [], [[0, 1], [0, 11]])
    with pytest.raises(ConfigError, match="history's actions: action 0"):
        what_if(world, ZERO, [[0, -11]], [[0, 1]])


def test_keys_that_lack_or_are_unknown_are_named():
    world, seen = small_world(EVERY), drawn(EVERY, 1)[0]
    with pytest.raises(ConfigError, match=r"lack \['camera'\]"):
        what_if(world, {name: x for name, x in seen.items() if name != "camera"}, [], [1])
    with pytest.raises(ConfigError, match=r"observes no 'clok'. Did you mean 'clock'"):
        what_if(world, {**seen, "clok": 1}, [], [1])
    with pytest.raises(ConfigError, match="'at' of step 0 holds 4"):
        what_if(world, {**seen, "at": 4}, [], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"samples": 1}, "no spread"), ({"samples": 0}, "samples is 0"), ({"discount": 1.5}, "discount is 1.5")],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        what_if(small_world(), ZERO[0], [], [1], **options)


def test_a_diverged_model_is_an_error_and_no_answer():
    world = small_world()
    with torch.no_grad():
        next(world.heads.parameters()).fill_(torch.nan)
    with pytest.raises(NumericsError, match="not finite at step 0 of 'plan'"):
        what_if(world, ZERO[0], [], [1])


# The command line -------------------------------------------------------------------------------------------------------


def test_a_newcomer_asks_without_any_file(chain, command):  # noqa: F811
    code, out, err = command("what-if", chain.path, "--plan", "0x4", "--plan", "climb=1x4", "--episode", 0, "--step", 0)
    text = " ".join(out.replace("│", " ").split())
    assert code == 0 and not err, err
    assert text.index("climb") < text.index("0x4") and "fourth" in text
    assert f"{chain.path},episode0,step0" in text.replace(" ", "")  # the table folds long paths


def test_json_is_one_object_of_plans_best_first(chain, command):  # noqa: F811
    code, out, _ = command("what-if", chain.path, "--plan", "0x4", "--plan", "0x1,1x3", "--step", 0, "--samples", 4, "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"env_id", "run", "step", "history", "samples", "seed", "discount", "plans"}
    assert found["env_id"] == CHAIN and found["step"] == 121 and found["samples"] == 4
    assert found["history"] == {"source": str(chain.path), "episode": recording(chain).episodes - 1, "step": 0}
    best, other = found["plans"]
    assert best["name"] == "0x1,1x3" and best["actions"] == [0, 1, 1, 1] and best["win_share"] > other["win_share"]
    assert np.shape(best["observation_mean"]) == (4, 5) and best["names"] == {"obs": LEARNED["env.names"]}


def test_the_replay_is_a_history_up_to_its_step(chain):
    whole = recording(chain).episode(1)
    asked = of_files(chain, {"plan": [1, 1]}, episode=1, step=3)
    same = chain.what_if(whole["observations"][:4], whole["actions"][:3], {"plan": [1, 1]})
    assert asked["plans"] == same.to_dict()["plans"]


def test_histories_and_plans_are_read_from_files(chain, tmp_path):
    seen = EYE[[0, 1, 2]]
    (tmp_path / "history.json").write_text(json.dumps({"observations": seen.tolist(), "actions": [1, 1]}))
    np.savez(tmp_path / "history.npz", observations=seen, actions=[1, 1])
    (tmp_path / "plan.json").write_text("[1, 0]")
    (tmp_path / "plans.json").write_text(json.dumps({"a": [1, 0], "b": [0, 1]}))
    np.savez(tmp_path / "plans.npz", a=[1, 0], b=[0, 1])
    expected = chain.what_if(seen, [1, 1], {"a": [1, 0], "b": [0, 1]}).to_dict()["plans"]
    for history in ("history.json", "history.npz"):
        for plans in ("plans.json", "plans.npz"):
            assert of_files(chain, [str(tmp_path / plans)], tmp_path / history)["plans"] == expected
    (alone,) = of_files(chain, [str(tmp_path / "plan.json")], tmp_path / "history.json")["plans"]
    assert alone["name"] == "plan" and alone["returns"] == next(p["returns"] for p in expected if p["name"] == "a")
    recording(chain).write(tmp_path / "episodes.npz")
    asked = [of_files(chain, ["1x2"], source, episode=2, step=1)["plans"] for source in (None, tmp_path / "episodes.npz")]
    assert asked[0] == asked[1]


def test_a_dict_history_has_an_array_for_each_key(tmp_path):
    from worldmodel.commands.what_if import _arrays, _named

    np.savez(tmp_path / "h.npz", **{"observations/arm": np.ones((2, 3)), "observations/load": [0, 1], "actions": [1]})
    observations, actions = _named(_arrays(tmp_path / "h.npz"), "h.npz")
    assert observations["arm"].shape == (2, 3) and observations["load"].tolist() == [0, 1] and actions.tolist() == [1]


SPELLED = {
    "1x3": (spaces.Discrete(2), [1, 1, 1]),
    "0x1, 1x2": (spaces.Discrete(2), [0, 1, 1]),
    "[0.5,-1]x2": (spaces.Box(-1, 1, (2,)), [[0.5, -1], [0.5, -1]]),
    "-0.5x1,[1,0]x1": (spaces.Box(-1, 1, (2,)), [[-0.5, -0.5], [1, 0]]),
}


@pytest.mark.parametrize("text", SPELLED)
def test_constant_actions_are_spelled_with_an_x(text):
    from worldmodel.commands.what_if import _spelled
    from worldmodel.spaces import ActionSpec

    space, expected = SPELLED[text]
    assert _spelled(text, ActionSpec.from_space(space)).tolist() == expected


BAD_PLANS = {
    **{"1": "expected ACTIONxCOUNT", "1x": "expected ACTIONxCOUNT", "1x3;0x2": "expected ACTIONxCOUNT", "ax3": "'a' is no action"},
    **{"[1,1]x2": "no action of Discrete", "1x0": "1 to 1,000,000", "1x9999999999": "1 to 1,000,000", "2x3": "no category"},
    **{"no.json": "is no file", "a=1x2": "called 'a'"},
}


@pytest.mark.parametrize("text", BAD_PLANS)
def test_plans_that_cannot_be_read_are_refused(chain, text):
    with pytest.raises(ConfigError, match=BAD_PLANS[text]):
        of_files(chain, [text, "a=1x3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episode": 10_000}, "none of number 10000"),
        ({"episode": 0, "step": 10_000}, "has [0-9]+ steps, and none of number 10000"),
        ({"history": "absent.json"}, "no file"),
        ({"history": "ob.json"}, r"holds \['observation'\]"),
        ({"history": "empty.json"}, "has no observations"),
        ({"history": "words.json"}, "is no JSON"),
        ({"history": "one.json", "step": 1}, "--episode and --step choose"),
    ],
)
def test_histories_that_cannot_be_read_are_refused(chain, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ob.json").write_text('{"observation": [], "actions": []}')
    (tmp_path / "empty.json").write_text('{"actions": []}')
    (tmp_path / "words.json").write_text("hello")
    (tmp_path / "one.json").write_text('{"observations": [[1, 0, 0, 0, 0]], "actions": []}')
    with pytest.raises(ConfigError, match=message):
        of_files(chain, ["1x2"], **options)


def test_arrays_that_could_run_code_are_not_opened(chain, tmp_path):
    np.savez(tmp_path / "objects.npz", observations=np.array([{}], object), actions=[])
    with pytest.raises(CorruptError, match="expected numbers"):
        of_files(chain, ["1x2"], tmp_path / "objects.npz")
