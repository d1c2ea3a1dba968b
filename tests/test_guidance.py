"""Where dreams begin: guided by a score, at recorded rows, and between them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import generator, small, small_latent, small_world
from small_runs import CHAIN, OPTIONS
from typer.testing import CliRunner

from worldmodel import ConfigError, Run, registry
from worldmodel.agents.guidance import Guidance, ReplayPosition, interpolate_features, interpolation_video, state_at
from worldmodel.cli import app
from worldmodel.commands.dream import dream
from worldmodel.commands.train import train
from worldmodel.data import Sampling
from worldmodel.diagnostics.geometry import spherical
from worldmodel.distributions import tilted

GAUSSIAN = {name: value for name, value in OPTIONS.items() if not name.startswith("model.dynamics.latent")}
GAUSSIAN |= {"model.dynamics.latent.kind": "gaussian", "model.dynamics.latent.size": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "old"
    train(CHAIN, steps=60, run_dir=folder, overrides=GAUSSIAN, device="cpu")
    return Run.open(folder)


@pytest.mark.parametrize("steps", [0, 20], ids=["weighed", "and moved"])
def test_a_tilted_normal_distribution_is_moved_by_the_score(steps):
    prior = registry.build("distribution", small("distribution", "gaussian", standard=True), small_latent("gaussian"), 0)
    x, size = tilted(prior, lambda z: z[:, 0], 2000, 1.0, Sampling(generator=generator()), pool=20_000, steps=steps)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, 0.0]), atol=0.08, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(2), atol=0.08, rtol=0)
    assert size / 20_000 == pytest.approx(math.exp(-1), rel=0.1)  # 1 / E w^2 for weights of a moved normal prior
    far = tilted(prior, lambda z: z[:, 0], 10, 5.0, Sampling(generator=generator()))
    assert far[1] < 5 and (steps == 0 or len(x.unique(dim=0)) == 2000)


def test_a_distribution_of_categories_is_tilted_without_moving_between_them():
    prior = registry.build("distribution", small("distribution", "categorical"), small_latent("categorical"), 0)
    x, size = tilted(prior, lambda z: z[:, 0], 500, 50.0, Sampling(generator=generator()))
    assert (x[:, 0] == 1).all() and set(x.unique().tolist()) == {0.0, 1.0} and 400 < size < 1000


def test_guided_starts_score_higher_and_carry_what_an_episode_begins_with():
    world = small_world(latent="gaussian").eval()
    for p in world.heads.reward_net.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator())
    usual = world.sample_initial(500, Sampling(generator=generator()))
    guided, size = world.sample_initial_tilted(world.heads.reward, 500, 5.0, Sampling(generator=generator()))
    torch.testing.assert_close(guided["h"], usual["h"])
    assert guided["z"].shape == usual["z"].shape and size > 1
    rewards = [world.heads.reward(world.dynamics.feature(state)).mean() for state in (guided, usual)]
    assert rewards[0] > rewards[1] + 0.05


def test_a_position_is_the_filters_state_at_that_row(run):
    world, replay = run.world_model(), run.replay()
    rows = replay.stream(0)
    trace = world.trace(rows.with_obs(world.preprocess(rows.obs)), None, Sampling(mode=True))
    second = int(rows.is_first[0].nonzero()[1])
    state = state_at(world, replay, ReplayPosition(1, 2))
    for name, x in state.items():
        torch.testing.assert_close(x[0], trace.states[name][0, second + 2])
    with pytest.raises(ConfigError, match="rows, and none of number 5000"):
        state_at(world, replay, ReplayPosition(0, 5000))
    with pytest.raises(ConfigError, match="counted from 0"):
        state_at(world, replay, ReplayPosition(5000, 0))
    with pytest.raises(ConfigError, match="EPISODE:STEP"):
        ReplayPosition.parse("4")


def test_the_arc_keeps_the_length_that_the_line_loses():
    one, other = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    arc = spherical(one, other, torch.linspace(0, 1, 5).unsqueeze(-1))
    torch.testing.assert_close(arc.norm(dim=-1), torch.full((5,), 2.0))
    torch.testing.assert_close(arc[2], torch.tensor([2**0.5, 2**0.5, 0.0]))


def test_pairs_without_an_arc_get_the_line_and_others_beside_them_their_arc():
    one = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    other = torch.tensor([[-2.0, 0.0], [6.0, 0.0], [0.0, 2.0]])
    middle = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2**0.5, 2**0.5]])
    torch.testing.assert_close(spherical(one, other, 0.5), middle)
    assert spherical(torch.zeros(2), other, 0.5).isfinite().all()


def test_what_lies_between_begins_and_ends_at_the_positions(run):
    world = run.world_model()
    ends = [world.dynamics.feature(state_at(world, run.replay(), ReplayPosition(0, step)))[0] for step in (0, 3)]
    for path in interpolate_features(world, *ends, 7):
        assert path.shape == (7, world.feature_dim)
        torch.testing.assert_close(path[[0, -1]], torch.stack(ends))


def test_dreams_toward_reward_value_and_goal_say_how_far_they_were_guided(run, tmp_path):
    for guide in (Guidance("reward", 3.0), Guidance("value", 3.0), Guidance("goal", 2.0, ReplayPosition(0, 1))):
        report = dream(run, 2, 3, "prior", tmp_path / f"{guide.toward}.gif", guide=guide)["guided"]
        assert (
            report["toward"] == guide.toward and report["effective"] > 0 and (tmp_path / f"{guide.toward}.gif").stat().st_size > 500
        )
    assert report["score"] > report["score_unguided"]
    assert dream(run, 2, 3, "prior")["guided"] is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--toward", "reward"], "--start prior"),
        (["--start", "prior", "--goal", "0:1"], "--toward goal"),
        (["--start", "prior", "--toward", "goal"], "belong together"),
        (["--between", "0:0,0:3"], "--out"),
        (["--between", "0:0", "--out", "x.gif"], "two moments"),
        (["--start", "prior", "--guidance", "3"], "--toward pulls"),
        (["--between", "0:0,0:3", "--out", "x.gif", "--toward", "reward", "--guidance", "1"], "--toward, --guidance"),
        (["--between", "0:0,0:3", "--out", "x.gif", "--goal", "0:1"], "--goal"),
        (["--between", "0:0,0:3", "--out", "x.gif", "--start", "replay"], "--start"),
        (["--between", "0:0,0:3", "--out", "x.gif", "--context", "5", "--horizon", "50"], "--context, --horizon"),
    ],
)
def test_options_that_do_not_go_together_say_what_is_missing(run, words, part):
    result = CliRunner().invoke(app, ["dream", str(run.path), *words])
    assert result.exit_code == 2 and part in result.stderr


def test_the_command_shows_what_lies_between(run, tmp_path):
    words = ["dream", str(run.path), "--between", "0:0,0:3", "--out", str(tmp_path / "x.gif"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    result_json = json.loads(result.stdout)
    assert list(result_json) == ["run", "between", "steps", "distance", "line_norm", "arc_norm", "out"]
    assert len(result_json["line_norm"]) == 25 and (tmp_path / "x.gif").read_bytes()[:3] == b"GIF"
    assert interpolation_video(run, "0:0", "0:3", tmp_path / "y.gif")["distance"] == pytest.approx(result_json["distance"])
