"""Configs: what a file may say, how layers merge, and what errors say."""

from __future__ import annotations

import importlib.resources
import math
import pickle
import string
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from worldmodel import registry
from worldmodel.config import (
    Config,
    Frozen,
    Options,
    Part,
    describe,
    differences,
    list_recipes,
    resolve,
)
from worldmodel.errors import ConfigError


class PistonConfig(Frozen):
    kind: Literal["piston"] = "piston"
    strokes: int = Field(4, ge=2, description="strokes of a cycle")
    fuel: Literal["petrol", "diesel"] = "petrol"


class RotorConfig(Frozen):
    kind: Literal["rotor"] = "rotor"
    blades: int = 3
    pitch: float = 0.5


class Machine:
    pass


class WheelConfig(Frozen):
    radius: float = 1.0
    width: float = 2.0


class ModelConfig(Frozen):
    engine: Annotated[Any, Part("engine")] = Field({"kind": "piston", "strokes": 2}, description="what moves it")
    spare: Annotated[Any, Part("engine")] | None = None
    layers: tuple[int, ...] = (8, 8)
    wheel: WheelConfig = WheelConfig(radius=3.0)

    @model_validator(mode="after")
    def _no_twins(self):
        if self.spare is not None and self.spare.kind == self.engine.kind:
            raise ValueError("two engines of one kind: leave out model.spare.")
        return self


class EnvConfig(Frozen):
    id: str = "Toy-v0"
    layout: Literal["hwc", "chw"] | None = None
    options: Options = {}
    folder: Path | None = None


class TrainConfig(Frozen):
    ratio: float = Field(1.0, gt=0)
    batch_size: int = 16
    limit: float = Field(1.0, allow_inf_nan=True)
    scales: dict[str, float] = {}
    shapes: dict[str, tuple[int, ...]] = {}


class DreamerConfig(Frozen):
    kind: Literal["dreamer"] = "dreamer"
    horizon: int = 15


class RandomConfig(Frozen):
    kind: Literal["random"] = "random"


@pytest.fixture
def toys(monkeypatch):
    """A registry that holds the classes above and searches for no others."""
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "MODULES", ())
    monkeypatch.setattr(registry, "_loaded_entry_points", True)
    registry.register("engine", "piston", PistonConfig)(Machine)
    registry.register("engine", "rotor", RotorConfig)(Machine)
    registry.register("agent", "dreamer", DreamerConfig)(Machine)
    registry.register("agent", "random", RandomConfig)(Machine)
    for name, group in (("model", ModelConfig), ("env", EnvConfig), ("train", TrainConfig)):
        registry.register("group", name)(group)


@pytest.fixture
def folder(tmp_path, toys):
    """Recipes of a user."""
    files = {
        "size/small.yaml": "model: {engine: {kind: piston, strokes: 6}, layers: [1]}\ntrain: {batch_size: 4}",
        "size/large.yaml": "description: for patient people\nmodel: {layers: [64]}",
        "model/flying.yaml": "model: {engine: {kind: rotor, blades: 5}}",
        "model/driving.yaml": "model: {engine: {fuel: diesel}}",
        "env/toy.yaml": """
            description: a toy
            defaults: {size: small, model: driving}
            env: {id: Toy-v7}
            train: {ratio: 1e-3}
            agent: {horizon: 7}
            """,
        "env/toy-with-pixels.yaml": "env: {id: Toy-v7, layout: hwc}",
        "env/catch.yaml": "env: {id: 'toys.envs:Catch-v0'}\ntrain: {batch_size: 8}",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("train", "batch_size", True),
        ("train", "batch_size", 16.0),
        ("train", "batch_size", "16"),
        ("train", "batch_size", None),
        ("train", "ratio", "1.0"),
        ("train", "ratio", True),
        ("train", "ratio", 0),
        ("train", "ratio", math.nan),
        ("train", "ratio", math.inf),
        ("train", "scales", {"a": math.nan}),
        ("train", "scales", {"a": "x"}),
        ("train", "scales", 3),
        ("env", "layout", "hcw"),
        ("env", "id", 3),
        ("env", "options", {"a": [math.inf]}),
        ("env", "options", {"a": object()}),
        ("model", "layers", [1, 2.5]),
        ("model", "layers", 3),
        ("model", "engine", 3),
        ("model", "engine", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_under_its_dotted_key(toys, group, key, value):
    assert f"'{group}.{key}" in complaint(Config.parse, {group: {key: value}})


def test_an_integer_is_a_float_a_list_is_a_tuple_and_a_word_is_a_path(toys):
    data = {
        "train": {"ratio": 2, "shapes": {"a": [1, 2]}, "limit": math.inf},
        "model": {"layers": [1, 2, 3]},
        "env": {"folder": "a/b", "options": {"size": (3, 4)}},
    }
    config = Config.parse(data)
    assert (config.train.ratio, type(config.train.ratio)) == (2.0, float)
    assert config.train.shapes == {"a": (1, 2)} and config.train.limit == math.inf
    assert config.model.layers == (1, 2, 3)
    assert config.env.folder == Path("a/b") and config.env.options == {"size": [3, 4]}


def test_a_config_cannot_be_changed_but_a_changed_copy_can_be_made(toys):
    config = Config()
    with pytest.raises(ValidationError):
        config.train.ratio = 2.0
    changed = config.train.replace(ratio=2.0)
    assert (config.train.ratio, changed.ratio) == (1.0, 2.0)
    assert "'ratoi'" in complaint(config.train.replace, ratoi=2.0)


def test_a_config_can_be_pickled(toys):
    config = Config.parse({"model": {"engine": "rotor"}})
    assert pickle.loads(pickle.dumps(config)) == config


def test_all_mistakes_are_reported_at_once(toys):
    text = complaint(Config.parse, {"train": {"ratio": "x", "batch_size": 1.5}, "agent": {"horizn": 3}})
    assert len(text.splitlines()) == 3
    assert "'train.ratio'" in text and "'train.batch_size'" in text and "'agent.horizn'" in text and "'horizon'" in text


def test_a_rule_of_a_class_is_reported_in_its_own_words(toys):
    text = complaint(Config.parse, {"model": {"spare": "piston"}})
    assert text == "configs: 'model': two engines of one kind: leave out model.spare."


# ---- parts ------------------------------------------------------------------------------------------------------------


def test_a_part_is_chosen_by_its_kind_or_by_a_word_alone(toys):
    assert Config.parse({"model": {"engine": {"kind": "rotor", "blades": 2}}}).model.engine == RotorConfig(blades=2)
    assert Config.parse({"model": {"engine": "rotor"}, "agent": "random"}).agent == RandomConfig()
    assert Config.parse({"model": {"spare": "rotor"}}).model.spare == RotorConfig()
    assert ModelConfig(engine=RotorConfig(blades=7)).engine.blades == 7


def test_one_option_can_be_set_without_resetting_its_neighbours_or_naming_the_kind(toys):
    config = ModelConfig.parse({"engine": {"fuel": "diesel"}, "wheel": {"width": 9.0}})
    assert config.engine == PistonConfig(strokes=2, fuel="diesel")
    assert config.wheel == WheelConfig(radius=3.0, width=9.0)


def test_another_kind_takes_nothing_from_the_default_one(toys):
    assert ModelConfig.parse({"engine": {"kind": "rotor"}}).engine == RotorConfig()


def test_an_unknown_kind_names_the_nearest_one_and_its_key(toys):
    text = complaint(Config.parse, {"model": {"engine": "rotr"}})
    assert text == "configs: 'model.engine.kind' cannot be chosen: no engine is called 'rotr'. Did you mean 'rotor'?"
    assert "one of: piston, rotor" in complaint(Config.parse, {"model": {"spare": {"blades": 3}}})


def test_an_option_of_another_kind_names_that_kind(toys):
    text = complaint(Config.parse, {"agent": {"kind": "random", "horizon": 3}})
    assert text == "configs: 'agent.horizon' is not an option of RandomConfig. It is an option of agent 'dreamer'."


def test_a_key_at_the_wrong_place_names_the_right_one(toys):
    assert "Did you mean 'train.batch_size'?" in complaint(Config.parse, {"batch_size": 3})
    assert "Did you mean 'model.engine.strokes'?" in complaint(Config.parse, {"env": {"strokes": 3}})


def test_direct_construction_reports_like_a_file(toys):
    assert complaint(PistonConfig, stroks=4) == "configs: 'stroks' is not an option of PistonConfig. Did you mean 'strokes'?"
    assert "'strokes'" in complaint(PistonConfig, strokes=1)


def test_a_group_without_a_class_may_only_be_empty(toys):
    assert Config.parse({"log": {}}) == Config()
    assert "'log'" in complaint(Config.parse, {"log": {"every": 3}})


# ---- typing mistakes --------------------------------------------------------------------------------------------------


def one_edit_away(word: str) -> list[str]:
    """Every letter lost, two swapped, and at each place some letter put in or typed instead."""
    out = set()
    for i in range(len(word) + 1):
        letters = {string.ascii_lowercase[(7 * i + len(word)) % 26], string.ascii_lowercase[(11 * i + 3) % 26], "_"}
        out |= {word[:i] + letter + word[i:] for letter in letters}
        out |= {word[:i] + letter + word[i + 1 :] for letter in letters}
        out |= {word[:i] + word[i + 1 :], word[:i] + word[i + 1 : i + 2] + word[i : i + 1] + word[i + 2 :]}
    return sorted(out - {word, ""})


def every_config_class() -> list[type[Frozen]]:
    """Config, what is registered, and the classes nested in them."""
    found, todo = [], [Config, *(config for _, _, config in registry.entries())]
    while todo:
        cls = todo.pop()
        if cls not in found:
            found.append(cls)
            types = [f.annotation for f in cls.model_fields.values() if isinstance(f.annotation, type)]
            todo += [t for t in types if issubclass(t, Frozen)]
    return found


def test_a_typing_mistake_in_any_key_is_refused_and_nearly_always_understood():
    asked = understood = 0
    for cls in every_config_class():
        for key in cls.model_fields:
            for typo in one_edit_away(key):
                if typo not in cls.model_fields:
                    text = complaint(cls.parse, {typo: None})
                    assert f"'{typo}' is not an option of {cls.__name__}." in text
                    asked += 1
                    understood += f"Did you mean '{key}'" in text
    assert asked > 1000
    assert understood / asked >= 0.95, (understood, asked)


def test_a_mistake_is_named_by_its_full_key_wherever_it_is():
    for row in describe(Config):
        *groups, leaf = row.key.split(".")
        data: object = None
        for step in [leaf + "q", *reversed(groups)]:
            data = {step: data}
        text = complaint(Config.parse, data)
        assert f"'{row.key}q' is not an option" in text and f"'{leaf}'" in text


# ---- layers -----------------------------------------------------------------------------------------------------------


def test_overrides_do_not_depend_on_their_order(folder):
    forth = ["model.engine.pitch=0.1", "model.engine.kind=rotor", "agent.kind=dreamer", "agent.horizon=3", "model=driving"]
    configs = [Config.from_recipe("toy", order, folder=folder) for order in (forth, forth[::-1])]
    assert configs[0] == configs[1]
    assert configs[0].model.engine == RotorConfig(pitch=0.1) and configs[0].agent.horizon == 3
    assert "horizon" in complaint(Config.from_recipe, "toy", ["agent.horizon=3", "agent=random"], folder=folder)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.ratio=1", "train.ratio=2"],
        ["agent=random", "agent.kind=dreamer"],
        ["size=small", "size=large"],
        ["train=3", "train.ratio=1"],
    ],
)
def test_an_option_given_twice_is_refused(folder, overrides):
    assert "given twice" in complaint(resolve, "toy", overrides, folder=folder)


def test_overrides_may_be_a_mapping_of_dotted_keys(folder):
    overrides = {"train.ratio": 2.0, "model": "flying", "size": "large", "env": {"layout": "chw"}}
    config = Config.from_recipe("toy", overrides, folder=folder)
    assert (config.train.ratio, config.model.engine.blades, config.model.layers, config.env.layout) == (2.0, 5, (64,), "chw")
    assert "Write ['a=1']" in complaint(resolve, "toy", "a=1", folder=folder)


def test_layers_merge_in_the_order_size_model_recipe_keys(folder):
    config = Config.from_recipe("toy", ["train.batch_size=5"], folder=folder)
    assert config.model.engine == PistonConfig(strokes=6, fuel="diesel")  # size, then model
    assert config.model.layers == (1,)  # size over the class
    assert config.train.ratio == 0.001  # recipe
    assert config.train.batch_size == 5  # key over size
    assert (config.env.id, config.agent.horizon) == ("Toy-v7", 7)


def test_a_model_or_size_named_on_the_command_line_replaces_the_recipes(folder):
    config = Config.from_recipe("toy", ["model=flying", "size=large"], folder=folder)
    assert config.model.engine == RotorConfig(blades=5)
    assert config.model.layers == (64,) and config.train.batch_size == 16
    assert Config.from_recipe("catch", ["size=large"], folder=folder).description == ""


def test_a_changed_kind_starts_from_its_defaults_even_where_the_layer_below_names_no_kind(folder):
    assert Config.from_recipe("toy", ["agent=random"], folder=folder).agent == RandomConfig()
    assert Config.from_recipe("toy", ["agent=dreamer"], folder=folder).agent == DreamerConfig(horizon=7)
    assert Config.from_recipe("toy", ["model.engine=rotor"], folder=folder).model.engine == RotorConfig()


def test_a_name_that_is_not_there_names_the_nearest_one(folder):
    assert "Did you mean 'toy'" in complaint(resolve, "tooy", folder=folder)
    assert "Did you mean 'flying'?" in complaint(resolve, "toy", ["model=flyin"], folder=folder)
    assert "Did you mean 'small'?" in complaint(resolve, "toy", ["size=smal"], folder=folder)
    assert "Known: large, medium, nano, small" in complaint(resolve, "toy", ["size=3"], folder=folder)


def test_a_gym_id_finds_the_recipe_made_for_it(folder):
    assert resolve("Toy-v7", folder=folder)["recipe"] == "toy"  # not toy-with-pixels
    assert resolve("Catch-v0", folder=folder)["env"] == {"id": "toys.envs:Catch-v0"}
    assert resolve("Elsewhere-v3", folder=folder) == {"env": {"id": "Elsewhere-v3"}}


def test_an_environment_that_the_caller_brings_finds_a_recipe_or_replaces_the_recipes_own(folder):
    assert resolve(env_id="Toy-v7", folder=folder)["recipe"] == "toy"
    assert resolve(env_id="Catch-v0", folder=folder)["env"]["id"] == "toys.envs:Catch-v0"
    assert resolve(env_id="unversioned", folder=folder) == {"env": {"id": "unversioned"}}
    data = resolve("toy", env_id="Other-v0", folder=folder)
    assert data["env"]["id"] == "Other-v0" and data["train"]["ratio"] == 0.001
    assert resolve(folder=folder) == {}


def test_a_recipe_may_be_a_file_or_a_mapping(folder):
    path = folder / "mine.yaml"
    path.write_text("defaults: {size: large}\ntrain: {ratio: 3.0}")
    for recipe in (path, str(path)):
        config = Config.from_recipe(recipe, folder=folder)
        assert (config.recipe, config.train.ratio, config.model.layers) == ("mine", 3.0, (64,))
    assert Config.from_recipe({"train": {"ratio": 4.0}}, folder=folder).train.ratio == 4.0
    assert "missing.yaml" in complaint(resolve, folder / "missing.yaml")


@pytest.mark.parametrize(
    "text", ["defaults: {modle: flying}", "defaults: flying", "model: flying", "defaults: {model: 3}", "trian: {}", "size: small"]
)
def test_a_recipe_that_says_it_wrongly_is_refused(folder, text):
    (folder / "env" / "wrong.yaml").write_text(text)
    assert complaint(Config.from_recipe, "wrong", folder=folder)


def test_a_recipe_cannot_silently_undo_the_model_that_was_asked_for(folder):
    (folder / "env" / "fixed.yaml").write_text("defaults: {model: flying}\nmodel: {engine: {kind: piston}}")
    assert Config.from_recipe("fixed", folder=folder).model.engine.kind == "piston"
    assert "model.engine.kind" in complaint(Config.from_recipe, "fixed", ["model=flying"], folder=folder)
    assert Config.from_recipe("fixed", ["model=driving"], folder=folder).model.engine.fuel == "diesel"
    for word in ("model.engine=rotor", "model.engine.kind=rotor"):
        assert Config.from_recipe("fixed", ["model=flying", word], folder=folder).model.engine.kind == "rotor"


def test_a_size_may_not_pull_in_other_files(folder):
    (folder / "size" / "greedy.yaml").write_text("defaults: {model: flying}")
    assert "only recipes" in complaint(resolve, "toy", ["size=greedy"], folder=folder)


def test_recipes_are_listed_with_their_environment_and_description(folder):
    rows = list_recipes(folder)
    assert ("toy", "Toy-v7", "a toy") in rows and ("catch", "toys.envs:Catch-v0", "") in rows
    assert rows == sorted(rows)


def test_every_recipe_model_and_size_of_ours_is_valid():
    for recipe, env_id, _ in list_recipes():
        config = Config.from_recipe(recipe)
        assert (config.recipe, config.env.id) == (recipe, env_id)
        assert Config.from_yaml(config.to_yaml()) == config
    for part in ("model", "size"):
        for file in importlib.resources.files("worldmodel.configs").joinpath(part).iterdir():
            if file.name.endswith(".yaml"):
                Config.from_recipe({"env": {"id": "CartPole-v1"}}, {part: file.name.removesuffix(".yaml")})


# ---- the root ---------------------------------------------------------------------------------------------------------


def test_reading_a_config_module_loads_no_torch():
    code = "import sys, worldmodel.config; sys.exit('torch' in sys.modules or 'gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_merge_key_is_an_ordinary_unknown_key(toys):
    assert "'train.<<' is not an option" in complaint(Config.from_yaml, "train: {<<: {ratio: 2.0}}")


def test_a_written_config_is_read_back_equal(folder):
    overrides = ["model=flying", "env.options={a: [1, 1e-9], b: 'no'}", "train.limit=.inf", "env.folder=a/b", "train.scales={a: 1}"]
    config = Config.from_recipe("toy", overrides, folder=folder)
    again = Config.from_yaml(config.to_yaml())
    assert again == config and again.to_yaml() == config.to_yaml()
    assert again.train.limit == math.inf and again.model.engine.blades == 5 and again.description == "a toy"


def test_the_default_config_of_the_installed_modules_is_read_back_equal():
    config = Config.from_recipe(env_id="CartPole-v1")
    assert Config.from_yaml(config.to_yaml()) == config


def test_a_config_can_be_overridden_after_the_fact(toys):
    assert "only a recipe" in complaint(Config().override, ["size=small"])
    config = Config().override(["agent=random", "train.ratio=2"])
    assert config.agent == RandomConfig() and config.train.ratio == 2.0
    assert differences(Config(), config) == [
        ("agent.kind", "dreamer", "random"),
        ("agent.horizon", 15, None),
        ("train.ratio", 1.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"recipe": "cartpole"}, "cartpole"),
        ({"env": {"id": "LunarLander-v3"}}, "lunarlander-v3"),
        ({"env": {"id": "worldmodel.envs:Catch-v0"}}, "catch-v0"),
        ({"env": {"id": "ALE/Pong-v5"}}, "ale-pong-v5"),
        ({"recipe": "../../etc/x y"}, "etc-x-y"),
        ({"recipe": ".."}, "run"),
    ],
)
def test_the_name_for_files_is_short_and_harmless(toys, data, name):
    assert Config.parse(data).recipe_name == name


def test_every_option_is_listed_with_type_default_and_description(toys):
    rows = {row.key: row for row in describe(Config)}
    assert rows["model.engine.strokes"] == ("model.engine.strokes", "int >= 2", 2, "strokes of a cycle")
    assert rows["model.engine.kind"] == ("model.engine.kind", "piston | rotor", "piston", "what moves it")
    assert rows["model.spare"].type == "piston | rotor | null" and rows["model.spare"].default is None
    assert rows["model.layers"][1:3] == ("list of int", (8, 8))
    assert rows["model.wheel.radius"].default == 3.0
    assert rows["env.layout"].type == "hwc | chw | null"
    assert rows["train.ratio"].type == "float > 0"
    assert rows["agent.horizon"].default == 15
    chosen = {row.key: row.default for row in describe(Config.parse({"model": {"engine": "rotor"}}))}
    assert chosen["model.engine.blades"] == 3 and "model.engine.strokes" not in chosen
