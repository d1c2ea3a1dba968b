"""`fit-prior`: another form of the prior for a finished run, fitted to its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, Trust, answer, reported, say, show_pairs, stdout_kept

if TYPE_CHECKING:
    from worldmodel.storage.run import Run

EXAMPLE = "worldmodel fit-prior runs/pendulum-s0 --kind mixture --set components=5"


def fit_prior(
    run: Run | str | Path,
    kind: str | None,
    slot: str = "initial",
    *,
    options: Mapping[str, Any] | Sequence[str] = (),
    steps: int = 2000,
    where: str = "start",
    lr: float = 2e-3,
    out: str | Path | None = None,
    device: str = "cpu",
    trust: bool = False,
    log: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Fits a form to a run's codes, as a new run in which it fills the slot; the JSON of `worldmodel fit-prior`.

    kind, options  the form, and its options: {"units": 64} or ["units=64"]
    slot           initial, transition (given the carry), or marginal
    steps, lr      gradient steps on batches of 256 codes, and Adam's learning rate
    where          for the initial slot: codes that open an episode, or all
    out            the new run's folder; without: RUN-KIND-SLOT

    A fifth of the episodes is held out: the new form is compared there, in nats, with what filled the slot before (an empty
    marginal: a standard normal law). The agent and the replay come along. The old run is only read. Raises ConfigError.
    """
    from worldmodel.agents import two_stage
    from worldmodel.storage.run import Run
    from worldmodel.storage.run_folder import refuse_existing

    two_stage.check(kind, slot, where, steps)
    run = run if isinstance(run, Run) else Run.open(run)
    target = Path(out) if out is not None else run.path.with_name(f"{run.path.name}-{kind}-{slot}")
    refuse_existing(target)
    how = {"steps": steps, "lr": lr, "device": device, "trust": trust, "log": log}
    return two_stage.fit(run, target, kind, slot, where, options, **how)


class Slot(str, Enum):
    """What a form of the prior may fill."""

    initial, transition, marginal = "initial", "transition", "marginal"


class Where(str, Enum):
    """Which codes the initial law is fitted to."""

    start, anywhere = "start", "anywhere"


def command(
    run: RunFolder,
    kind: Annotated[
        str | None, typer.Option(metavar="FORM", help="Required: gaussian, mixture, flow, energy, ...", show_default=False)
    ] = None,
    slot: Annotated[Slot, typer.Option(help="What the form fills.")] = Slot.initial,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the form; repeat it.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps on batches of 256 codes.")] = 2000,
    where: Annotated[Where, typer.Option(help="For the initial slot: codes that open an episode, or all.")] = Where.start,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new run.", show_default="RUN-FORM-SLOT")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit another form of the prior to a finished run's codes; a new run holds it, the old one is only read.

    A fifth of the episodes is held out: what the form gains there, in nats, over what filled the slot before.
    """
    with reported(debug):
        with stdout_kept():
            import torch

            from worldmodel.storage.run import Run

            old = Run.open(run)
            torch.set_num_threads(old.config.train.threads)
            result = fit_prior(
                old, kind, slot.value, options=options or [], steps=steps, where=where.value, out=out, trust=trust, log=say
            )
        answer(result, as_json, show_pairs)
