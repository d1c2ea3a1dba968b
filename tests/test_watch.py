"""Held-out episodes, what TensorBoard shows of them, and `dream`: nothing of it may reach the training."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import CHAIN, all_weights, generator, sequence, small_dreamer
from PIL import Image
from small_runs import small_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from worldmodel import registry
from worldmodel.agents.evaluation import EvaluationAborted
from worldmodel.agents.held_out import collect
from worldmodel.agents.random import RandomAgent
from worldmodel.agents.rollouts import returns
from worldmodel.agents.training.held_out_callback import HeldOutCallback
from worldmodel.cli import app
from worldmodel.commands import console
from worldmodel.commands.dream import dream
from worldmodel.data import Sampling
from worldmodel.dynamics import Dynamics
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError
from worldmodel.storage.run import Run
from worldmodel.view import tensorboard

CATCH = "worldmodel.envs:Catch-v0"
DRAWN = {"log.tensorboard": True, "log.pictures": 40, "log.held_out": 3}


@pytest.fixture(scope="module")
def chain_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "chain"
    small_train(folder, 60, options=DRAWN)
    return folder


@pytest.fixture(scope="module")
def cartpole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "cartpole"
    small_train(folder, 60, "CartPole-v1", options=DRAWN)
    return folder


@pytest.fixture(scope="module")
def catch_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "catch"
    small = {f"model.{part}.depth": 2 for part in ("encoder", "decoder")}
    small_train(folder, 60, CATCH, options={**DRAWN, **small, "train.prefill": 40})
    return folder


# Held-out episodes ------------------------------------------------------------------------------------------------------


def test_held_out_episodes_are_whole_and_aligned():
    """On the chain every next cell, reward and flag is known from the cell and the action."""
    episodes = collect(small_dreamer(Chain()), CHAIN, 4)
    rows = sequence(episodes.rows)
    assert len(episodes.lengths) == 4 and int(episodes.lengths.sum()) == len(rows.reward)
    cells = rows.obs["obs"].argmax(-1)
    for offset, length in zip(episodes.offsets.tolist(), episodes.lengths.tolist()):
        cell = cells[offset : offset + length]
        assert cell[0] == 0 and bool(rows.is_last[offset + length - 1]) and int(rows.is_last[offset : offset + length].sum()) == 1
        assert bool(rows.is_terminal[offset + length - 1]) == (int(cell[-1]) == 4) or length == 21
        moves = rows.action[offset : offset + length - 1].argmax(-1)
        assert torch.equal(cell[1:], (cell[:-1] + 2 * moves - 1).clamp(min=0))
        assert torch.equal(rows.prev_action[offset + 1 : offset + length], rows.action[offset : offset + length - 1])
        expected = torch.where(cell == 4, 1.0, (cell - 4) / 10)
        torch.testing.assert_close(rows.reward[offset + 1 : offset + length], expected[1:])
        assert not rows.action[offset + length - 1].any() and not rows.prev_action[offset].any()


def test_one_action_in_five_is_random():
    agent = small_dreamer(Chain())
    actions = [collect(agent, CHAIN, 3, random=share).rows.action[0].argmax(-1) for share in (0.0, 0.0, 1.0)]
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])


def test_collecting_changes_nothing_of_the_agent():
    agent = small_dreamer(Chain()).learn(30)

    def everything() -> list:
        torch_states = [g.get_state() for g in (agent.generator, agent.policy.generator)]
        return [all_weights(agent), *torch_states, torch.from_numpy(np.random.get_state()[1]), torch.get_rng_state()]

    before, rng, added, belief = everything(), agent.rng.bit_generator.state, agent.replay.added, agent._belief
    collect(agent, CHAIN, 2)
    assert all(map(torch.equal, before, everything()))
    assert agent.rng.bit_generator.state == rng and agent.replay.added == added and agent._belief is belief


def test_episodes_can_be_cut_and_given_up():
    agent = small_dreamer(Chain())
    cut = collect(agent, CHAIN, 3, steps=2)
    assert cut.lengths.tolist() == [3, 3, 3] and not cut.rows.is_last.any()
    with pytest.raises(EvaluationAborted):
        collect(agent, CHAIN, 1, should_abort=lambda: True)


@pytest.mark.parametrize("env_id", [CHAIN, CATCH, "Pendulum-v1"])
def test_a_run_that_is_measured_learns_what_an_unmeasured_one_learns(tmp_path, env_id):
    small = {f"model.{part}.depth": 2 for part in ("encoder", "decoder")} | {"train.prefill": 30, "env.max_episode_steps": 25}
    small["eval.stop_when_solved"] = False  # few steps of the pendulum cost little
    runs = []
    for name, log in (("plain", {"log.tensorboard": False}), ("watched", {**DRAWN, "log.pictures": 30})):
        small_train(tmp_path / name, 50, env_id, options={**small, **log})
        runs.append(Run.open(tmp_path / name))
    (one, state, _), (other, other_state, _) = (run.read() for run in runs)
    assert state["counters"] == other_state["counters"] and state["rng"] == other_state["rng"]
    for file, arrays in one.items():
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, other[file][name], err_msg=f"{file}.{name}")
    assert runs[0].replay().added_by_stream == runs[1].replay().added_by_stream
    assert runs[0].result["real_steps"] == runs[1].result["real_steps"] == 50


# TensorBoard ------------------------------------------------------------------------------------------------------------


def events(folder) -> EventAccumulator:
    """Read as TensorBoard reads by default."""
    return EventAccumulator(str(folder)).Reload()


def test_a_run_shows_scalars_videos_figures_and_its_config(cartpole_run):
    seen = events(cartpole_run)
    tags = set(seen.Tags()["scalars"])
    assert {f"world/{name}/{h}" for name in ("open_loop", "persistence", "open_loop_reward") for h in (1, 2, 3)} <= tags
    assert {"dream/gap", "dream/imagined_return", "dream/real_return", "dream/return", "world/gradient_norm", "world/rate"} <= tags
    assert {"world/loss/observation", "world/loss/dyn", "world/active_units", "eval/mean_reward"} <= tags
    gap = {name: seen.Scalars(f"dream/{name}")[-1].value for name in ("gap", "imagined_return", "real_return")}
    assert gap["gap"] == pytest.approx(gap["imagined_return"] - gap["real_return"], rel=1e-4)
    pictures = {"dream/video", "dream/signals", "world/open_loop_curve", "latent/usage", "latent/traversal", "latent/interpolation"}
    assert set(seen.Tags()["images"]) == pictures
    assert [event.step for event in seen.Images("dream/video")] == [40, 60]
    shown = tensorboard.read(cartpole_run)
    assert "CartPole-v1" in shown.texts["config"][0][1]
    assert seen.SummaryMetadata("_hparams_/experiment").plugin_data.plugin_name == "hparams"


@pytest.mark.parametrize("run", ["cartpole_run", "catch_run"])
def test_the_video_is_an_animation_that_pillow_reads(run, request):
    videos = tensorboard.read(request.getfixturevalue(run)).images["dream/video"]
    for _, data in videos:
        video = Image.open(io.BytesIO(data))
        assert data[:6] == b"GIF89a" and video.n_frames > 5 and video.info["loop"] == 0
        video.seek(0)
        first = np.asarray(video.convert("RGB")).astype(int)
        video.seek(video.n_frames - 1)
        assert np.abs(first - np.asarray(video.convert("RGB"))).max() > 100


def test_what_cannot_be_drawn_is_plotted_and_what_is_a_picture_is_not(chain_run, catch_run):
    plotted, drawn = (set(events(folder).Tags()["images"]) for folder in (chain_run, catch_run))
    assert "dream/signals" in plotted and "dream/video" not in plotted
    assert "dream/video" in drawn and "dream/signals" not in drawn


def test_horizons_that_fit_into_no_episode_are_left_out(catch_run):
    tags = events(catch_run).Tags()["scalars"]  # seven steps: behind a context of five rows there are three
    assert "world/open_loop/3" in tags and "world/open_loop/5" not in tags and "world/open_loop/15" not in tags


@pytest.mark.parametrize("run", ["chain_run", "catch_run"])
def test_the_projector_finds_latents_with_metadata_and_thumbnails(run, request):
    folder = request.getfixturevalue(run)
    head, *rows = (folder / "projector/metadata.tsv").read_text().splitlines()
    assert head.split("\t") == ["episode", "step", "reward", "value"]
    assert len(rows) == len((folder / "projector/tensors.tsv").read_text().splitlines()) > 10
    assert (folder / "projector/sprite.png").exists() == (run == "catch_run")


def test_a_run_without_tensorboard_or_without_pictures_shows_nothing(tmp_path):
    small_train(tmp_path / "a", 30, options={"log.tensorboard": False})
    assert not list((tmp_path / "a").glob("events*")) and not (tmp_path / "a/projector").exists()
    small_train(tmp_path / "b", 30, options={"log.tensorboard": True, "log.pictures": 0})
    assert events(tmp_path / "b").Tags()["images"] == []


def test_the_callback_works_in_an_sb3_script_and_says_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match="tensorboard_log"):
        small_dreamer().learn(10, callback=HeldOutCallback(5))
    model = small_dreamer(tensorboard_log=str(tmp_path)).learn(40, callback=HeldOutCallback(20, episodes=2, horizon=3))
    (folder,) = tmp_path.iterdir()
    assert [event.step for event in events(folder).Scalars("dream/gap")] == [20, 40] and model.num_timesteps == 40
    with pytest.raises(ConfigError, match="at least 1"):
        HeldOutCallback(every=0)


def test_a_model_whose_environment_has_no_id_is_measured_in_the_one_that_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"without an id.*env='ID'"):
        small_dreamer(Chain(limit=7), tensorboard_log=str(tmp_path)).learn(10, callback=HeldOutCallback(5))
    small_dreamer(Chain(limit=7), tensorboard_log=str(tmp_path)).learn(40, callback=HeldOutCallback(20, env=CHAIN, episodes=2))
    assert "dream/gap" in events(max(tmp_path.iterdir())).Tags()["scalars"]


def test_an_agent_without_a_critic_is_measured_without_values(tmp_path):
    folder = tmp_path / "run"
    small_train(folder, 40, options={**DRAWN, "agent": "random"})
    assert (folder / "projector/metadata.tsv").read_text().startswith("episode\tstep\treward\n")
    assert "dream/gap" in events(folder).Tags()["scalars"] and isinstance(Run.open(folder).agent(), RandomAgent)


# The same figures in both ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch") / "long"
    options = {**DRAWN, "log.pictures": 1000, "log.held_out": 2, "eval.every": 0, "eval.episodes": 1, "eval.max_steps": 225}
    small_train(folder, 30, "Acrobot-v1", options=options)
    lines = []
    return folder, dream(folder, horizon=15, log=lines.append), lines


def test_tensorboard_and_dream_tell_the_same_of_the_same_run(long_run):
    folder, result, _ = long_run
    shown = events(folder)
    for horizon in (1, 15):
        for tag, key in (("open_loop", "observation"), ("persistence", "persistence"), ("open_loop_reward", "reward")):
            shown_value = shown.Scalars(f"world/{tag}/{horizon}")[-1].value
            assert shown_value == pytest.approx(result[key][horizon - 1], rel=1e-4), (tag, horizon)
        for name in ("crps", "coverage50", "coverage90", "spread_skill", "spread_knows", "reward_gap"):
            value = shown.Scalars(f"dream/{name}/{horizon}")[-1].value
            assert value == pytest.approx(result[name][horizon - 1], rel=1e-4, abs=1e-6), (name, horizon)
        assert result["reward_gap_low"][horizon - 1] <= result["reward_gap"][horizon - 1] <= result["reward_gap_high"][horizon - 1]
        assert shown.Scalars(f"world/ratio/{horizon}")[-1].value == pytest.approx(result["ratio"][horizon - 1], rel=1e-4)
    assert list(result["ratio_by_part"]) == ["0-50", "50-200", "200-"]
    for part, ratios in result["ratio_by_part"].items():
        assert shown.Scalars(f"world/ratio_by_part/{part}")[-1].value == pytest.approx(ratios[-1], rel=1e-4)
    assert len({ratios[-1] for ratios in result["ratio_by_part"].values()}) == 3


def test_one_sentence_says_where_a_dream_is_worse_than_nothing(long_run, capsys):
    _, result, lines = long_run
    worse = [part for part, ratios in result["ratio_by_part"].items() if ratios[-1] > 1]
    (sentence,) = [line for line in lines if "nothing changes" in line]  # 3 updates have taught it little
    assert worse and all(f"in steps {part}" in sentence for part in worse)
    console.show_dream(result)
    out = capsys.readouterr().out
    assert "ratio at horizon 15 in steps 200-" in out and "coverage90" in out and " to " in out


# Returns ----------------------------------------------------------------------------------------------------------------


def test_imagined_returns_count_rewards_by_the_chance_to_reach_them():
    agent = small_dreamer(Chain(limit=7))
    world = agent.policy.world
    world.heads.reward, world.heads.cont = (lambda feature, x=x: torch.full(feature.shape[:-1], x) for x in (2.0, 0.5))
    episodes = collect(agent, CHAIN, 3)
    imagined, real = returns(agent, episodes, generator(), steps=4)
    assert imagined.tolist() == [2.0 * (1 + 0.5 + 0.25 + 0.125)] * 3
    rows = episodes.rows.reward[0]
    expected = [float(rows[o + 1 : o + min(int(n), 5)].sum()) for o, n in zip(episodes.offsets, episodes.lengths)]
    assert real.tolist() == pytest.approx(expected)


def test_a_dream_counts_no_steps_behind_a_truncation_but_all_behind_an_end():
    agent = small_dreamer(Chain(limit=7))
    agent.policy.world.heads.reward = lambda feature: torch.ones(feature.shape[:-1])
    agent.policy.world.heads.cont = lambda feature: torch.ones(feature.shape[:-1])
    cut = collect(agent, CHAIN, 1, steps=3)
    assert returns(agent, cut, generator(), steps=10)[0].tolist() == [3.0]
    ended = cut.rows.map(torch.clone)
    ended.is_terminal[0, -1] = ended.is_last[0, -1] = True
    assert returns(agent, type(cut)(ended), generator(), steps=10)[0].tolist() == [10.0]


# The command ------------------------------------------------------------------------------------------------------------

KEYS = "env_id run context horizons observation persistence reward continue ratio out".split()


def test_dream_prints_one_object_with_a_number_or_null_a_horizon(cartpole_run):
    done = CliRunner().invoke(app, ["dream", str(cartpole_run), "--horizon", "600", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(KEYS) <= set(result) and result["horizons"] == list(range(1, 601)) and result["context"] == 5
    for name in ("observation", "persistence", "reward", "continue", "ratio"):
        assert len(result[name]) == 600 and result[name][0] is not None and result[name][-1] is None
    assert result["ratio"][2] == pytest.approx(result["observation"][2] / result["persistence"][2])
    assert "fit into none" in done.stderr and result["worst"]["name"].startswith(("cart", "pole"))


def test_dream_gives_the_same_figures_each_time_and_leaves_the_run_as_it_was(chain_run):
    before = {file: file.stat().st_mtime_ns for file in chain_run.rglob("*") if file.is_file()}
    assert dream(chain_run, horizon=4) == dream(chain_run, horizon=4)
    assert {file: file.stat().st_mtime_ns for file in chain_run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("run", ["chain_run", "cartpole_run", "catch_run"])
@pytest.mark.parametrize("start", ["replay", "prior"])
def test_dream_writes_a_video_and_a_figure(run, start, request, tmp_path):
    result = dream(request.getfixturevalue(run), horizon=6, start=start, out=tmp_path / "deep/video.gif", episodes=20)
    video = Image.open(tmp_path / "deep/video.gif")
    assert video.n_frames >= (4 if start == "replay" else 7) and result["out"] == str(tmp_path / "deep/video.gif")
    assert (tmp_path / "deep/video.png").exists() == (start == "replay")
    assert (result["observation"][0] is None) == (start == "prior")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(["--out", "video.webm"], r"\.gif"), (["--context", "0"], "context"), (["--start", "nowhere"], "nowhere")],
)
def test_a_dream_that_cannot_be_is_a_usage_error(chain_run, arguments, match):
    done = CliRunner().invoke(app, ["dream", str(chain_run), *arguments])
    assert done.exit_code == 2 and match.replace("\\", "") in done.output + done.stderr


def test_a_run_without_a_decoder_is_measured_by_reward_and_refused_a_video(tmp_path, monkeypatch):
    class Blind(registry.part("objective", "reconstruction")):
        """Reads no observation back."""

        @property
        def decoder(self):
            return None

        @decoder.setter
        def decoder(self, value):
            pass

        def forward(self, trace, batch, sampling, dynamics):
            return {}

    monkeypatch.setitem(registry._entries, ("objective", "reconstruction"), registry.Entry(*_entry(Blind)))
    folder = tmp_path / "run"
    small_train(folder, 40, options=DRAWN)
    tags = events(folder).Tags()
    assert "world/open_loop_reward/1" in tags["scalars"] and "world/open_loop/1" not in tags["scalars"]
    assert not {"dream/video", "dream/signals", "latent/traversal"} & set(tags["images"])
    result = dream(folder, horizon=3)
    assert result["observation"] == [None] * 3 and result["reward"][0] is not None
    with pytest.raises(ConfigError, match="learns no decoder"):
        dream(folder, horizon=3, out=tmp_path / "video.gif")


def _entry(part):
    return registry.config_class("objective", "reconstruction"), part


def test_dynamics_without_an_initial_distribution_are_refused_a_dream_from_nothing(chain_run, monkeypatch):
    monkeypatch.delattr(Dynamics, "sample_initial")
    with pytest.raises(ConfigError, match="no initial distribution"):
        dream(chain_run, horizon=3, start="prior")


def test_a_dream_from_nothing_begins_as_the_initial_prior_says(chain_run):
    world = Run.open(chain_run).world_model()
    one, same, other = (world.sample_initial(5, Sampling(generator=generator(seed)))["z"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_evaluations_are_recorded_and_one_that_does_not_render_is_drawn_as_signals(cartpole_run, tmp_path):
    done = CliRunner().invoke(app, ["eval", str(cartpole_run), "--episodes", "1", "--video", str(tmp_path / "play.gif")])
    assert done.exit_code == 0 and Image.open(tmp_path / "play.gif").n_frames > 3
    small_train(tmp_path / "nervous", 30, "Nervous-v0", options={"log.tensorboard": False, "eval.every": 0, "eval.episodes": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Gymnasium's about render modes among them
        done = CliRunner().invoke(app, ["eval", str(tmp_path / "nervous"), "--episodes", "1", "--video", str(tmp_path / "no.gif")])
    assert done.exit_code == 0 and "does not render" in done.stderr, done.output
    video = Image.open(tmp_path / "no.gif")
    assert video.size == (600, 22 + 96 + 20 + 4) and video.n_frames == 7
