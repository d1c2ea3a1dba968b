"""How true a world model is: its open-loop error over that of an MLP ensemble and over persistence, on the same rows.

    python benchmarks/truth.py                                            # all environments, the default models, seeds 0 1 2
    python benchmarks/truth.py --env CartPole-v1 "masked Pendulum-v1" --model gaussian dreamer
    python benchmarks/truth.py --probe --env CartPole-v1 --model gaussian --seeds 0 --updates 500 train.lr=3e-4
    python benchmarks/truth.py --print

A row trains one model on recorded rows (`recorded.py`: 2,000 real steps, half random play, half a policy that SB3 trained a little,
with a random action in one step of five), then measures it on 20 held-out episodes of each of three policies: that one (own),
random play, and a stranger that no model has seen. World models learn as `worldmodel train --data` does: --updates updates of the
world model alone, no agent, in batches of the environment's recipe. Errors are those of `worldmodel dream`: 5 rows of context, a
start every 10 steps, the mean of 40 roll-outs under the recorded actions, root mean square in deviations of the rows learned from.
Coverage is that of `worldmodel dream`, from 19 draws.

The peers are measured alike: `mlp` is PETS' model (`diagnostics/mlp_ensemble.py` of the package) with 128 units, `mlp 200` with
200 and twice the batch, `mlp x4` the first with the last four observations in view, which is the fair one where velocities are
hidden. Errors are over the smaller of the first two, cell by cell. Persistence repeats the last observation of the context.

--probe keeps rows apart in the cache, measures the models again at every call, and the peers once.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recorded import CACHE, HELD_OUT, TASKS, TRAINING, digest, fingerprint, load
from rows import HERE, STALE, Key, Load, Row, Rows, call, executed, grouped, options, say, script, stale, table
from tables import median, number

from worldmodel.config import Config
from worldmodel.errors import ConfigError, MissingExtraError

MODELS = ("anchored", "gaussian", "dreamer")
PEERS = {
    "mlp": {"units": 128, "batch": 128},
    "mlp 200": {"units": 200, "batch": 256},
    "mlp x4": {"units": 128, "batch": 128, "frames": 4},
}
"""Options of `MlpWorld`. Of the two that see one observation neither is the better one everywhere: errors are over the smaller."""
RIVALS = ("mlp", "mlp 200")
HORIZONS = (1, 5, 15, 50)
CONTEXT, SAMPLES, UPDATES = 5, 40, 4000
ALONE = ["agent=random", "train.ratio=1", "train.pretrain=0", "eval.every=0", "log.tensorboard=false", "checkpoint.every=1000000"]
"""The world model alone, an update for each step of the schedule."""


# One row, in a process of its own ---------------------------------------------------------------------------------------


def work(job: Row) -> Row:
    """Trains one model on the rows of a task and a seed, and measures it."""
    import torch

    torch.set_num_threads(1)
    recordings = load(TASKS[job["env"]], job["seed"], Path(job["cache"]))
    episodes = {name: recording.to_episodes() for name, recording in recordings.items()}
    with Load() as load_of_others:
        since = time.perf_counter()
        world, made = _peer(job, recordings, episodes) if job["model"] in PEERS else _world_model(job, recordings)
        trained = time.perf_counter() - since
    found = {name: measured(world, episodes[name], 5 if job["model"] in PEERS else SAMPLES) for name in HELD_OUT}
    seconds = {"seconds": round(trained, 1), "measuring_seconds": round(time.perf_counter() - since - trained, 1)}
    return {**made, **seconds, "data": digest(recordings), "held_out": found, "foreign": load_of_others.cores}


def _world_model(job: Row, recordings: dict[str, Any]) -> tuple[Any, Row]:
    """(the model that acts and imagines, its figures), trained as `worldmodel train --data` does."""
    from worldmodel.commands.train import train
    from worldmodel.storage.run import Run

    with tempfile.TemporaryDirectory() as folder:
        file = recordings[TRAINING].write(Path(folder) / "rows.npz")
        path, overrides = Path(folder) / "run", [*ALONE, f"model={job['model']}", *job["overrides"]]
        train(TASKS[job["env"]].name, job["updates"], job["seed"], path, overrides, "cpu", data=file, log=say)
        agent = Run.open(path).agent(device="cpu")
    world = agent.policy.world
    return world, {"updates": agent.learner.updates, "parameters": sum(p.numel() for p in world.parameters())}


def _peer(job: Row, recordings: dict[str, Any], episodes: dict[str, Any]) -> tuple[Any, Row]:
    from worldmodel.diagnostics.mlp_ensemble import UPDATES, MlpWorld

    recording = recordings[TRAINING]
    world = MlpWorld(recording.obs_spec, recording.action_spec, episodes[TRAINING], job["seed"], **PEERS[job["model"]])
    made = {"updates": UPDATES, "best_after": world.updates, "parameters": world.parameters}
    return world, {**made, "peer": peer_code(job["env"])}


def peer_code(env: str) -> str:
    """A hash of all that decides what a peer's row says: what it is, what it learns from, how it is measured; 12 hex digits."""
    used = ["data", "diagnostics/rollouts", "encoders", "nn/moments", "spaces/keys", "spaces/specs", "storage/replay"]
    files = [HERE.parent / "worldmodel" / f"{name}.py" for name in ("diagnostics/mlp_ensemble", *used)]
    text = "".join(executed(file.read_text(encoding="utf-8")) for file in files) + fingerprint(TASKS[env])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def measured(world: Any, episodes: Any, samples: int) -> Row:
    """Errors and persistence at HORIZONS, of all numbers and of each; None where a horizon fits nowhere or nothing is decoded."""
    import torch

    from worldmodel.diagnostics.rollouts import open_loop

    generator = torch.Generator().manual_seed(0)
    errors = open_loop(world, episodes, CONTEXT, max(HORIZONS), samples=samples, generator=generator)
    at = [h - 1 for h in HORIZONS]
    by_number = {name: squares[at].sqrt().tolist() for name, squares in errors.squares.items()}
    drawn = {} if samples != SAMPLES else calibrated(world, episodes)
    return drawn | {
        "starts": errors.count[at].tolist(),
        "error": _known(errors.error()[at].tolist()),
        "persistence": _known(errors.baseline()[at].tolist()),
        "by_number": {name: [_known(line) for line in lines] for name, lines in by_number.items()},
    }


def calibrated(world: Any, episodes: Any) -> Row:
    """Coverage of nominal 90 %, spread over skill, and fair CRPS of 19 draws of a world model at the horizons up to 15."""
    import torch

    from worldmodel.diagnostics.calibration import calibrate

    found = calibrate(world, episodes, CONTEXT, 15, generator=torch.Generator().manual_seed(0)).columns()
    at = [h - 1 for h in HORIZONS if h <= 15]
    return {name: _known(found[name][at].tolist()) for name in ("coverage90", "spread_skill", "crps")}


def _known(values: Iterable[float]) -> list[float | None]:
    """Of five digits; None for NaN and infinities, which JSON has not."""
    return [float(f"{x:.5g}") if abs(x) < float("inf") else None for x in values]


# All of them ------------------------------------------------------------------------------------------------------------


def report(found: list[Row]) -> str:
    """Errors over the peer's and over persistence, by environment and model; then medians over environments, and what it cost."""
    groups, over = grouped(found, _group), over_best(found)
    lines, medians = [], {}
    for (env, model), group in sorted(groups.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0][1])):
        for held_out in HELD_OUT:
            over_peer = over[env, model][held_out]
            over_persistence = [_ratios(row, held_out, row["held_out"][held_out]["persistence"]) for row in group]
            if model not in RIVALS:
                medians.setdefault((held_out, model), []).append([median_known(column) for column in zip(*over_peer)])
            cells = [_cell(column) for ratios in (over_peer, over_persistence) for column in zip(*ratios)]
            lines.append([env, held_out, f"{model} {STALE}" if any(map(_stale, group)) else model, len(group), *cells])
    head = [
        "environment",
        "episodes",
        "model",
        "seeds",
        *(f"/ best mlp, {h}" for h in HORIZONS),
        *(f"/ persistence, {h}" for h in HORIZONS),
    ]
    return "\n\n".join([table(head, lines), _over_environments(medians), _coverages(groups), _costs(groups)])


def over_best(found: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[list[float | None]]]]:
    """{(environment, model): {episodes: [[ratio at each of HORIZONS], of each row]}}: errors over the smallest of RIVALS, which
    learned from the same rows."""
    found = list(found)
    peers = grouped((row for row in found if row["key"]["model"] in RIVALS), _taught)
    return {
        group: {name: [_ratios(row, name, _best(peers.get(_taught(row), []), name)) for row in rows] for name in HELD_OUT}
        for group, rows in grouped(found, _group).items()
    }


def _group(row: Row) -> tuple[str, str]:
    return row["key"]["env"], _name(row["key"])


def _taught(row: Row) -> tuple[str, int, str]:
    """What a row learned from."""
    return row["key"]["env"], row["key"]["seed"], row["data"]


def _name(key: Key) -> str:
    """A model with its options and, where they are not the default, its updates."""
    updates = [] if key["updates"] in (UPDATES, None) else [f"{key['updates']} updates"]
    return " ".join([key["model"], *key["overrides"], *updates])


def _best(peers: Iterable[Row], held_out: str) -> list[float | None]:
    """The smallest error of some peers at each horizon."""
    columns = zip(*(row["held_out"][held_out]["error"] for row in peers))
    return [min((x for x in column if x is not None), default=None) for column in columns] or [None] * len(HORIZONS)


def _ratios(row: Row, held_out: str, other: Iterable[float | None]) -> list[float | None]:
    """The error at each horizon over another one."""
    return [a / b if a is not None and b else None for a, b in zip(row["held_out"][held_out]["error"], other)]


def median_known(ratios: Iterable[float | None]) -> float | None:
    known = [x for x in ratios if x is not None]
    return median(known) if known else None


def _cell(ratios: Iterable[float | None]) -> str:
    """The median, and all seeds."""
    known = [x for x in ratios if x is not None]
    if len(known) < 2:
        return number(median_known(known), 2)
    return f"{number(median_known(known), 2)} ({' '.join(number(x, 2) for x in known)})"


def _over_environments(medians: dict[tuple[str, str], list[list[float | None]]]) -> str:
    """Of each model the median over environments of its ratios to the peer, and the worst."""
    lines = []
    for (held_out, model), found in sorted(medians.items()):
        columns = [[x for x in column if x is not None] for column in zip(*found)]
        cells = [f"{number(median(column), 2)} (worst {number(max(column), 2)})" if column else "-" for column in columns]
        lines.append([held_out, model, len(found), *cells])
    return table(["episodes", "model", "environments", *(f"/ best mlp, {h}" for h in HORIZONS)], lines)


def _coverages(groups: dict[tuple[str, str], list[Row]]) -> str:
    """Of each world model, how often its central interval of 90 % holds what happened."""
    lines = []
    for (env, model), group in groups.items():
        for held_out in HELD_OUT if model not in PEERS else ():
            columns = zip(*(row["held_out"][held_out].get("coverage90", [None] * 3) for row in group))
            lines.append([env, held_out, model, *(_cell(column) for column in columns)])
    return table(["environment", "episodes", "model", *(f"coverage of 90 %, {h}" for h in HORIZONS[:3])], lines)


def _costs(groups: dict[tuple[str, str], list[Row]]) -> str:
    lines = []
    for (env, model), group in groups.items():
        seconds = number(median_known(row["seconds"] for row in group), 2)
        lines.append([env, model, number(group[0]["parameters"], 1), number(group[0]["updates"], 1), seconds])
    return table(["environment", "model", "parameters", "updates", "seconds to train"], lines)


def available(names: Iterable[str]) -> list[str]:
    """The environments whose packages are installed; says which are not."""
    from worldmodel.envs.make import make_env

    found = []
    for name in names:
        try:
            make_env(TASKS[name].env).close()
            found.append(name)
        except MissingExtraError as error:
            say(f"skipped: {name}: {error}")
    return found


def keys(args: argparse.Namespace, models: Iterable[str]) -> list[Key]:
    """Of all rows that are asked for; a peer has no updates and no options to choose, and sees more than one observation where
    one does not tell all."""
    common = {name: {"updates": None, "overrides": []} for name in PEERS}
    given = {"updates": args.updates, "overrides": args.overrides}
    return [
        {"env": env, "model": model, "seed": seed, **common.get(model, given)}
        for env in args.env
        for seed in args.seeds
        for model in models
        if model != "mlp x4" or TASKS[env].hides
    ]


def main() -> int:
    parser = options(__doc__, seeds=(0, 1, 2), overrides=True)
    parser.add_argument("--env", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="ENV", help=", ".join(TASKS))
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="files of configs/model")
    parser.add_argument("--updates", type=int, default=UPDATES, help="gradient updates of a world model")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of recorded rows, and of a probe's results")
    parser.add_argument("--probe", action="store_true", help="for trying things: rows in the cache, models measured at every call")
    args = parser.parse_intermixed_args()
    models = [model for model in args.model if model not in PEERS]
    try:
        for model in models:
            Config.from_recipe("cartpole", [*ALONE, f"model={model}", *args.overrides])
    except ConfigError as error:
        parser.error(str(error))
    folder = args.cache / "probe" if args.probe else args.results
    rows = Rows("truth", folder, args.again)
    failed = 0 if args.print else measure(args, models, rows)
    wanted = keys(args, [*PEERS, *models]) if args.probe else None
    print(report([row for row in rows if row["key"]["env"] in args.env and (wanted is None or row["key"] in wanted)]))
    return failed


def measure(args: argparse.Namespace, models: Iterable[str], rows: Rows) -> int:
    """Measures the keys that have no row; gives the number of those that failed."""
    args.env = available(args.env)
    run = lambda key: call(__file__, {**key, "cache": str(args.cache)}, 1, 3600)  # noqa: E731
    missing, rows.again = _peer_keys(args, rows), True
    failed = rows.measure(missing, run, summary=_summary)
    rows.again = args.again or args.probe
    return failed + rows.measure(keys(args, models), run, summary=_summary)


def _peer_keys(args: argparse.Namespace, rows: Rows) -> list[Key]:
    """Of the peers without a row of their present code and recordings, whatever has changed in the library beside."""
    there = [] if args.again else [row["key"] for row in rows if row["key"]["model"] in PEERS and not _stale(row)]
    return [key for key in keys(args, PEERS) if key not in there]


def _stale(row: Row) -> bool:
    return row["peer"] != peer_code(row["key"]["env"]) if row["key"]["model"] in PEERS else stale(row)


def _summary(row: Row) -> str:
    errors = "; ".join(f"{name} {'/'.join(number(x, 2) for x in row['held_out'][name]['error'])}" for name in HELD_OUT)
    return f"{errors}, {row['seconds']:.0f} s to train"


if __name__ == "__main__":
    script(main, work)
