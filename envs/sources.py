"""Sources of recorded experience: NPZ files, folders of them, Minari's data sets, and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from worldmodel.envs import minari
from worldmodel.errors import ConfigError, did_you_mean
from worldmodel.spaces import ActionSpec, ObsSpec
from worldmodel.spaces.layouts import Layout
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run
from worldmodel.storage.run_folder import CONFIG


def recording(
    source: str | Path | Run | Recording,
    layout: Layout | Mapping[str, Layout] | None = None,
    declared: minari.Declared | None = None,
) -> Recording:
    """The episodes of one source: FILE.npz, a folder of such files, "minari:ID", a run or its folder.

    `layout`: of Minari's images whose shapes leave it open, and `declared`: `EnvConfig.declared`; the other sources have theirs.
    Raises ConfigError, CorruptError, MissingExtraError, UnsupportedSpaceError.
    """
    if isinstance(source, Recording):
        return source
    if isinstance(source, Run):
        return _of_run(source)
    if str(source).startswith(minari.PREFIX):
        return minari.read(str(source).removeprefix(minari.PREFIX), layout, declared)
    path = Path(source)
    if (path / CONFIG).is_file():
        return _of_run(Run.open(path))
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise ConfigError(f"'{path}' holds neither a run nor .npz files. Expected one of them, or minari:ID.")
        return Recording.joined([Recording.read(file) for file in files], str(path))
    if not path.exists():
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), near)
        hint = hint if hint.startswith(" Did") else ""
        raise ConfigError(f"'{path}' is not there.{hint} Expected an .npz file, a folder of them, a run folder or minari:ID.")
    return Recording.read(path)


def recordings(
    sources: Sequence[str | Path | Run | Recording],
    layout: Layout | Mapping[str, Layout] | None = None,
    declared: minari.Declared | None = None,
) -> Recording:
    """All episodes of all sources. ConfigError where their spaces differ."""
    return Recording.joined([recording(source, layout, declared) for source in sources])


def _of_run(run: Run) -> Recording:
    state = run.read()[1]
    obs, action = ObsSpec.from_json(state["observation"]), ActionSpec.from_json(state["action"])
    env = run.config.env
    return Recording.from_replay(run.replay(), obs, action, env_id=env.id, origin=str(run.path), env_options=env.options)
