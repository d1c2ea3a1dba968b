"""The house stands as docs/architecture.md draws it: floors, sizes, nothing that runs code from files, and what is shipped."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import conftest
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from worldmodel import registry
from worldmodel.config import Config
from worldmodel.envs.make import make_env
from worldmodel.model import WorldModel
from worldmodel.spaces import ObsSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "worldmodel": "worldmodel",
    "worldmodel.agents": "agents",
    "worldmodel.envs": "envs",
    "worldmodel.configs": "configs",
}
"""Import name -> folder of the checkout."""

LAYERS = (
    "errors configs processes",
    "data registry renamed storage.checkpoint storage.files storage.windows nn.networks nn.moments nn.diffusion nn.unet",
    "config spaces storage.best storage.rows storage.segments view nn.attention",
    "storage.replay storage.columns storage.weights",
    "storage.recording storage.npz distributions",
    "encoders decoders heads ensemble",
    "diamond dynamics objectives",
    "model",
    "forecasts",
    "learner storage.run storage.run_folder",
    "diagnostics",
    "envs",
    "agents",
    "commands",
    "cli",
    "__main__",
)
"""Packages and modules from the ground up. Each imports from lower layers, and from its own package."""

FILE_LINES, FUNCTION_LINES = 560, 75
"""What "about 500" and "about 60" end at."""

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
LOADERS = {
    "torch": {"load", "save"},
    "numpy": {"load"},
    "np": {"load"},
    "yaml": {"load", "load_all", "full_load", "unsafe_load", "Loader", "FullLoader", "UnsafeLoader"},
}


# What the checks read ---------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Import name -> file of every module of the project."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The project's modules that a module names in import statements, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "worldmodel":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def package(module: str) -> str:
    """`agents` of `worldmodel.agents.loop`; `worldmodel` itself, which resolves names lazily, is in none."""
    return module.split(".")[1] if "." in module else ""


def place(module: str) -> str:
    """What LAYERS calls a module: by itself where it stands there, else by its package."""
    inner = module.partition(".")[2]
    return inner if any(inner in names.split() for names in LAYERS) else package(module)


def layer(module: str) -> int:
    return next((height for height, names in enumerate(LAYERS) if place(module) in names.split()), -1)


def climbs(module: str, tree: ast.AST, known: set[str]) -> list[str]:
    """Imports that do not lead downwards."""
    return [
        f"{module} imports {target}"
        for target in imports(tree, known)
        if package(target) != package(module) and not (target != "worldmodel" and layer(target) < layer(module))
    ]


def dangers(tree: ast.AST) -> list[str]:
    """`line 3: torch.load` for all that could run code from a file."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").partition(".")[0]
            names = [f"{top}.{alias.name}" for alias in node.names if top in PICKLES or alias.name in LOADERS.get(top, ())]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"] if node.attr in LOADERS.get(node.value.id, ()) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNNERS:
            names = [node.func.id]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = ["allow_pickle"]
        found += [f"line {getattr(node, 'lineno', '?')}: {name}" for name in names]
    return found


def bare(tree: ast.AST) -> list[str]:
    """Imports of the folders under the names that other projects use too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return [name for name in names if name.startswith(".") or name.partition(".")[0] in ("agents", "envs", "configs")]


# Floors -----------------------------------------------------------------------------------------------------------------


def test_every_module_belongs_to_a_layer():
    packages = {"worldmodel", "worldmodel.nn", "worldmodel.storage"}  # whose modules stand in layers of their own
    lost = sorted(m for m in modules() if m not in packages and layer(m) < 0)
    assert not lost, f"{lost} belong to no layer: add them to LAYERS here and to docs/architecture.md"


def test_every_import_leads_downwards():
    known = modules()
    wrong = [line for name, file in known.items() for line in climbs(name, parsed(file), set(known))]
    assert not wrong, "only lower layers may be imported:\n" + "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle():
    known = modules()
    order = graphlib.TopologicalSorter({n: set(imports(parsed(f), set(known))) - {n} for n, f in known.items()}).static_order()
    assert set(order) == set(known)  # CycleError, with the circle, where there is one


def test_what_is_learned_knows_nothing_of_stable_baselines():
    for name, file in modules().items():
        if package(name) in ("agents", "envs", "commands"):
            continue
        named = {n.module or "" for n in ast.walk(parsed(file)) if isinstance(n, ast.ImportFrom)}
        named |= {alias.name for n in ast.walk(parsed(file)) if isinstance(n, ast.Import) for alias in n.names}
        assert not [n for n in named if n.startswith("stable_baselines3")], f"{name} imports SB3: only envs and agents may"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from worldmodel.agents.loop import X", 1),
        ("def f():\n    import worldmodel.storage.run", 1),
        ("from worldmodel import learner", 1),
        ("from worldmodel import WorldModel", 1),  # it resolves names of every layer
        ("from worldmodel.decoders import Decoder", 1),  # next door
        ("from worldmodel.encoders import Encoder\nfrom worldmodel import spaces\nimport torch", 0),
    ],
)
def test_the_check_of_layers_sees_each_way_up(source, wrong):
    assert len(climbs("worldmodel.encoders", ast.parse(source), set(modules()))) == wrong


# Sizes and names --------------------------------------------------------------------------------------------------------


def test_files_and_functions_fit_on_a_few_screens():
    long = []
    for file in sources(*FOLDERS.values()):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        long += [f"{file.relative_to(ROOT)}: {lines} lines"] if lines > FILE_LINES else []
        for node in ast.walk(parsed(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = node.end_lineno - node.lineno + 1
                long += [f"{file.relative_to(ROOT)}: {node.name} has {size} lines"] if size > FUNCTION_LINES else []
    assert not long, "split them:\n" + "\n".join(long)


def test_no_room_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert not [name for name in modules() if drawers & set(name.split("."))]


# Nothing runs code from files -------------------------------------------------------------------------------------------


def test_nothing_that_is_loaded_can_run_code():
    every = sources(*FOLDERS.values(), "benchmarks")
    found = [f"{file.relative_to(ROOT)}, {text}" for file in every for text in dangers(parsed(file))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import cloudpickle as c", "torch.load(f)", "from torch import load"),
        *("yaml.load(x, L)", "L = yaml.UnsafeLoader", "eval('1')", "exec(text)", "np.load(f)", "f(x, allow_pickle=True)"),
    ],
)
def test_the_check_of_dangers_sees_each_of_them(source):
    assert dangers(ast.parse(source))


def test_the_check_of_dangers_lets_ordinary_code_pass():
    assert not dangers(ast.parse("model.eval(); module.compile(); yaml.SafeLoader; safetensors.numpy.load(x); re.compile('x')"))


def test_folders_are_imported_under_the_projects_name():
    every = sources(*FOLDERS.values(), "tests", "benchmarks")
    found = [f"{file.relative_to(ROOT)}: {name}" for file in every for name in bare(parsed(file))]
    assert not found, "write worldmodel.agents, worldmodel.envs, worldmodel.configs:\n" + "\n".join(found)
    assert bare(ast.parse("import envs.make\nfrom agents import x\nfrom . import y")) == ["envs.make", "agents", "."]


# Names ------------------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_no_torch():
    light = "worldmodel.agents, worldmodel.cli, worldmodel.config, worldmodel.storage.checkpoint"
    code = f"import sys, worldmodel, {light}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_public_name_resolves(module):
    if module.endswith("__main__"):
        return
    loaded = importlib.import_module(module)
    assert not [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]


def test_every_room_of_the_registry_is_there():
    assert not set(registry.MODULES) - set(modules())


# What is shipped --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the tree, unpacked."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(out / "site")
    return out / "site"


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    tree = {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".yaml") or file.name == "py.typed"
    }
    shipped = {file.relative_to(wheel).as_posix() for file in wheel.rglob("*") if file.is_file()}
    assert {name for name in shipped if ".dist-info/" not in name} == tree
    assert "worldmodel/py.typed" in tree and "worldmodel/configs/env/cartpole.yaml" in tree
    assert [name for name in shipped if name.endswith("licenses/LICENSE")]


def test_the_wheel_finds_its_recipes_outside_the_checkout(wheel, tmp_path):
    code = (
        "import worldmodel.config as c, worldmodel.agents as a; "
        "print(c.__file__, a.__file__, *(row[0] for row in c.list_recipes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    config, agents, *names = done.stdout.split()
    assert Path(config).is_relative_to(wheel) and Path(agents).is_relative_to(wheel)
    assert names == sorted(file.stem for file in (ROOT / "configs/env").glob("*.yaml"))


def test_type_checkers_and_editors_follow_every_package(tmp_path):
    """`make venv` makes a folder of links that pyproject.toml names to them: they follow no mapping of folders."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["mypy"]["mypy_path"] == ".venv/links" and tools["pyright"]["extraPaths"] == [".venv/links"]
    made = subprocess.run(["make", "-n", "links"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (tmp_path / "links/worldmodel").mkdir(parents=True)
    for name in re.findall(rf"{ROOT}/(\S+)", next(line for line in made.splitlines() if line.startswith("ln -s"))):
        (tmp_path / "links/worldmodel" / Path(name).name).symlink_to(ROOT / name)
    probe = "from worldmodel.agents.training.signals import Signals\nreveal_type(Signals.__enter__)\n"
    (tmp_path / "probe.py").write_text(probe)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", os.devnull, "probe.py"]
    seen = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": "links"}, capture_output=True, text=True)
    assert seen.returncode == 0 and "-> worldmodel.agents.training.signals.Signals" in seen.stdout, seen.stdout + seen.stderr


def test_the_console_script_is_there(project):
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_tested_set_pins_what_the_project_names_within_its_ranges(project):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(pins) == len(lines) and all(pins.values()), "one exact version for each name"
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for extra in ("dev", "render", "data") for r in extras[extra])]
    for requirement in map(Requirement, wanted):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned and pinned in requirement.specifier, f"constraints.txt pins {pinned}, but {requirement} is wanted"


# Recipes ----------------------------------------------------------------------------------------------------------------


def names(part: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "configs" / part).glob("*.yaml"))


@pytest.mark.parametrize("recipe", names("env"))
def test_every_recipe_builds_a_model_of_every_kind_and_size(recipe, monkeypatch):
    for slow in ("trunc_normal_", "kaiming_uniform_"):  # filling in the numbers is most of the time, and of no matter here
        monkeypatch.setattr(torch.nn.init, slow, lambda x, *args, **kwargs: x)
    env, layout = make_env(Config.from_recipe(recipe).env), Config.from_recipe(recipe).env.layout
    sizes = set()
    pictures = [key.kind for key in ObsSpec.from_space(env.observation_space, layout).keys.values()] == ["image"]
    for model in names("model"):
        if model == "diamond" and not pictures:  # refused: tests/test_diamond.py
            continue
        for size in names("size"):
            config = Config.from_recipe(recipe, [f"model={model}", f"size={size}"])
            world = WorldModel.from_spaces(env.observation_space, env.action_space, config.model)
            sizes.add(sum(p.numel() for p in world.parameters()))
    env.close()
    assert len(sizes) > len(names("size")), "names of kinds and sizes make different models"


def test_the_lists_of_test_modules_name_modules_that_are_there():
    there = {file.stem.removeprefix("test_") for file in (ROOT / "tests").rglob("test_*.py")}
    assert not {*conftest.WHOLE_RUNS, *conftest.DURABLE, *conftest.LONGEST} - there


# What is offered --------------------------------------------------------------------------------------------------------


def read_names() -> set[str]:
    """Every name that some line of the project reads as an attribute, or asks for by a word."""
    found = set()
    for node in (node for file in sources("worldmodel", "agents", "envs") for node in ast.walk(parsed(file))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            asked = node.args[1]
            found |= {asked.value} if isinstance(asked, ast.Constant) else set()
    return found


def test_every_option_is_read_and_every_choice_of_one_stands_in_a_test():
    """Of a model's parts tests/test_options.py asks more: that each option changes something."""
    read = read_names() | {"max_gap", "max_displacement"}  # handed on as words in distributions.energy
    tried = "\n".join(file.read_text(encoding="utf-8") for file in [*(ROOT / "tests").glob("*.py"), *ROOT.glob("configs/*/*.yaml")])
    idle = []
    for role, kind, config in registry.entries():
        idle += [f"{role} {kind}: {name} is read nowhere" for name in config.model_fields if name not in read]
        for name, field in config.model_fields.items():
            for form in (field.annotation, *get_args(field.annotation)):
                choices = set(get_args(form)) - {field.default} if get_origin(form) is Literal else set()
                idle += [f"{role} {kind}: no test of {name}={c}" for c in choices if not re.search(rf"\b{c}\b", tried)]
    assert not idle, "\n".join(idle)


ON_THE_CPU = {"edm_grid", "fixed_samples", "fit"}
"""Functions that make small tensors on the CPU, which their callers bring to where the others are."""
MAKERS = {"eye", "arange", "zeros", "ones", "tensor", "linspace", "full", "empty", "rand", "randn", "randint", "randperm"}


def test_what_runs_on_a_device_makes_its_tensors_there():
    rooms = "nn distributions encoders decoders heads ensemble diamond dynamics objectives model learner".split()
    wrong = []
    for name, file in modules().items():
        if package(name) not in rooms:
            continue
        tops = [node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef)]
        for function in tops:
            if function.name in ON_THE_CPU or function.name == "__init__" or "make" in function.name:  # modules are moved later
                continue
            for node in ast.walk(function):
                call = (
                    isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"
                )
                if call and node.func.attr in MAKERS and "device" not in {k.arg for k in node.keywords}:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "say device=, as that of a tensor at hand:\n" + "\n".join(wrong)
