"""The command line. stdout has the answer alone; progress, messages and whatever libraries print go to stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from worldmodel.commands import compare, data, diagnose, dream, evaluate, fit_prior, info, options, report, sweep, train, what_if

app = typer.Typer(
    name="worldmodel",
    help="World models for Gymnasium and Stable-Baselines3.",
    epilog="Example: worldmodel train cartpole --run runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, module in {
    "train": train,
    "eval": evaluate,
    "dream": dream,
    "what-if": what_if,
    "diagnose": diagnose,
    "report": report,
    "compare": compare,
    "sweep": sweep,
    "fit-prior": fit_prior,
    "info": info,
    "options": options,
}.items():
    app.command(name, epilog=f"Example: {module.EXAMPLE}")(module.command)
app.command("recipes", epilog=f"Example: {options.RECIPES_EXAMPLE}")(options.recipes_command)
app.add_typer(data.app, name="data")


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """World models for Gymnasium and Stable-Baselines3."""
    if version:
        import importlib.metadata

        print(importlib.metadata.version("worldmodel"))
        raise typer.Exit()


def main() -> None:
    """The console script. Modules beside the user are found, as with `python -m`; what is installed goes before them."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    app()


if __name__ == "__main__":
    main()
