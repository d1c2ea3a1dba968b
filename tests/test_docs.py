"""The docs: blocks that run, commands that parse, links that lead somewhere, the words of the field."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worldmodel import agents, registry
from worldmodel.commands.train import train
from worldmodel.config import Config

if sys.version_info >= (3, 11):
    pass
else:
    pass
from test_house import FOLDERS, ROOT, sources, tomllib

# Docs -------------------------------------------------------------------------------------------------------------------

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPTIONS = {
    **{"size": "nano", "train.prefill": 40, "train.pretrain": 2, "train.ratio": 0.1, "train.batch_length": 8, "agent.starts": 16},
    **{"eval.every": 40, "eval.episodes": 2},
}


def blocks(language: str) -> list:
    """The fenced blocks of a language, named by file and line."""
    found = []
    for file in DOCS:
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{file.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with what `make demo` leaves behind, but for its length."""
    folder = tmp_path_factory.mktemp("docs")
    train("cartpole", steps=80, run_dir=folder / "runs/demo", overrides=OPTIONS)
    return folder


@pytest.mark.parametrize("block", blocks("python"))
def test_python_in_the_docs_runs(block, demo, tmp_path, monkeypatch, request):
    if request.node.callspec.id.startswith("README"):  # its block learns in earnest, which takes minutes

        class Taste(agents.Dreamer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, config=OPTIONS, **kwargs)

        monkeypatch.setattr(agents, "Dreamer", Taste)
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    registry.load()  # so that only what the block itself registers is forgotten after it
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    assert runpy.run_path(str(script), run_name="__main__")["__name__"] == "__main__"  # it ran to its end


def test_the_reference_says_what_the_code_says():
    """In a process of its own: here, other tests may have registered parts."""
    done = subprocess.run([sys.executable, "docs/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_in_the_docs_are_understood(block):
    from typer.main import get_command

    commands = get_command(importlib.import_module("worldmodel.cli").app)
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert words[0] in targets, line
        group = commands.commands.get(words[0]) if program == "worldmodel" else None
        if isinstance(group, type(commands)) and len(words) > 1:
            group.commands[words[1]].make_context(words[1], words[2:])
        elif group is not None:
            context = group.make_context(words[0], words[1:])
            if words[0] == "train":
                Config.from_recipe(context.params["recipe"], context.params["overrides"])
        elif program == "worldmodel":
            raise AssertionError(f"`{line}` is no command")


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_in_the_docs_lead_somewhere(file):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", file.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (file.parent / target).exists()]


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


# Words ------------------------------------------------------------------------------------------------------------------

PRIVATE = {
    r"\bcarr(y|ies)\b": "recurrent state h",
    r"\blaws?\b": "distribution, prior",
    r"(?<!exit )(?<![`\"])\bcodes\b": "latents",
    r"\b(a|the|each|its|own|one|whole|next|latent) code\b|\bcode('s| z)\b": "latent z",
    r"\bforet(old|ells?)\b|\btold\b|\bwhat came\b|\bthat came\b": "predicted, reported; target, observed",
    r"\blooks?\b *[:=]|\blooks at (each|held)": "samples, evaluations",
    r"\b(least|most)(_\w+)? *[:=]|\bgreatest\b": "min, max, max_norm",
    r"\bdoubt\w*|\bmanifold\b|\bmark_typical\b": "uncertainty_penalty, typicality_penalty",
    r"\bprefill_hold\b|\btrain\.(ends|newest|average)\b|\bscales\.fit\b": "worldmodel/renamed.py says how they are called now",
    r"\b(Keeper|Watch|Film|Spool|Leaf|Aim|Pursuit)\b": "a name that says what it is",
    r"\b(floors|houses?|ROOMS)\b|\b(every|each|own|their) rooms?\b": "package, module, layer",
}
"""Words that the project once had for itself, and what the field calls them."""


def private_words() -> list[str]:
    files = [*sources(*FOLDERS.values()), *(ROOT / "configs").rglob("*.yaml"), *DOCS]
    texts = {file: file.read_text(encoding="utf-8") for file in files if file.name not in ("renamed.py", "CHANGELOG.md")}
    return [
        f"{file.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}: '{match[0]}' (say {now})"
        for file, text in texts.items()
        for word, now in PRIVATE.items()
        for match in re.finditer(word, text, re.IGNORECASE if word.startswith(r"(?<!exit") else 0)
    ]


def test_the_product_speaks_the_words_of_its_field():
    found = private_words()
    assert not found, "\n".join(found)
