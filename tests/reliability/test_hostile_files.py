"""Hostile files: whatever opens them runs nothing of theirs, writes nowhere else, and says what they are."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from catalogue import times
from small_runs import OPTIONS, small_train
from test_damage import in_child, tried

from worldmodel.agents import Dreamer
from worldmodel.envs import minari, sources
from worldmodel.errors import ConfigError, CorruptError, StorageError
from worldmodel.storage import best
from worldmodel.storage.recording import Recording
from worldmodel.storage.run import Run

CHAIN = "worldmodel.envs:Chain-v0"
NAMED = {"TrustError", "CorruptError", "ConfigError", "StorageError", "Exit2", "Exit4"}
ADVICE = re.compile(
    r"[Ee]xpected|[Rr]estore|Use |Make |Give|Choose|Install|[Ee]xport|Fetch|Correct|Check|Move it|Known: "
    r"|needs that library|plain data only"
)
"""What a message says to do."""

EVIL = "evil_module:Evil-v0"

# Carriers: files with a pickle in them, which makes a file of its own name in `canary` when it is opened -----------------


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def zipped(members: dict[str, bytes], flags: int = 0, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    data = bytearray(out.getvalue())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        found = -1
        while flags and (found := data.find(mark, found + 1)) >= 0:
            data[found + at] |= flags
    return bytes(data)


def saved(save, *args, **kwargs) -> bytes:
    out = io.BytesIO()
    save(*args, out, **kwargs) if save is torch.save else save(out, *args, **kwargs)
    return out.getvalue()


def with_attribute(path: Path, code: bytes) -> bytes:
    with h5py.File(path, "w") as file:
        file.attrs["pickle"] = np.void(code)
        file.create_group("episode_0").attrs["id"] = np.void(code)
    return path.read_bytes()


def carriers(folder: Path, canary: Path, recording: bytes) -> None:
    """About as many kinds of files as pickles come in; `recording` is a good one, which gets an array of objects."""
    folder.mkdir()

    def code(name: str) -> bytes:
        return pickle.dumps(Payload(canary / name), protocol=4)

    def objects(name: str) -> np.ndarray:
        return np.array([Payload(canary / name), None], dtype=object)

    with zipfile.ZipFile(io.BytesIO(recording)) as archive:
        episodes = {info.filename: archive.read(info) for info in archive.infolist()}
    tensors = safetensors.numpy.save({"weight": np.ones(3, np.float32)})
    serialized = base64.b64encode(code("sb3.zip")).decode()
    sb3 = {"data": json.dumps({"policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": serialized}}).encode()}
    sb3 |= {"policy.pth": saved(torch.save, Payload(canary / "sb3.zip")), "_stable_baselines3_version": b"2.7.0"}
    deep = {"optim.safetensors": code("flags.zip"), "manifest.json": code("flags.zip"), "state.json": code("flags.zip")}
    made = {
        "plain.pkl": code("plain.pkl"),
        "vecnormalize.pkl": pickle.dumps({"obs_rms": Payload(canary / "vecnormalize.pkl"), "norm_obs": True}),
        "replay.pkl": pickle.dumps([Payload(canary / "replay.pkl")], protocol=2),
        "torch.pt": saved(torch.save, Payload(canary / "torch.pt")),
        "legacy.pth": saved(torch.save, Payload(canary / "legacy.pth"), _use_new_zipfile_serialization=False),
        "sb3.zip": zipped(sb3),
        "object.npy": saved(np.save, objects("object.npy"), allow_pickle=True),
        "object.npz": saved(np.savez, obs=objects("object.npz")),
        ".metadata": code(".metadata"),
        "cache.joblib": b"ZF0x19" + zlib.compress(code("cache.joblib")),
        "world.safetensors": code("world.safetensors"),
        "flags.zip": zipped(deep, flags=0x1),
        "deflated.zip": zipped(deep, method=zipfile.ZIP_DEFLATED),
        "polyglot.safetensors": tensors + zipped(sb3),
        "episodes.npz": zipped({**episodes, "reward.npy": saved(np.save, objects("episodes.npz"), allow_pickle=True)}),
        "recipe.yaml": f"env: !!python/object/apply:os.system ['touch {canary / 'recipe.yaml'}']\n".encode(),
        "data.hdf5": with_attribute(folder.parent / "made.hdf5", code("data.hdf5")),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """What opening.py works on, and no canary yet."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "canary").mkdir()
    small_train(folder / "run", 20, options={"eval.every": 0, "checkpoint.keep": 1})
    best.write(folder / "run", best.Best(20, 1.0, 1.0, 2))
    Run.open(folder / "run").agent().save(folder / "good.zip")
    run = Run.open(folder / "run")
    agent = run.agent()
    recording = Recording.from_replay(run.replay(), agent.obs_spec, agent.action_spec, env_id=CHAIN)
    recording.write(folder / "good.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        minari.write("toy/set-v0", recording)
    carriers(folder / "carriers", folder / "canary", (folder / "good.npz").read_bytes())
    return folder


def opened(folder: Path, what: str, every: int = 1, **environment: str) -> list[dict]:
    """What opening.py tells: a row for each opening, or for one in `every`."""
    here = {**os.environ, "MINARI_DATASETS_PATH": str(folder / "minari"), "OMP_NUM_THREADS": "1", **environment}
    program = [sys.executable, str(Path(__file__).with_name("opening.py")), str(folder), what, str(every)]
    done = subprocess.run(program, cwd=folder, env=here, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(rows: list[dict]) -> list[str]:
    """Openings that were not refused by name and with advice, or at which the hook saw something."""
    return [
        f"{row['what']}, {row['how']}: {row['raised'] or 'nothing raised'}: {row['message'][:300]} {row['hits']}"
        for row in rows
        if row["hits"] or row["raised"] not in NAMED or not ADVICE.search(row["message"])
    ]


def test_a_canary_sings_where_its_carrier_is_unpickled(shelf, tmp_path):
    """The teeth of this file: each kind of carrier would run its code in the loader that it is made for."""
    carriers(tmp_path / "carriers", tmp_path / "canary", (shelf / "good.npz").read_bytes())
    (tmp_path / "canary").mkdir()
    code = """import os, sys, torch, numpy
from stable_baselines3.common.save_util import load_from_zip_file
loaders = {
    "torch.pt": lambda path: torch.load(path, weights_only=False),
    "legacy.pth": lambda path: torch.load(path, weights_only=False),
    "object.npz": lambda path: numpy.load(path, allow_pickle=True)["obs"],
    "episodes.npz": lambda path: numpy.load(path, allow_pickle=True)["reward"],
    "sb3.zip": load_from_zip_file,
    "plain.pkl": lambda path: numpy.load(path, allow_pickle=True),
}
for name, load in loaders.items():
    try:
        load(os.path.join(sys.argv[1], name))
    except Exception as error:
        print(error)
print(*loaders)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "carriers")], capture_output=True, text=True, timeout=300)
    assert {path.name for path in (tmp_path / "canary").iterdir()} == set(done.stdout.splitlines()[-1].split()), done.stdout


def test_no_carrier_runs_code_wherever_it_is_opened(shelf, figure):
    """Teeth: without the refusal in `open_algorithm` the hook sees pickles, and canaries are there."""
    rows = opened(shelf, "carriers", times(3, 1))
    found = faults(rows)
    assert not found, f"{len(found)} of {len(rows)}:\n" + "\n".join(found[:40])
    assert not list((shelf / "canary").iterdir())
    kinds, ways = {row["what"] for row in rows}, {row["how"] for row in rows}
    raised = ", ".join(f"{name} {count}" for name, count in sorted(Counter(row["raised"] for row in rows).items()))
    figure("S1", f"{len(kinds)} carriers of code opened in {len(ways)} ways, {len(rows)} times: 0 ran, 0 canaries; {raised}")


# Archives ---------------------------------------------------------------------------------------------------------------

ODD_NAMES = (
    "../evil.safetensors",
    "/tmp/evil.safetensors",
    "..\\evil.safetensors",
    "C:\\evil.safetensors",
    "//host/share/evil.safetensors",
)
ODD_NAMES += (
    "a/../../evil.safetensors",
    "evil.safetensors/",
    "World.safetensors",
    "WORLD.SAFETENSORS",
    "con.safetensors.",
    "evil\x00.safetensors",
)
ODD_NAMES += (
    "\u202eevil.safetensors",
    "evil\n.safetensors",
    "e" * 300 + ".safetensors",
    "-evil.safetensors",
    ".safetensors",
    "episodes.json/x.npy",
)
MODES = {"symlink": 0o120777, "device": 0o020666, "block device": 0o060666, "fifo": 0o010666, "folder": 0o040777}


def archives(good: bytes) -> dict[str, bytes]:
    """Zips that would write elsewhere, or blow up, where somebody extracted them; each holds the members of a good one, too."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    made = {f"name {name[:40]!r}": zipped({**members, name: b"x"}) for name in ODD_NAMES}
    for kind, mode in MODES.items():
        out = io.BytesIO(good)
        with zipfile.ZipFile(out, "a") as archive:
            info = zipfile.ZipInfo("link.safetensors")
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, "/etc/passwd")
        made[kind] = out.getvalue()
    with pytest.warns(UserWarning, match="Duplicate name"):
        out = io.BytesIO(good)
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(next(iter(members)), b"another")
        made["duplicate"] = out.getvalue()
    bomb = bytes(256 << 20)
    made["bomb"] = zipped({**members, "bomb.safetensors": bomb}, method=zipfile.ZIP_DEFLATED)
    made["bomb for a member"] = zipped({**members, next(iter(members)): bomb}, method=zipfile.ZIP_DEFLATED)
    many = {f"a{i}.safetensors": b"" for i in range(5_000)}
    made["many"] = zipped({**members, **many})
    return made


def test_archives_write_nothing_and_do_not_blow_up(shelf, tmp_path, monkeypatch, figure):
    """Teeth: `zipfile` itself, asked to extract the same archives, writes to the target."""
    inside, count = tmp_path / "a" / "b" / "c", 0
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    agent = Dreamer.load(shelf / "good.zip", device="cpu")
    file = inside / "hostile.zip"

    def outcome(act: Callable, kind: str) -> str:
        return f"{tried(lambda: repr(act(file)).encode(), b'', file.name, (CorruptError, ConfigError))}: {kind}"

    def refusals() -> Counter:
        found: Counter = Counter()
        for good, acts in (("good.zip", (Dreamer.load, agent.set_parameters)), ("good.npz", (Recording.read, sources.recording))):
            for kind, data in archives((shelf / good).read_bytes()).items():
                file.write_bytes(data)
                found.update(outcome(act, kind) for act in acts)
        return found

    made = in_child(refusals, headroom=600 << 20)
    wrong = {what: n for what, n in made.items() if not what.startswith("refused")}
    assert not wrong, wrong
    count = sum(made.values())
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == ["a/b/c/hostile.zip"]
    figure("S2", f"{len(made)} kinds of hostile archives opened {count} times: all refused, 0 bytes written, within 600 MiB")
    with zipfile.ZipFile(shelf / "good.zip") as archive:
        archive.extractall(inside / "teeth")
    assert list((inside / "teeth").iterdir())


def test_what_is_no_regular_file_is_refused_and_waited_for_by_nobody(tmp_path):
    """Teeth: without the check in `checkpoint.unpack` this test never ends."""
    os.mkfifo(tmp_path / "pipe.zip")
    os.mkfifo(tmp_path / "pipe.npz")
    for act in (Dreamer.load, Recording.read):
        for name in ("pipe.zip", "pipe.npz"):
            with pytest.raises((CorruptError, ConfigError), match=r"is no (regular )?file"):
                act(tmp_path / name)


def test_a_lock_that_is_a_link_does_not_lead_out_of_the_run(shelf, tmp_path, figure):
    """Teeth: without O_NOFOLLOW the file that it points to is emptied and gets our process's number."""
    shutil.copytree(shelf / "run", tmp_path / "run")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"\.lock"):
        Run.open(tmp_path / "run", write=True)
    assert victim.read_text() == "precious"
    figure("S2", "a run's lock that is a link: refused, and what it points to is untouched")


# Environments of strangers ----------------------------------------------------------------------------------------------

STRANGE = """
import gymnasium
from worldmodel.envs.tiny import Chain
{line}
gymnasium.register("Evil-v0", Chain)
class Around(gymnasium.Wrapper):
    pass
"""
AROUND = {"eval.every": 0, "env.wrappers": ["evil_module:Around"]}


@pytest.fixture(scope="module")
def foreign(shelf) -> Path:
    """A run of an environment in a module, which makes a canary when it is imported from now on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(shelf)
        patch.setenv("MINARI_DATASETS_PATH", str(shelf / "minari"))
        (shelf / "evil_module.py").write_text(STRANGE.format(line=""))
        small_train(shelf / "foreign", 30, EVIL, options=AROUND)
        minari.write("toy/evil-v0", dataclasses.replace(sources.recording(shelf / "foreign"), env_options={}))
        about = shelf / "minari" / "toy" / "evil-v0" / "data" / "metadata.json"
        spec = json.loads(json.loads(about.read_text())["env_spec"]) | {"entry_point": "evil_module:Chain"}
        about.write_text(json.dumps({**json.loads(about.read_text()), "env_spec": json.dumps(spec)}))
    gymnasium.registry.pop("Evil-v0")
    sys.modules.pop("evil_module")
    shutil.rmtree(shelf / "__pycache__", ignore_errors=True)
    (shelf / "evil_module.py").write_text(STRANGE.format(line=f"open({str(shelf / 'canary' / 'env')!r}, 'a').close()"))
    return shelf


def test_opening_a_strangers_run_imports_nothing_and_playing_in_it_does(foreign, figure):
    """Teeth: the same hook sees the import where a command plays in the environment, as SECURITY.md says."""
    rows = opened(foreign, "names", PYTHONPATH=str(foreign), SMALL=json.dumps({**OPTIONS, **AROUND}))
    opens = [row for row in rows if row.get("what") == "opens"]
    plays = [row for row in rows if row.get("what") == "plays"]
    assert not (wrong := [row for row in opens if row["hits"] or row["raised"]]), wrong
    assert [row for row in rows if "imported" in row] == [{"imported": False}]
    assert not (wrong := [row for row in plays if "import evil_module" not in row["hits"]]), wrong
    assert (foreign / "canary" / "env").exists()
    (foreign / "canary" / "env").unlink()
    figure(
        "S5", f"a stranger's run opened in {len(opens)} ways: 0 imports of its environment's module; {len(plays)} ways play in it"
    )
