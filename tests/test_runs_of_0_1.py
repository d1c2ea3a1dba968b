"""Runs that release 0.1.0 made open, act, dream and go on, whatever options and arrays are called by now.

runs_of_0_1 holds them, what 0.1.0 said of each (expected.json), and how they were made (make.py).
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import worldmodel as wm
from worldmodel import renamed
from worldmodel.agents import evaluate
from worldmodel.cli import app

FIXTURES = Path(__file__).parent / "runs_of_0_1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "expected.json").read_text())

EDM = {"most": "sigma_max", "least": "sigma_min", "level_mean": "log_sigma_mean", "level_std": "log_sigma_std"}
RENAMED = [
    (r'model\.dynamics\[pixels\]\.(kind = )"pixels"', r'model.dynamics[diamond].\1"diamond"'),
    (r'model\.encoder\[pixels\]\.(kind = )"pixels"', r'model.encoder[standard].\1"standard"'),
    (r'model\.objective\[pixels\]\.(kind = )"pixels"', r'model.objective[reconstruction].\1"reconstruction"'),
    (r"model\.dynamics\[pixels\]\.(.*)", r"model.dynamics[diamond].\1"),
    (r"model\.encoder\[pixels\]\.(.*)", r"model.encoder[standard].\1"),
    (r".*\[diffusion\]\.drop = 0\.0", ""),
    (r".*\[diffusion\]\.path = \"edm\"", ""),
    *((rf"train\.{old} =(.*)", rf"train.{new} =\1") for old, new in renamed.OPTIONS["TrainConfig"].items()),
    (r"train\.scales\.fit =(.*)", r"train.scales.prior =\1"),
    (r"model\.inputs =(.*)", r"model.vector_scaling =\1"),
    (r"(.*\[vamp\])\.inputs =(.*)", r"\1.pseudo_inputs =\2"),
    (r"(.*)\.law(\[diffusion\].*)", r"\1.prior\2"),
    *((rf"(.*\[(?:diffusion|diamond)\])\.{old} =(.*)", rf"\1.{new} =\2") for old, new in EDM.items()),
    (r"(.*\[diffusion\])\.looks =(.*)", r"\1.rate_samples =\2"),
    *((rf"(.*\[energy\])\.{old} =(.*)", rf"\1.{new} =\2") for old, new in renamed.OPTIONS["EnergyConfig"].items()),
    *((rf"(.*\[(?:jepa|hybrid)\])\.{old} =(.*)", rf"\1.{new} =\2") for old, new in renamed.OPTIONS["JepaConfig"].items()),
    (r"(agent\[.*\](?:\.plan)?)\.penalty =(.*)", r"\1.uncertainty_penalty =\2"),
    (r"(agent\[.*\])\.manifold =(.*)", r"\1.typicality_penalty =\2"),
]
"""(pattern, replacement) for each option of 0.1.0 that is called otherwise now, one after the other on every whole line as `lines`
writes it: `model.transition[diffusion].most = 4.0`. An empty replacement: the option is gone, and had no other value than this."""
each_run = pytest.mark.parametrize("name", EXPECTED)


def lines(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """A config's options, one a line, each with the kind of the part that it belongs to."""
    inside = f"{path}[{config['kind']}]" if "kind" in config else path
    for key, value in config.items():
        where = f"{inside}.{key}" if inside else key
        if isinstance(value, Mapping) and value:
            yield from lines(value, where)
        else:
            yield f"{where} = {json.dumps(value)}"


def todays(line: str) -> str:
    """A line of 0.1.0 as this version has it; empty where there is no such option."""
    for pattern, replacement in RENAMED:
        line, found = re.subn(f"^{pattern}$", replacement, line)
        if found and not line:
            break
    return line


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """NAME -> the run folder, for reading."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        if not (root / name).exists():
            zipfile.ZipFile(FIXTURES / f"{name}.zip").extractall(root / name)
        return root / name

    return run


def test_there_is_a_run_for_every_expectation():
    assert sorted(EXPECTED) == sorted(file.stem for file in FIXTURES.glob("*.zip"))


@each_run
def test_a_run_of_0_1_opens_with_every_value_that_it_was_made_with(unpacked, name):
    folder = unpacked(name)
    config = wm.Run.open(folder).config
    before = {todays(line) for line in lines(yaml.safe_load((folder / "config.yaml").read_text()))} - {""}
    now = set(lines(config.model_dump(mode="json")))
    assert before - now == set()
    assert wm.Config.from_yaml(config.to_yaml()) == config


def test_a_run_by_flow_matching_is_refused_and_says_what_to_use(unpacked):
    text = (unpacked("diffusion") / "config.yaml").read_text()
    assert text.count("path: edm") == 2
    with pytest.raises(wm.ConfigError, match=r"path=cfm.*flow matching.*removed.*EDM"):
        wm.Config.from_saved(text.replace("path: edm", "path: cfm"))
    with pytest.raises(wm.ConfigError, match=r"flow matching.*removed.*EDM"):
        wm.Config.from_recipe("cartpole", {"model": "latent_diffusion", "model.transition.path": "cfm"})


@each_run
def test_an_agent_of_0_1_plays_as_it_did(unpacked, name):
    run = wm.Run.open(unpacked(name))
    returns, _ = evaluate(run.agent(), run.config.env, 2, 30_000)
    assert returns == pytest.approx(EXPECTED[name]["returns"], rel=1e-3)


@each_run
def test_a_world_model_of_0_1_dreams_as_it_did(unpacked, name):
    wm.Run.open(unpacked(name))  # the command would tell an error in words alone
    arguments = ["dream", str(unpacked(name)), "--context", "2", "--horizon", "3", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    for what, numbers in EXPECTED[name]["dream"].items():
        assert seen[what] == pytest.approx(numbers, rel=EXPECTED[name]["tolerance"]), what


@each_run
def test_a_run_of_0_1_goes_on_with_as_many_updates(unpacked, tmp_path, name):
    expected = EXPECTED[name]
    folder = Path(shutil.copytree(unpacked(name), tmp_path / "run"))
    assert wm.Run.open(folder).checkpoints == [expected["steps"]]
    result = wm.train(folder, resume=True, steps=expected["more"], device="cpu")
    assert (result.real_steps, result.updates) == (expected["more"], expected["updates"])
    assert wm.Run.open(folder).agent().num_timesteps == expected["more"]
