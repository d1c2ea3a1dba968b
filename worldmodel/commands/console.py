"""What every command shares: its options, where errors and prints go, and how results are shown to a person."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.errors import ConfigError, EnvError, MissingExtraError, NumericsError, StorageError, UnsupportedSpaceError

if TYPE_CHECKING:
    from worldmodel.storage.run import Run, Step

ERRORS = (ConfigError, EnvError, MissingExtraError, NumericsError, UnsupportedSpaceError, OSError)
"""What is reported as one line. OSError: StorageError and TrustError, and a disk or a stream that a library writes to."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Options by dotted key, e.g. train.ratio=2.", show_default=False),
]


def which_checkpoint(what: str) -> Any:
    """The option that names a run's checkpoint, for `checkpoint_step`; `what` says which run's."""
    return typer.Option(metavar="best|newest|N", help=what, show_default="the best evaluated; the newest where none was")


def sources(what: str) -> Any:
    """The option of a command that takes recorded episodes; `what` says for what."""
    text = f"{what}: FILE.npz, a folder of them, minari:ID or a run folder. Repeat it for several."
    return typer.Option(metavar="SOURCE", help=text, show_default=False)


Trust = Annotated[bool, typer.Option("--trust", help="Open agent.path, a zip of Stable-Baselines3, although that can run code.")]
Start = Literal["replay", "prior"]
"""Where dreams begin."""
MAX_SIGNALS = 24
"""Lines of a table of signals."""


# Where things go -------------------------------------------------------------------------------------------------------


def opened(path: Path) -> Run:
    """The run in a folder. From here on this process computes with as many threads as the run was trained with.

    Figures then are those of its training, and a machine that is busy does not make torch many times slower, as it does where
    threads wait for one another.
    """
    import torch

    from worldmodel.storage.run import Run

    run = Run.open(path)
    torch.set_num_threads(run.config.train.threads)
    return run


def answer(work: Callable[[], Mapping[str, Any]], as_json: bool, debug: bool, show: Callable[[Any], object] | None = None) -> None:
    """Does a command's work and prints its result on stdout; an error becomes one line on stderr and an exit code."""
    try:
        with stdout_to_stderr():
            result = work()
        if as_json:
            print(json.dumps(result, allow_nan=False), flush=True)
        else:
            (show or show_pairs)(result)
    except BrokenPipeError:
        raise
    except ERRORS as error:
        if debug:
            traceback.print_exc()
        say(f"error: {error}")
        raise typer.Exit(getattr(error, "exit_code", StorageError.exit_code)) from None
    except KeyboardInterrupt as stop:
        say(str(stop) or "Interrupted.")
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What environments and libraries print, in Python or below it, goes to stderr."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # a closed stream
        saved = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def checkpoint_step(text: str | None) -> Step:
    """What --step asks for. ConfigError."""
    if text is None or text in ("best", "newest"):
        return text
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ConfigError(f"--step {text}: expected best, newest, or the real steps of a checkpoint.")
    return int(text)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Tables ----------------------------------------------------------------------------------------------------------------


def show_training(result: Mapping[str, Any]) -> None:
    if result["evaluations"]:
        table(result["evaluations"], ("real_steps", "mean_return", "std_return", "episodes"))
    inner = ("evaluations", "final_episodes", "final_step", "newest_return", "best")
    shown = {key: value for key, value in result.items() if key not in inner}
    if (count := result["final_episodes"]) is not None:
        from worldmodel.agents.evaluation import FINAL_SEED

        which = f"mean of {count} greedy episodes of seeds {FINAL_SEED} to {FINAL_SEED + count - 1}"
        shown["final_return"] = f"{_cell(result['final_return'], 2)} ({which})"
        if (best := result["best"]) is not None and best["step"] == result["final_step"]:
            both = f"{_cell(best['mean_return'], 2)}, confirmation {_cell(best['confirmation'], 2)}"
            shown["final_step"] = f"{result['final_step']}, the best evaluated ({both})"
        elif result["final_step"] is not None:
            shown["final_step"] = f"{result['final_step']}, the newest"
        if result["final_step"] not in (None, result["real_steps"]):
            shown["newest_return"] = (
                f"{_cell(result['newest_return'], 2)} (the same episodes, agent of step {result['real_steps']})"
            )
    show_pairs(shown)


def show_evaluation(result: Mapping[str, Any]) -> None:
    show_pairs({key: value for key, value in result.items() if key not in ("returns", "lengths")})


def show_dream(result: Mapping[str, Any]) -> None:
    errors = ("horizon", "observation", "persistence", "ratio", "reward", "continue", "uncertainty")
    trust = ("horizon", "crps", "coverage50", "coverage90", "spread_skill", "spread_knows", "reward_gap", "of 90 %")
    numbers = {"horizon": result["horizons"], **{name: result[name] for name in (*errors, *trust) if name in result}}
    numbers["of 90 %"] = [
        None if low is None else f"{low:+.3g} to {high:+.3g}"
        for low, high in zip(result["reward_gap_low"], result["reward_gap_high"])
    ]
    lines = [dict(zip(numbers, values)) for values in zip(*numbers.values())]
    known = [line for line in lines if line["reward"] is not None]
    shown = [line for line in known if line["horizon"] in (1, 2, 3, 5, 7, 10, 15) or line["horizon"] % 10 == 0 or line is known[-1]]
    table(shown, errors, digits=4)
    if any(line[name] is not None for line in shown for name in trust[1:]):
        print()
        table(shown, trust)
    worst = result["worst"] or {}
    extra = {f"worst at horizon {worst['horizon']}": f"{worst['name']}: {worst['observation']:.3f}"} if worst else {}
    for part, ratio in result["ratio_by_part"].items():
        if measured := [line["horizon"] for line in known if line["horizon"] <= 15 and ratio[line["horizon"] - 1] is not None]:
            extra[f"ratio at horizon {measured[-1]} in steps {part}"] = f"{ratio[measured[-1] - 1]:.3f}"
    show_pairs({**{key: result[key] for key in ("env_id", "run", "step", "context", "out")}, **extra})


def show_what_if(result: Mapping[str, Any]) -> None:
    """The ranking of the plans with standard errors, what the first leads to at some of its steps, and what was asked of."""
    lines = []
    for plan in result["plans"]:
        certainty = {"highest in": f"{plan['win_share']:.0%}", "behind": _spread(plan["behind"], plan["behind_error"])}
        last = {name: None if plan[name] is None else f"{plan[name][-1]:.3g}" for name in ("survival", "uncertainty")}
        lines.append({"plan": plan["name"], "return": _spread(plan["return_mean"], plan["return_error"]), **certainty, **last})
    table(lines, ("plan", "return", *(("highest in", "behind") if len(lines) > 1 else ()), "survival", "uncertainty"))
    best = result["plans"][0]
    steps = sorted({1, *(max(1, round(len(best["actions"]) * share)) for share in (1 / 3, 2 / 3, 1))})
    signals = _signals(best)
    lines = [{f"after steps of {best['name']}": name, **{str(h): values[h - 1] for h in steps}} for name, values in signals.items()]
    table(lines[:MAX_SIGNALS], tuple(lines[0]))
    history = result["history"]
    place = f", episode {history['episode']}, step {history['step']}" if history["episode"] is not None else ""
    more = {"more signals": f"{len(lines) - MAX_SIGNALS}, with --json"} if len(lines) > MAX_SIGNALS else {}
    about = {key: result[key] for key in ("env_id", "run", "step", "samples", "seed", "discount")}
    show_pairs({**more, **about, "history": f"{history['source']}{place}"})


def _spread(mean: float, std: float) -> str:
    return f"{mean:.3g} ± {std:.2g}"


def _signals(plan: Mapping[str, Any]) -> dict[str, list[str]]:
    """{name: a text for each step} of action, reward, survival, uncertainty and the numbers of an observation, in that order."""

    def flat(value: Any) -> list[float]:
        return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]

    found = {
        "action": [", ".join(f"{x:.4g}" for x in flat(action)) for action in plan["actions"]],
        "reward": [_spread(*pair) for pair in zip(plan["reward_mean"], plan["reward_std"])],
        "survival": [f"{x:.3f}" for x in plan["survival"]],
    }
    if plan["uncertainty"] is not None:
        found["uncertainty"] = [f"{x:.3g}" for x in plan["uncertainty"]]
    mean, std = plan["observation_mean"], plan["observation_std"]
    for key, names in plan["names"].items() if mean is not None else ():
        means, stds = ([flat(row) for row in (x[key] if isinstance(x, Mapping) else x)] for x in (mean, std))
        for i, name in enumerate(names):
            found[name] = [_spread(m[i], s[i]) for m, s in zip(means, stds)]
    return found


def show_pairs(result: Mapping[str, Any]) -> None:
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}: {'-' if v is None else v}" for k, v in value.items())
        lines.append({"": key, " ": value})
    table(lines, ("", " "))


def table(lines: list[Mapping[str, Any]], columns: tuple[str, ...], digits: int = 2) -> None:
    """Rows under headings that are never cut, in 80 columns where there is no terminal; columns without a value are left out."""
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table

    columns = tuple(name for name in columns if not name.strip() or any(line[name] not in (None, [], "") for line in lines))
    shown = Table(show_header=any(name.strip() for name in columns), box=ROUNDED, show_edge=False, pad_edge=False)
    for name in columns:
        heading = name.replace("_", " ")
        shown.add_column(heading, min_width=max(map(len, heading.split()), default=0), overflow="fold")
    for line in lines:
        shown.add_row(*[_cell(line[name], digits) for name in columns])
    Console(markup=False, highlight=False).print(shown)


def _cell(value: Any, digits: int) -> str:
    if value is None or value == []:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 10 ** (6 - digits) else f"{value:.6g}"
