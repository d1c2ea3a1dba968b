"""docs/environments.md: each command of its table is understood, and plays and learns where what it needs is installed."""

from __future__ import annotations

import re
import shlex

import pytest
from test_house import ROOT

from worldmodel.commands.train import train
from worldmodel.config import Config

MODULES = {
    "Classic control": (),
    "Box2D": ("Box2D",),
    "MuJoCo": ("mujoco",),
    "MiniGrid, BabyAI": ("minigrid",),
    "Atari": ("ale_py", "cv2"),
    "Atari, NoFrameskip": ("ale_py", "cv2"),
    "highway-env": ("highway_env",),
    "Gymnasium-Robotics": ("gymnasium_robotics",),
    "Shimmy (dm_control)": ("shimmy", "dm_control"),
}
"""What each row's command imports."""
TASTE = [
    *("size=nano", "train.prefill=24", "train.pretrain=1", "train.ratio=0.2", "train.batch_size=2", "train.batch_length=6"),
    *("agent.starts=4", "agent.horizon=3", "eval.every=0", "eval.episodes=1", "eval.max_steps=10", "log.tensorboard=false"),
]
PAGE = (ROOT / "docs/environments.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|]+?) \| `worldmodel train (.+?)` \|", PAGE, re.MULTILINE))


def test_the_table_has_a_command_for_each_family():
    assert ROWS.keys() == MODULES.keys()


@pytest.mark.parametrize("family", MODULES)
def test_the_command_of_a_family_is_understood(family):
    recipe, *overrides = shlex.split(ROWS[family])
    assert Config.from_recipe(recipe, overrides).env.id


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_the_command_of_a_family_plays_and_learns(family, tmp_path):
    for module in MODULES[family]:
        pytest.importorskip(module)
    recipe, *overrides = shlex.split(ROWS[family])
    result = train(recipe, steps=30, run_dir=tmp_path / "run", overrides=[*overrides, *TASTE], device="cpu")
    assert result.real_steps == 30 and result.updates >= 2 and result.final_return is not None
