"""The generated parts of docs/reference: every option of every part, and every command with its flags.

    python docs/reference.py             # writes what stands between <!-- reference: NAME --> and <!-- /reference -->
    python docs/reference.py --check     # exit code 1 where a page says something else than the code does
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo

from worldmodel import registry
from worldmodel.cli import app
from worldmodel.config import REQUIRED, Config, OptionInfo, describe

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

from tables import filled, markdown  # noqa: E402

PAGES = ("reference/options.md", "reference/command-line.md")
ROLES = {
    "agent": "`agent`",
    "encoder": "`model.encoder`",
    "decoder": "`model.decoder`",
    "latent": "`model.dynamics.latent`",
    "dynamics": "`model.dynamics`",
    "distribution": "`model.transition`, `model.initial`, `model.marginal`",
    "objective": "`model.objective`",
    "heads": "`model.heads`",
    "ensemble": "`model.ensemble`",
}
"""The keys of a config that take the parts of each role."""


def default(value: Any) -> str:
    """A default as a YAML file has it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, (bool, str, type(None))) and value in words:
        return f"`{words[value]}`"
    return "required" if value is REQUIRED else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def options(rows: Iterable[OptionInfo]) -> str:
    """The table of some options."""
    cells = [[f"`{row.key}`", row.type, default(row.default), row.description] for row in rows]
    return markdown(["option", "type", "default", "meaning"], cells) + "\n"


def without_parts() -> Iterator[OptionInfo]:
    """The options that belong to no exchangeable part."""
    prefixes = ("agent.", *(f"model.{slot}." for slot in ("encoder", "decoder", "dynamics", "objective", "heads", "ensemble")))
    for row in describe(Config):
        if row.key.endswith(".kind") or not row.key.startswith(prefixes):
            yield row


def config() -> str:
    return options(without_parts())


def parts() -> str:
    found = []
    for role, where in ROLES.items():
        for kind in registry.kinds(role):
            rows = [row for row in describe(registry.config_class(role, kind)) if row.key != "kind"]
            found.append(f"### {where}: `{kind}`\n\n{options(rows) if rows else 'No options of its own.' + chr(10)}")
    return "\n".join(found)


def command(info: Any, group: str = "") -> str:
    """A command's description, syntax and flags."""
    name = info.name or info.callback.__name__
    paragraphs = [" ".join(part.split()) for part in inspect.getdoc(info.callback).split("\n\n")]
    hints, rows, arguments = get_type_hints(info.callback, include_extras=True), [], []
    for parameter in inspect.signature(info.callback).parameters.values():
        kind, about = get_args(hints[parameter.name])
        meaning = " ".join((about.help or "").split())
        if isinstance(about, ArgumentInfo):
            arguments.append(about.metavar or parameter.name.upper())
            rows.append([f"`{arguments[-1]}`", "", meaning])
            continue
        words = [word for word in (about.default, *(about.param_decls or ())) if isinstance(word, str) and word.startswith("-")]
        names = words or [f"--{parameter.name.replace('_', '-')}"]
        rows.append([", ".join(f"`{word}`" for word in names), value(kind, about, parameter.default), meaning])
    called = " ".join(["worldmodel", *([group] if group else []), name])
    example = f"```sh\n{info.epilog.removeprefix('Example: ')}\n```"
    syntax = f"```text\n{' '.join([called, *arguments, '[FLAGS]'])}\n```"
    flags = markdown(["flag", "value (default)", "meaning"], rows)
    return "\n\n".join([f"### `{called}`", *paragraphs, syntax, flags, example]) + "\n"


def value(kind: Any, about: Any, default: Any) -> str:
    """The value of a flag and its default; nothing for a switch."""
    plain = next((each for each in get_args(kind) if each is not type(None)), kind) if type(None) in get_args(kind) else kind
    if plain is bool:
        return ""
    if isinstance(plain, type) and issubclass(plain, Enum):
        word = " | ".join(each.value for each in plain)
    else:
        word = about.metavar or {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(plain, "TEXT")
    shown = about.show_default if isinstance(about.show_default, str) else default
    shown = shown.value if isinstance(shown, Enum) else shown
    return f"`{word}`" + ("" if shown is None else f" ({shown})")


def commands() -> str:
    found = [command(info) for info in app.registered_commands]
    for group in app.registered_groups:
        found += [command(info, group.name or group.typer_instance.info.name) for info in group.typer_instance.registered_commands]
    return "\n".join(found)


BLOCKS: dict[str, Callable[[], str]] = {"config": config, "parts": parts, "commands": commands}


def written(text: str) -> str:
    """A page with its generated parts as of this code."""
    return filled(text, "reference", {name: block() for name, block in BLOCKS.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = (HERE / page).read_text(encoding="utf-8")
        if (now := written(text)) != text:
            stale.append(page)
            if not check:
                (HERE / page).write_text(now, encoding="utf-8")
    if check and stale:
        print(f"docs/{', docs/'.join(stale)}: not what the code says. Write it: python docs/reference.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
