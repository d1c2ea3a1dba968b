"""What the commands say to a person: tables, lists of options, warnings, videos, help."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import small_dreamer
from small_runs import CHAIN, OPTIONS, small_train, words
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from typer.main import get_command
from typer.testing import CliRunner

from worldmodel.agents.arguments import read_config
from worldmodel.agents.training import resources
from worldmodel.cli import app
from worldmodel.config import Config, describe
from worldmodel.envs.make import make_vec
from worldmodel.envs.tiny import Chain
from worldmodel.errors import ConfigError
from worldmodel.view import pictures


def command(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, what it said) of a run that is shown in TensorBoard and learns nothing."""
    folder, said = tmp_path_factory.mktemp("commands") / "run", []
    small_train(folder, 10, options={"log.tensorboard": True, "eval.every": 5}, log=said.append)
    return folder, said


# Training ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_ends_within_the_prefill_says_that_nothing_will_be_learned(run, tmp_path):
    (line,) = [line for line in run[1] if "othing will be learned" in line]
    assert "after 10 steps" in line and "first 16" in line and "--steps" in line
    said = []
    small_train(tmp_path / "run", 17, options={"eval.every": 0, "eval.episodes": 1}, log=said.append)
    assert not [line for line in said if "othing will be learned" in line]


def test_memory_is_mentioned_only_where_it_is_much_of_what_is_free(run, tmp_path, monkeypatch):
    assert not [line for line in run[1] if "The replay" in line]
    monkeypatch.setattr(resources, "free_memory", lambda: 50_000)
    said = []
    small_train(tmp_path / "run", 10, options={"eval.every": 0, "eval.episodes": 1}, log=said.append)
    (line,) = [line for line in said if "The replay" in line]
    assert "1,000 steps" in line and "train.capacity" in line


def test_the_machine_says_how_much_memory_is_free():
    free = resources.free_memory()
    assert free is None or 1e6 < free < 1e15


def test_the_hparams_page_shows_what_differs_from_the_defaults(run):
    content = EventAccumulator(str(run[0])).Reload().PluginTagToContent("hparams")
    shown = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert {"env.id", "train.prefill", "model.dynamics.deter"} <= set(shown)
    config = read_config(CHAIN, {**OPTIONS, "log.tensorboard": True, "eval.every": 5, "train.steps": 10})
    same = {row.key for row in describe(Config) if row.default == {r.key: r.default for r in describe(config)}.get(row.key)}
    assert {"checkpoint.keep", "train.lr"} <= same and not set(shown) & same


# Answers ----------------------------------------------------------------------------------------------------------------


def test_the_final_return_says_of_which_episodes(tmp_path):
    done = command("train", CHAIN, *words({"eval.every": 0}), "--steps", 17, "--run", tmp_path / "run")
    text = " ".join(done.stdout.replace("│", " ").split())
    assert done.exit_code == 0 and "(mean of 2 greedy episodes of seeds 30000 to 30001)" in text
    assert json.loads(command("train", tmp_path / "run", "--resume", "--json").stdout)["final_episodes"] == 2


def test_tables_at_80_columns_cut_no_heading_and_drop_what_is_empty(capsys):
    from worldmodel.commands.console import show_dream, table

    measured = ("observation", "persistence", "ratio", "reward", "continue", "crps", "coverage50", "coverage90", "spread_skill")
    measured += ("spread_knows", "reward_gap", "reward_gap_low", "reward_gap_high")
    numbers = dict.fromkeys(measured, [1234.5678] * 3)
    result = {"env_id": "a", "run": "runs/" + 90 * "q", "step": 1, "context": 5, "out": None, "worst": None, "ratio_by_part": {}}
    show_dream({**result, **numbers, "horizons": [1, 2, 3], "uncertainty": [12.5] * 3})
    out = capsys.readouterr().out
    headings = "horizon observation persistence ratio reward continue uncertainty crps coverage50 coverage90 spread skill".split()
    assert [h for h in headings if not re.search(rf"\b{h}\b", out)] == [] and max(map(len, out.splitlines())) <= 80
    assert out.count("q") == 90 and "…" not in out and "1234.57" in out
    show_dream({**result, **numbers, "horizons": [1, 2, 3], "uncertainty": [None] * 3})
    assert "uncertainty" not in capsys.readouterr().out
    table([{"real_steps": 5, "note": None}], ("real_steps", "note"))
    assert "note" not in capsys.readouterr().out


def test_info_takes_options_of_a_recipe_and_refuses_those_of_a_run(run):
    small = json.loads(command("info", CHAIN, *words(), "--json").stdout)
    other = json.loads(command("info", CHAIN, *words({"model.dynamics.deter": 16}), "--json").stdout)
    assert other["parameters"] > small["parameters"]
    refused = command("info", run[0], "model.dynamics.deter=16")
    assert refused.exit_code == 2 and "is a run, whose options stand" in refused.stderr


def test_options_are_listed_with_their_defaults_and_what_they_mean():
    rows = json.loads(command("options", "--json").stdout)["options"]
    assert [row["key"] for row in rows] == [row.key for row in describe(Config)] and all(row["type"] for row in rows)
    lr, decay = json.loads(command("options", "train.lr", "--json").stdout)["options"]
    assert decay["key"] == "train.lr_decay_from"
    assert lr == next({**row._asdict()} for row in describe(Config) if row.key == "train.lr")
    planned = json.loads(command("options", "agent.plan", "agent=planner", "--json").stdout)["options"]
    assert len(planned) > 3 and all(row["key"].startswith("agent.plan") and row["description"] for row in planned)
    wrong = command("options", "train.larning")
    assert wrong.exit_code == 2 and "No option begins with 'train.larning'" in wrong.stderr
    assert "updates per real step" in " ".join(command("options", "train.ratio").stdout.split())


def test_a_missing_kind_names_the_kinds(run):
    done = command("fit-prior", run[0])
    assert done.exit_code == 2 and all(kind in done.stderr for kind in ("--kind", "gaussian", "mixture", "flow", "energy"))


def test_every_help_has_an_example():
    def walk(command_, name):
        yield name, command_
        for word, inner in getattr(command_, "commands", {}).items():
            yield from walk(inner, f"{name} {word}")

    found = dict(walk(get_command(app), "worldmodel"))
    assert len(found) == 17
    for name, inner in found.items():
        assert (inner.epilog or "").startswith(f"Example: {name} "), name


# Videos -----------------------------------------------------------------------------------------------------------------


def test_small_frames_are_enlarged_and_captioned():
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[:, 3, 5] = 200
    video = pictures.captioned(frames, ["step 0 of 2   return 0.0 of 1.0", "step 1 of 2   return 0.5 of 1.0"])
    assert video.shape == (2, 22 + 256, 256, 3)
    assert (video[0, 22 + 12 : 22 + 16, 20:24] == 200).all() and video[0, 22:].max() == 200
    assert (video[0, :22] != video[1, :22]).any() and video[0, :22].min() < 100
    large = pictures.captioned(np.zeros((1, 400, 600, 3), np.uint8), ["step 0"])
    assert large.shape == (1, 422, 600, 3)


# SB3 --------------------------------------------------------------------------------------------------------------------


def test_normalised_rewards_are_refused_for_what_they_do_to_rewards():
    with pytest.raises(ConfigError, match=r"scales the rewards.*take it off") as refused:
        small_dreamer(VecNormalize(make_vec(CHAIN, 1), norm_obs=False))
    assert "observations" not in str(refused.value)
    small_dreamer(VecNormalize(DummyVecEnv([Chain]), norm_obs=False, norm_reward=False))  # it changes nothing
