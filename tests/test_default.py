"""What an environment without a recipe gets: more updates a step while few steps are known."""

from __future__ import annotations

import numpy as np
import pytest

import worldmodel as wm
from worldmodel.agents.arguments import read_config
from worldmodel.errors import ConfigError
from worldmodel.learner import TrainConfig


def test_updates_a_step_fall_as_one_over_the_steps_from_the_early_ratio_to_the_ratio():
    train = TrainConfig(prefill=200, early_ratio=4.0, ratio=0.5)
    assert train.early_updates(0, 200) == 0  # random steps
    assert train.early_updates(200, 201) == pytest.approx(4 - 0.5, abs=0.02)
    assert train.early_updates(800, 801) == pytest.approx(1 - 0.5, abs=0.01)
    assert train.early_updates(1600, 5000) == 0
    by_one = sum(train.early_updates(t, t + 1) for t in range(3000))
    assert by_one == pytest.approx(train.early_updates(0, 3000)) == pytest.approx(800 * np.log(8) - 0.5 * 1400)
    for without in (
        {"early_ratio": None},
        {"early_ratio": 0.5},
        {"data": ("some.npz",)},
        {"prefill": 0},
        {"prefill": 0, "ratio": 0.0},
    ):
        assert train.model_copy(update=without).early_updates(0, 5000) == 0
    assert train.model_copy(update={"ratio": 0.0}).early_updates(0, 400) == pytest.approx(800 * np.log(2))


def test_a_run_makes_the_early_updates_of_its_steps_and_a_resumed_one_no_others(tmp_path):
    options = {"train.prefill": 40, "train.early_ratio": 2.0, "train.ratio": 0.25, "train.pretrain": 0, "eval.every": 0}
    options |= {"train.batch_length": 8, "train.batch_size": 2, "eval.episodes": 1, "log.tensorboard": False, "size": "nano"}
    recipe = {"env": {"id": "CartPole-v1"}}
    whole = wm.train(recipe, 120, 0, tmp_path / "whole", options)
    wm.train(recipe, 70, 0, tmp_path / "parts", options)
    parts = wm.train(tmp_path / "parts", 120, resume=True)
    expected = 0.25 * 80 + wm.Run.open(whole.run).config.train.early_updates(0, 120)
    assert expected > 60 and abs(whole.updates - expected) < 2 and parts.updates == whole.updates


def test_an_environment_of_numbers_without_a_recipe_has_the_default_and_what_is_given_stays():
    recipe = {"env": {"id": "CartPole-v1"}}
    default = read_config(recipe, [])
    assert (default.train.prefill, default.train.early_ratio, default.agent.lr) == (200, 4.0, 1e-3)
    assert default.model.dynamics.kind == "anchored" and read_config("cartpole", []).train.early_ratio is None
    given = read_config(recipe, ["model=gaussian", "train.prefill=300", "agent=planner"])
    assert (given.train.prefill, given.train.early_ratio, given.agent.kind) == (300, 4.0, "planner")
    assert read_config(recipe, ["train.ratio=1"]).train.early_ratio is None  # a number that is given holds for all steps
    assert read_config({**recipe, "train": {"ratio": 1.0}}, []).train.early_ratio is None
    assert read_config(recipe, ["train.ratio=1", "train.early_ratio=2"]).train.early_ratio == 2.0
    with pytest.raises(ConfigError, match="train"):
        read_config(recipe, ["train=5"])
    assert read_config(recipe, []) == default  # nothing was changed for others
    assert given.model == read_config(recipe, ["model=gaussian"]).model != default.model
    assert read_config({"env": {"id": "worldmodel.envs:Catch-v0"}}, []).train.early_ratio is None
