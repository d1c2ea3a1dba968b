"""What the numbers of an observation are called, in tables and in figures."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import IMAGE, VECTOR
from gymnasium import spaces
from small_runs import small_train

import worldmodel as wm
from worldmodel.config import Config
from worldmodel.envs.draw import Viewer
from worldmodel.errors import ConfigError
from worldmodel.spaces import ObsSpec
from worldmodel.spaces.names import signal_names
from worldmodel.view import pictures

MIXED = spaces.Dict(dial=spaces.MultiDiscrete([2, 2]), eye=IMAGE, lamp=spaces.MultiBinary(2), motor=spaces.Box(-1, 1, (1, 2)))

OPTIONS = {"env.names": ["place", "speed"], "eval.every": 0, "eval.episodes": 1}


def names(space, given=None, env_id=""):
    return signal_names(ObsSpec.from_space(space), given, env_id)


def test_a_flat_observation_is_named_by_a_list():
    given = ("place", "speed", "angle", "spin")
    assert names(VECTOR, given) == {"obs": given} == names(VECTOR, {"obs": given})
    assert names(spaces.Discrete(2, start=3), ["mode"]) == {"obs": ("mode=3", "mode=4")}


def test_a_dict_is_named_by_key_and_what_is_left_out_by_its_places():
    found = names(MIXED, {"motor": ["torque", "current"], "dial": ["gear", "key"]})
    assert found == {
        "dial": ("gear=0", "gear=1", "key=0", "key=1"),
        "lamp": ("lamp[0]", "lamp[1]"),
        "motor": ("torque", "current"),
    }


def test_the_users_names_go_before_those_of_a_known_environment():
    known = names(VECTOR, None, "CartPole-v1")["obs"]
    assert known[2] == "pole angle [rad]" and names(VECTOR, "abcd", "CartPole-v1")["obs"] == tuple("abcd")
    viewer = Viewer("CartPole-v1", ObsSpec.from_space(VECTOR), "abcd")
    assert viewer.labels == list("abcd") and viewer.can_draw  # the scene is still drawn


REFUSED = {
    "too few": (VECTOR, ["a", "b"], r"env.names has 2 names; expected 4, one for each number of Box"),
    "too many of a key": (MIXED, {"motor": ["a", "b", "c"]}, "env.names.motor has 3 names; expected 2"),
    "a list for a Dict": (MIXED, ["a", "b"], "env.names is a list, and the observation has the keys"),
    "an unknown key": (MIXED, {"moter": ["a", "b"]}, "no key 'moter'. Did you mean 'motor'"),
    "a picture": (MIXED, {"eye": ["a"]}, "'eye' is a picture"),
    "one name twice": (VECTOR, ["a", "b", "a", "c"], r"\['a'\] would name two numbers"),
    "an empty name": (VECTOR, ["a", "", "b", "c"], "expected a word for each number"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_names_that_do_not_fit_the_space_are_refused(case):
    space, given, message = case
    with pytest.raises(ConfigError, match=message):
        names(space, given)


def test_a_config_holds_names_and_an_old_one_has_none(tmp_path):
    config = Config.from_recipe("cartpole", ["env.names=[a, b, c, d]"])
    assert Config.from_yaml(config.to_yaml()).env.names == ("a", "b", "c", "d")
    by_key = Config.from_recipe("cartpole", {"env.names": {"motor": ["a", "b"]}})
    assert Config.from_yaml(by_key.to_yaml()).env.names == {"motor": ("a", "b")}
    old = "\n".join(line for line in Config.from_recipe("cartpole").to_yaml().splitlines() if "  names:" not in line)
    assert Config.from_saved(old).env.names is None
    for wrong in (["env.names=[1, 2, 3, 4]"], ["env.names=place"]):
        with pytest.raises(ConfigError, match=r"'env\.names"):
            Config.from_recipe("cartpole", wrong)


def test_tensorboard_and_dreams_use_the_names_of_the_run(tmp_path, monkeypatch):
    curves, drawn = [], pictures.error_figure

    def error_figure(horizons: list[int], named: dict, *rest: object) -> bytes:
        curves.append(named)
        return drawn(horizons, named, *rest)

    monkeypatch.setattr(pictures, "error_figure", error_figure)
    small_train(tmp_path / "run", 20, "Nervous-v0", options={**OPTIONS, "log.tensorboard": True, "log.held_out": 2})
    assert {"place", "speed"} < set(curves[-1])
    assert wm.dream(tmp_path / "run", horizon=2, episodes=1)["worst"]["name"] in ("place", "speed")


def test_a_run_may_be_renamed_when_it_goes_on(tmp_path):
    folder, renamed = tmp_path / "run", {**OPTIONS, "env.names": ["where", "how fast"]}
    small_train(folder, 17, "Nervous-v0", options=OPTIONS)
    for options in (renamed, {k: v for k, v in OPTIONS.items() if k != "env.names"}):  # the second leaves them as they are
        small_train(folder, wm.Run.open(folder).config.train.steps + 1, "Nervous-v0", options=options, resume=True)
        assert list(wm.Run.open(folder).what_if(np.zeros(2), [], [1]).signals) == ["where", "how fast"]


def test_wrong_names_end_a_training_before_it_begins(tmp_path):
    with pytest.raises(ConfigError, match=r"env\.names has 2 names; expected 5"):
        small_train(tmp_path / "run", 20, options={"env.names": ["a", "b"]})
