"""A process of its own that opens what it is given in every way there is: `python opening.py FOLDER carriers|names EVERY`.

FOLDER holds `carriers/`, hostile files; `run/`, a good run; `good.zip` and `good.npz`, an agent and a recording; `foreign/`, a run
whose environment is in a module. An audit hook, which cannot be taken off again, notes what only running code does. One
line of JSON says for each opening what was opened, how, what was raised and what the hook saw. Of all pairs of a carrier and a way
one in EVERY is tried, each way and each carrier among them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.")
HARMLESS = ("socket.gethostname",)
EVERY = int(sys.argv[3])
hits: list[str] = []
turns: Counter[str] = Counter()
"""How often each way came up."""


def watch(event: str, args: tuple) -> None:
    if event.startswith(WATCHED) and event not in HARMLESS:
        hits.append(event)
    elif event == "exec" and getattr(args[0], "co_filename", "").endswith("evil_module.py"):  # import_module raises no "import"
        hits.append("import evil_module")


sys.addaudithook(watch)

import torch  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from worldmodel.agents import Dreamer, DreamPolicy, SB3Agent, guidance, latent_policy_kwargs, train_in_dream  # noqa: E402
from worldmodel.cli import app  # noqa: E402
from worldmodel.commands.train import train  # noqa: E402
from worldmodel.config import Config  # noqa: E402
from worldmodel.envs import ImaginedVecEnv, sources  # noqa: E402
from worldmodel.storage import checkpoint  # noqa: E402
from worldmodel.storage.recording import Recording  # noqa: E402
from worldmodel.storage.run import Run  # noqa: E402
from worldmodel.view import tensorboard  # noqa: E402

torch.set_num_threads(1)
CHAIN = "worldmodel.envs:Chain-v0"
EVIL = "evil_module:Evil-v0"


def told(what: str, how: str, act: Callable[[], Any]) -> None:
    """Opens, and prints what came of it; where it is this one's turn."""
    turns[how] += 1
    if (turns[how] + list(turns).index(how)) % EVERY:
        return
    hits.clear()
    raised, message = "", ""
    try:
        act()
    except BaseException as error:
        raised, message = type(error).__name__, str(error)
    seen = sorted(set(hits))
    print(
        json.dumps({"what": what, "how": how, "raised": raised, "message": message, "hits": seen}), file=sys.__stdout__, flush=True
    )


def command(*words: Any) -> None:
    """The command line; its exit code and message as an error, unless it is 0."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise type(f"Exit{result.exit_code}", (Exception,), {})(result.stderr)


def warm_up() -> None:
    """Opens a good data set: what the packages of Minari do when they are imported is no matter of the file's."""
    sources.recording("minari:toy/set-v0")


def files(folder: Path) -> None:
    """Each carrier as a file, wherever a file is opened."""
    agent = Dreamer.load(folder / "good.zip", device="cpu")
    warm_up()
    for carrier in sorted((folder / "carriers").iterdir()):
        shelf = folder / "shelf"
        shutil.rmtree(shelf, ignore_errors=True)
        (shelf / "dream").mkdir(parents=True)
        for name in ("recipe.yaml", "a.npz", "agent.zip", "events.out.tfevents.1.host", "dream/world.zip", "dream/policy.zip"):
            shutil.copy(carrier, shelf / name)
        for how, act in {**calls(carrier, shelf, agent), **commands(carrier, shelf)}.items():
            told(carrier.name, how, act)
        minari(folder, carrier)


def calls(file: Path, shelf: Path, agent: Dreamer) -> dict[str, Callable[[], Any]]:
    """Everything in Python that opens a file; `shelf` holds copies of it under the names that are asked for."""
    config = {"agent": {"kind": "sb3", "path": str(shelf / "agent.zip")}}
    return {
        "Run.open": lambda: Run.open(file),
        "Dreamer.load": lambda: Dreamer.load(file),
        "Dreamer.load .zip": lambda: Dreamer.load(shelf / "agent.zip"),
        "set_parameters": lambda: agent.set_parameters(shelf / "agent.zip"),
        "load_replay_buffer": lambda: agent.load_replay_buffer(shelf / "agent.zip"),
        "checkpoint.unpack": lambda: checkpoint.unpack(file),
        "Recording.read": lambda: Recording.read(file),
        "recording of a folder": lambda: sources.recording(shelf),
        "DreamPolicy.load": lambda: DreamPolicy.load(shelf / "dream"),
        "agent.path": lambda: SB3Agent("MlpPolicy", CHAIN, config=config, device="cpu"),
        "recipe": lambda: Config.from_recipe(shelf / "recipe.yaml"),
        "event file": lambda: tensorboard.read(shelf),
        "train data=": lambda: train(CHAIN, 10, run_dir=shelf / "run", data=[file], device="cpu"),
    }


def commands(file: Path, shelf: Path) -> dict[str, Callable[[], Any]]:
    """Every command that opens a file."""
    return {
        "info": lambda: command("info", f"{file}{os.sep}"),
        "info recipe": lambda: command("info", shelf / "recipe.yaml"),
        "eval": lambda: command("eval", file),
        "dream": lambda: command("dream", file),
        "fit-prior": lambda: command("fit-prior", file, "--kind", "gaussian"),
        "data info": lambda: command("data", "info", file),
        "data import": lambda: command("data", "import", shelf / "a.npz", "--out", shelf / "b.npz"),
        "data export": lambda: command("data", "export", file, "--out", shelf / "b.npz"),
        "train --data": lambda: command("train", CHAIN, "--data", file, "--run", shelf / "run"),
        "train --resume": lambda: command("train", CHAIN, "--resume", "--run", file),
        "train recipe": lambda: command("train", shelf / "recipe.yaml", "--run", shelf / "run"),
        "train agent.path": lambda: command("train", CHAIN, "agent=sb3", f"agent.path={file}", "--run", shelf / "run"),
    }


def minari(folder: Path, carrier: Path) -> None:
    """The carrier in place of each file of a Minari data set."""
    data = Path(os.environ["MINARI_DATASETS_PATH"]) / "toy" / "set-v0" / "data"
    for name in ("main_data.hdf5", "metadata.json"):
        kept = (data / name).read_bytes()
        shutil.copy(carrier, data / name)
        told(carrier.name, f"minari {name}", lambda: sources.recording("minari:toy/set-v0"))
        told(carrier.name, f"data info minari {name}", lambda: command("data", "info", "minari:toy/set-v0"))
        (data / name).write_bytes(kept)


def slots(run: Path) -> Iterator[tuple[Path, bool]]:
    """(a file of a run that is read when it is opened, whether a manifest can vouch for it)."""
    yield run / "config.yaml", False
    yield run / "result.json", False
    yield run / "best.json", False
    yield from ((path, False) for path in sorted((run / "replay").iterdir())[:1])
    for path in sorted((run / "checkpoints").iterdir()):
        yield path / "manifest.json", False
        for name in ("state.json", "world.safetensors", "optim.safetensors"):
            yield path / name, False
            yield path / name, True


def vouch(checkpoint_folder: Path, name: str) -> None:
    """A manifest that hashes to what the file is now."""
    file = checkpoint_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    data = (checkpoint_folder / name).read_bytes()
    manifest["files"][name] = {"size": len(data), "sha256": checkpoint.hashlib.sha256(data).hexdigest()}
    file.write_text(json.dumps({**manifest, "hash": checkpoint._hash(manifest)}))


def runs(folder: Path) -> None:
    """Each carrier in place of each file of a run that has one checkpoint."""
    run = folder / "run"
    for carrier in sorted((folder / "carriers").iterdir()):
        for file, vouched in list(slots(run)):
            kept = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
            shutil.copy(carrier, file)
            if vouched:
                vouch(file.parent, file.name)
            name = f"{file.name}{' (vouched for)' if vouched else ''}"
            acts: dict[str, Callable[[], Any]] = {"Run.agent": lambda: Run.open(run).agent()}
            if not vouched:
                acts["info"] = lambda: command("info", run)
            if file.name == "result.json":
                acts = {"Run.result": lambda: Run.open(run).result}
                acts["train --resume"] = lambda: command("train", CHAIN, "--resume", "--run", run)
            elif file.name == "best.json":  # unless the best one is asked for, the newest stands in
                acts = {"Run.agent": lambda: Run.open(run).agent("best"), "eval": lambda: command("eval", run, "--step", "best")}
            elif file.parent.name == "replay":
                acts = {"Run.replay": lambda: Run.open(run).replay(), "data info": lambda: command("data", "info", run)}
            for how, act in acts.items():
                told(carrier.name, f"{name}: {how}", act)
            for path, data in kept.items():
                path.write_bytes(data)


def names(folder: Path) -> None:
    """A stranger's run whose environment is in a module: what imports it, and what does not."""
    run, out = folder / "foreign", folder / "out"
    out.mkdir()
    warm_up()
    acts: dict[str, Callable[[], Any]] = {
        "Run.open": lambda: Run.open(run),
        "Run.world_model": lambda: Run.open(run).world_model(),
        "Run.agent": lambda: Run.open(run).agent(),
        "Run.replay": lambda: Run.open(run).replay(),
        "Dreamer.load": lambda: Dreamer.load(run),
        "latent_policy_kwargs": lambda: latent_policy_kwargs(run),
        "ImaginedVecEnv": lambda: ImaginedVecEnv(run, 2).reset(),
        "guidance.interpolation_video": lambda: guidance.interpolation_video(run, "0:0", "0:1", out / "between.gif"),
        "info": lambda: command("info", run),
        "data info": lambda: command("data", "info", run),
        "data export": lambda: command("data", "export", run, "--out", out / "real.npz"),
        "data export --dreamed": lambda: command(
            "data", "export", run, "--dreamed", 2, "--horizon", 3, "--out", out / "dreamed.npz"
        ),
        "data info FILE.npz": lambda: command("data", "info", out / "real.npz"),
        "data info minari:ID": lambda: command("data", "info", "minari:toy/evil-v0"),
        "dream --start prior": lambda: command("dream", run, "--start", "prior", "--horizon", 3, "--out", out / "dream.gif"),
        "fit-prior": lambda: command("fit-prior", run, "--kind", "categorical", "--steps", 2, "--out", out / "fitted"),
        "train --data": lambda: train(
            EVIL, 12, run_dir=out / "data", data=[run], overrides=json.loads(os.environ["SMALL"]), device="cpu"
        ),
    }
    plays: dict[str, Callable[[], Any]] = {
        "eval": lambda: command("eval", run, "--episodes", 1),
        "dream": lambda: command("dream", run, "--horizon", 3),
        "train --resume": lambda: command("train", EVIL, "--resume", "--run", run, "--steps", 32),
        "train_in_dream": lambda: train_in_dream("a2c", run, total_timesteps=64, worlds=2, episodes=0),
    }
    for how, act in acts.items():
        told("opens", how, act)
    print(json.dumps({"imported": "evil_module" in sys.modules}), flush=True)
    for how, act in plays.items():
        sys.modules.pop("evil_module", None)
        told("plays", how, act)


if __name__ == "__main__":
    for part in {"carriers": (files, runs), "names": (names,)}[sys.argv[2]]:
        part(Path(sys.argv[1]))
