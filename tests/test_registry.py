"""The registry: how a name finds its part, in the modules and in installed plug-ins."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest

from worldmodel import registry
from worldmodel.config import Frozen
from worldmodel.errors import ConfigError


class PistonConfig(Frozen):
    kind: Literal["piston"] = "piston"
    strokes: int = 4


class RotorConfig(Frozen):
    kind: Literal["rotor"] = "rotor"


class Kindless(Frozen):
    radius: float = 1.0


class Piston:
    def __init__(self, config, shaft, gear=1):
        self.config, self.shaft, self.gear = config, shaft, gear


class Rotor:
    pass


@pytest.fixture
def empty(monkeypatch):
    """A registry in which nothing is registered and no module or plug-in is searched for."""
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "MODULES", ())
    monkeypatch.setattr(registry, "_loaded_entry_points", True)


@pytest.fixture
def engines(empty):
    registry.register("engine", "piston", PistonConfig)(Piston)
    registry.register("engine", "rotor", RotorConfig)(Rotor)


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_a_part_is_built_from_its_config_and_the_other_arguments(engines):
    config = PistonConfig(strokes=3)
    part = registry.build("engine", config, "shaft", gear=3)
    assert (type(part), part.config, part.shaft, part.gear) == (Piston, config, "shaft", 3)


def test_a_wrong_kind_names_the_nearest_right_one(engines):
    assert complaint(registry.part, "engine", "pistn") == "no engine is called 'pistn'. Did you mean 'piston'?"


def test_two_classes_cannot_share_a_name(engines):
    text = complaint(registry.register("engine", "piston", PistonConfig), Rotor)
    assert "engine 'piston' is already" in text and "Piston" in text
    registry.register("engine", "piston", PistonConfig)(Piston)  # the same class again: a module was reloaded


def test_a_part_whose_config_cannot_hold_its_kind_is_refused_when_registered(empty):
    with pytest.raises(TypeError, match=r"kind: Literal\['turbine'\]"):
        registry.register("engine", "turbine", PistonConfig)(Piston)
    with pytest.raises(TypeError, match="Kindless"):
        registry.register("engine", "wheel", Kindless)(Piston)


def write_module(folder: Path, name: str, text: str, monkeypatch) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(registry, "MODULES", ("module_that_nobody_wrote", name))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_missing_name_is_searched_for_in_the_modules_and_absent_modules_are_skipped(empty, tmp_path, monkeypatch):
    module_text = """
        from typing import Literal
        from worldmodel.config import Frozen
        from worldmodel.registry import register
        class SteamConfig(Frozen):
            kind: Literal["steam"] = "steam"
        @register("engine", "steam", SteamConfig)
        class Steam: ...
        """
    write_module(tmp_path, "toy_module_with_steam", module_text, monkeypatch)
    assert "toy_module_with_steam" not in sys.modules
    assert registry.config_class("engine", "steam").__name__ == "SteamConfig"
    assert registry.kinds("engine") == ["steam"] and [(role, kind) for role, kind, _ in registry.entries()] == [("engine", "steam")]


def test_a_module_that_fails_to_import_says_so_instead_of_vanishing(empty, tmp_path, monkeypatch):
    write_module(tmp_path, "toy_module_that_needs_more", "import a_package_that_is_not_installed", monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        registry.kinds("engine")


class Plugin:
    name, value = "steam-engines", "steam_engines.parts"

    def __init__(self, action):
        self.load = action


def test_an_installed_plug_in_registers_its_parts_once(empty, monkeypatch):
    loads = []

    def load():
        loads.append(1)
        registry.register("engine", "rotor", RotorConfig)(Rotor)

    monkeypatch.setattr(registry, "_loaded_entry_points", False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Plugin(load)] if group == "worldmodel.parts" else [])
    assert registry.part("engine", "rotor") is Rotor
    assert registry.kinds("wing") == [] and loads == [1]


def test_a_broken_plug_in_is_named_every_time(empty, monkeypatch):
    monkeypatch.setattr(registry, "_loaded_entry_points", False)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Plugin(lambda: 1 / 0)])
    for _ in range(2):
        text = complaint(registry.part, "engine", "rotor")
        assert "steam-engines" in text and "ZeroDivisionError" in text and "uninstall" in text


def test_every_registered_config_is_frozen():
    entries = registry.entries()
    assert entries
    for role, kind, config in entries:
        assert issubclass(config, Frozen), (role, kind)
        assert config.model_config["frozen"] and config.model_config["extra"] == "forbid", (role, kind)
