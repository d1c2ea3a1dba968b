"""What a comparison and a sweep have in common: seeds, a plan that is written first, rows in processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from worldmodel.errors import ConfigError, require_whole
from worldmodel.processes import Failed, Processes
from worldmodel.storage import files


def numbered(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds, of their number or of themselves. Raises ConfigError."""
    if isinstance(seeds, int):
        require_whole(seeds=seeds)
        return tuple(range(seeds))
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"seeds is {list(seeds)}; expected some numbers of at least 0.")
    return tuple(dict.fromkeys(seeds))


def kept_plan(folder: Path, plan: Mapping[str, Any], what: str) -> None:
    """Writes a plan before anything is measured; ConfigError where the folder has another one. `what` it is a plan of."""
    file, now = folder / "plan.json", json.loads(json.dumps(plan))
    if file.exists():
        before = files.parse_json(file.read_bytes(), file)
        names = dict.fromkeys([*now, *before])
        differ = [f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]
        if differ:
            raise ConfigError(
                f"{folder} holds another {what}: {'; '.join(differ)}. Its rows are not comparable: choose another --out, or "
                "the settings of before."
            )
        return
    files.make_folder(folder)
    files.write(file, json.dumps(now, indent=1).encode())


def logged(
    processes: Processes,
    function: str,
    job: Mapping[str, Any],
    file: Path,
    failed: MutableMapping[str, str],
    name: str,
    threads: int = 1,
) -> dict[str, Any]:
    """What `module:function` makes of a job, its stderr in a file; where it fails, failed[name] says why. Raises Failed."""
    try:
        return processes.call(function, job, threads, log=file)
    except Failed as error:
        failed[name] = f"{error} (all of it: {file})"
        raise
