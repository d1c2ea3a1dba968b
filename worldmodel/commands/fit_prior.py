"""`fit-prior`: another distribution for a slot of a finished run, fitted to its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from worldmodel.commands.console import Debug, Json, RunFolder, Trust, answer, opened, say

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
    """Fits a distribution to a run's latents, in a new run where it fills the slot; gives the JSON of `worldmodel fit-prior`.

    kind, options  the distribution, and its options: {"units": 64} or ["units=64"]
    slot           initial, transition (given the recurrent state h), or marginal
    steps, lr      gradient steps on batches of 256 latents, and Adam's learning rate
    where          for the initial slot: latents that open an episode, or all
    out            the new run's folder; without: RUN-KIND-SLOT

    A fifth of the episodes is held out: the new distribution is compared there, in nats, with what filled the slot before (an
    empty marginal: a standard normal). The agent and the replay are copied. The old run is only read. Raises ConfigError.
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


def command(
    run: RunFolder,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Required: gaussian, mixture, flow, energy, ...", show_default=False)
    ] = None,
    slot: Annotated[Literal["initial", "transition", "marginal"], typer.Option(help="The slot that it fills.")] = "initial",
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the distribution; repeat it.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps on batches of 256 latents.")] = 2000,
    where: Annotated[
        Literal["start", "anywhere"], typer.Option(help="For the initial slot: latents that open an episode, or all.")
    ] = "start",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new run.", show_default="RUN-KIND-SLOT")] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit another kind of prior to a finished run's latents; a new run holds it, the old one is only read.

    A fifth of the episodes is held out: what the new prior gains there, in nats, over what filled the slot before.
    """

    def work() -> dict[str, Any]:
        return fit_prior(opened(run), kind, slot, options=options or [], steps=steps, where=where, out=out, trust=trust, log=say)

    answer(work, as_json, debug)
