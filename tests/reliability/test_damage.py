"""Damaged checkpoints and replays are refused by name or read as they were; what is whole of a run goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from catalogue import times
from small_runs import small_train
from test_checkpoint import content, put
from test_replay import fill, store

from worldmodel.agents import Dreamer
from worldmodel.errors import CorruptError, StorageError
from worldmodel.storage import checkpoint, segments
from worldmodel.storage.replay import Replay
from worldmodel.storage.run import Run

HEADROOM = 64 << 20
"""Bytes of address space that reading a damaged file of some kilobytes may take besides what the process has."""

Files = dict[str, bytes]

# The mutator ------------------------------------------------------------------------------------------------------------

ODD_JSON = (b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"[" * 3000, b'{"a":' * 200 + b"1" + b"}" * 200, b"[1]", b"")
ODD_JSON += (b"\xff\xfe", b'{"step": -1}', b'{"a": ' + b"9" * 5000 + b"}", b'{"\\ud800": 1}', b"null", b"{}")
LENGTHS = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1)


def mutants(files: Files, foreign: Files, count: int, seed: int = 0) -> Iterator[tuple[str, Files]]:
    """(what was done, the files that it changed), always the same ones; `foreign` are of another step of the same run."""
    rng = random.Random(seed)
    kinds = [cut, flip, insert, zero, swap, exchange, odd_json, lie]
    while count:
        kind = rng.choice(kinds)
        changed = kind(rng, files, foreign)
        if any(files.get(name) != data for name, data in changed.items()):
            yield kind.__name__, changed
            count -= 1


def place(rng: random.Random, files: Files) -> tuple[str, bytes, int, int]:
    """A file and a range in it; short ranges are as likely as long ones."""
    name = rng.choice(sorted(files))
    data = files[name]
    a = rng.randrange(len(data) + 1)
    return name, data, a, min(len(data), a + (1 << rng.randrange(12)))


def cut(rng: random.Random, files: Files, foreign: Files) -> Files:
    name, data, a, b = place(rng, files)
    return {name: rng.choice([data[:a], data[a:], data[:a] + data[b:]])}


def flip(rng: random.Random, files: Files, foreign: Files) -> Files:
    name, data, a, _ = place(rng, files)
    return {name: data[:a] + bytes(x ^ (1 << rng.randrange(8)) for x in data[a : a + 1]) + data[a + 1 :]}


def insert(rng: random.Random, files: Files, foreign: Files) -> Files:
    name, data, a, b = place(rng, files)
    return {name: data[:a] + rng.choice([rng.randbytes(b - a), data[a:b], bytes(1), b" ", b"\n", b","]) + data[a:]}


def zero(rng: random.Random, files: Files, foreign: Files) -> Files:
    name, data, a, b = place(rng, files)
    return {name: data[:a] + bytes(b - a) + data[b:]}


def swap(rng: random.Random, files: Files, foreign: Files) -> Files:
    a, b = rng.choice(sorted(files)), rng.choice(sorted(files))
    return {a: files[b], b: files[a]}


def exchange(rng: random.Random, files: Files, foreign: Files) -> Files:
    name = rng.choice(sorted(files))
    return {name: foreign[name]}


def odd_json(rng: random.Random, files: Files, foreign: Files) -> Files:
    name = rng.choice([n for n in sorted(files) if n.endswith(".json")] or sorted(files))
    data, odd = files[name], rng.choice(ODD_JSON)
    return {name: rng.choice([odd, data[:1] + odd[1:-1] + b"," + data[1:], data.replace(b"1", odd, 1)])}


def lie(rng: random.Random, files: Files, foreign: Files) -> Files:
    """Another number where a length may stand: 4 or 8 bytes at the beginning, or digits."""
    name, data, a, _ = place(rng, files)
    length = rng.choice(LENGTHS)
    at = rng.choice([0, 8, 12, 18, 22, a])
    packed = struct.pack("<Q", length) if rng.random() < 0.5 else struct.pack("<I", length & 0xFFFFFFFF)
    digit = next((i for i in range(a, len(data)) if data[i : i + 1].isdigit()), a)
    return {
        name: rng.choice([data[:at] + packed + data[at + len(packed) :], data[:digit] + str(length).encode() + data[digit + 1 :]])
    }


def tried(read: Callable[[], bytes], whole: bytes, named: str, refusals: tuple = (StorageError,)) -> str:
    """The outcome of reading: "identical" or "refused", which is allowed, or what is not."""
    try:
        found = read()
    except refusals as error:  # CorruptError, or a newer schema's
        return "refused" if named in str(error) else f"not named: {error}"
    except Exception as error:
        return f"other: {type(error).__name__}: {error}"[:200]
    return "identical" if found == whole else "different"


def in_child(act: Callable[[], Counter], headroom: int = HEADROOM) -> Counter:
    """`act` in a process whose memory cannot grow by more than `headroom`."""
    import resource

    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + headroom
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            os.write(theirs, json.dumps(act()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return Counter(json.loads(said))


def summary(counts: Counter) -> str:
    """The counts for a figure; the test fails on what is neither refused nor identical."""
    wrong = {kind: n for kind, n in counts.items() if kind not in ("refused", "identical")}
    assert not wrong, wrong
    text = f"0 silent differences, 0 other exceptions (refused {counts['refused']:,}, identical {counts['identical']:,})"
    return f"{text}, within {HEADROOM >> 20} MiB"


# Checkpoints ------------------------------------------------------------------------------------------------------------


def fingerprint(found: checkpoint.Content) -> bytes:
    """All of a checkpoint's content, bit for bit, types included."""
    arrays = [
        (stem, name, array.dtype.str, array.shape, array.tobytes())
        for stem, named in sorted(found[0].items())
        for name, array in sorted(named.items())
    ]
    return repr((arrays, found[1], sorted(found[2].items()))).encode()


def damaged_folders(folder: Path, count: int) -> Counter:
    """The outcome of reading a checkpoint's folder with damaged files."""
    path, other = (checkpoint.write(folder, step, *content(step)) for step in (3, 4))
    files, foreign = ({file.name: file.read_bytes() for file in sorted(p.iterdir())} for p in (path, other))
    whole = fingerprint(checkpoint.read(path))
    counts: Counter = Counter()
    for _, changed in mutants(files, foreign, count):
        for name, data in changed.items():
            put(path / name, data)
        counts[tried(lambda: fingerprint(checkpoint.read(path)), whole, "step-000000000003")] += 1
        for name in changed:
            put(path / name, files[name])
    return counts


def damaged_zips(folder: Path, count: int) -> Counter:
    """The same of a zip: by turns its bytes are damaged, headers and directory included, and its members before they are packed."""
    path, other = (checkpoint.pack(folder / f"{step}.zip", step, *content(step)) for step in (3, 4))
    data, members, foreign = path.read_bytes(), unzipped(path), unzipped(other)
    whole = fingerprint(checkpoint.unpack(path))
    counts: Counter = Counter()
    for (_, damaged), (_, changed) in zip(mutants({"": data}, {"": data}, count // 2), mutants(members, foreign, count // 2)):
        put(path, damaged[""])
        counts[tried(lambda: fingerprint(checkpoint.unpack(path)), whole, path.name)] += 1
        rezip(path, {**members, **changed})
        counts[tried(lambda: fingerprint(checkpoint.unpack(path)), whole, path.name)] += 1
    return counts


def unzipped(path: Path) -> Files:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rezip(path: Path, members: Files) -> None:
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)


def vouched(files: Files) -> Files:
    """The files with a manifest that vouches for them, as one who knows the format makes it; unchanged where it is no manifest."""
    try:
        manifest = json.loads(files["manifest.json"])
        for name, entry in manifest["files"].items():
            entry.update(size=len(files[name]), sha256=checkpoint.hashlib.sha256(files[name]).hexdigest())
        return {**files, "manifest.json": json.dumps({**manifest, "hash": checkpoint._hash(manifest)}).encode()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return files


def forged_zips(folder: Path, count: int) -> Counter:
    """What comes of damage that its manifest vouches for: it may load, as other content, and nothing else may happen."""
    path, other = (checkpoint.pack(folder / f"{step}.zip", step, *content(step)) for step in (3, 4))
    members, foreign, counts = unzipped(path), unzipped(other), Counter()
    for _, changed in mutants(members, foreign, count, seed=1):
        rezip(path, vouched({**members, **changed}))
        counts[tried(lambda: fingerprint(checkpoint.unpack(path)), b"", path.name)] += 1
    return Counter({"loaded": counts.pop("different", 0), **counts})


@pytest.mark.parametrize(("form", "damaged"), [("folder", damaged_folders), ("zip", damaged_zips)])
def test_a_damaged_checkpoint_is_refused_by_name_or_read_bit_for_bit(form, damaged, tmp_path, monkeypatch, figure):
    """Teeth: without the comparison of SHA-256, most damage to numbers is read as it stands."""
    count = times(3_000, 10_000)
    counts = in_child(lambda: damaged(tmp_path / "whole", count))
    figure("F1", f"{count:,} mutations of a checkpoint ({form}): {summary(counts)}")
    whole = checkpoint._check
    monkeypatch.setattr(checkpoint, "_check", lambda path, entry, keep=False: whole(path, None, keep))
    monkeypatch.setattr(checkpoint, "_member", lambda archive, info, entry, path: archive.read(info))
    assert damaged(tmp_path / "teeth", 300)["different"] > 10


def test_damage_that_a_manifest_vouches_for_meets_no_other_error(tmp_path, monkeypatch, figure):
    """Teeth: where safetensors' own errors pass, they are counted."""
    count = times(2_000, 20_000)
    counts = in_child(lambda: forged_zips(tmp_path / "whole", count))
    loaded = counts.pop("loaded")
    assert not counts["identical"] and set(counts) <= {"refused", "identical"}, counts
    figure("F1", f"{count:,} mutations with fresh checksums: 0 other exceptions (refused {counts['refused']:,}, loaded {loaded:,})")
    monkeypatch.setattr(checkpoint.safetensors, "SafetensorError", KeyError)
    assert [kind for kind in forged_zips(tmp_path / "teeth", 200) if kind.startswith("other: SafetensorError")]


# Replays ----------------------------------------------------------------------------------------------------------------


def rows_of(replay: Replay) -> bytes:
    """All rows that a replay holds, bit for bit."""
    parts = [repr((replay.added_by_stream, replay.lengths, replay.ends, replay.capacity)).encode()]
    for stream in range(replay.num_envs):
        rows = vars(replay.stream(stream))
        held = {**rows.pop("obs"), **rows}
        for name, value in sorted((name, value) for name, value in held.items() if value is not None):
            parts += [name.encode(), str(value.dtype).encode(), value.numpy().tobytes()]
    return b"|".join(parts)


def resealed(data: bytes) -> bytes:
    """The segment with a CRC that vouches for its header, wherever that ends now."""
    length = struct.unpack("<I", data[8:12])[0] if len(data) > 16 else 0
    crc = zlib.crc32(data[16 : 16 + length], zlib.crc32(data[8:12]))
    return data[:12] + struct.pack("<I", crc) + data[16:]


def damaged_segments(folder: Path, count: int) -> Counter:
    """What comes of loading a replay of three segments; every third damage has a fresh CRC of the header over it."""
    replay, snapshot, other = store(capacity=40, num_envs=2), None, store(capacity=40, num_envs=2)
    for rows in (9, 7, 5):
        snapshot = fill(replay, rows).save(folder, snapshot)
    elsewhere = fill(other, 30).save(folder / "other")
    for number, _ in elsewhere["segments"] * 3:
        shutil.copy(segments.path_of(folder / "other", number), folder / "other" / "copy")
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("segment-*.bin"))}
    foreign = dict.fromkeys(files, (folder / "other" / "copy").read_bytes())
    whole, counts = rows_of(Replay.load(folder, snapshot)), Counter()
    for at, (_, changed) in enumerate(mutants(files, foreign, count)):
        for name, data in changed.items():
            put(folder / name, resealed(data) if at % 3 == 0 else data)
        counts[tried_with_offset(lambda: rows_of(Replay.load(folder, snapshot)), whole)] += 1
        for name in changed:
            put(folder / name, files[name])
    return counts


def tried_with_offset(read: Callable[[], bytes], whole: bytes) -> str:
    said: list[str] = []

    def telling() -> bytes:
        try:
            return read()
        except StorageError as error:
            said.append(str(error))
            raise

    found = tried(telling, whole, "segment-00000000")
    return found if "at offset" in "".join(said) or not said else f"no offset: {said}"


def test_a_damaged_replay_is_refused_with_file_and_offset_or_read_bit_for_bit(tmp_path, monkeypatch, figure):
    """Teeth: without CRCs, most damage to rows is read as it stands; seals are CRCs of CRCs."""
    count = times(4_000, 20_000)
    counts = in_child(lambda: damaged_segments(tmp_path / "whole", count))
    figure("F3", f"{count:,} mutations of replay segments: {summary(counts)}")
    monkeypatch.setattr(segments.zlib, "crc32", lambda data, start=0: 0)
    assert damaged_segments(tmp_path / "teeth", 300)["different"] > 10


# What is whole goes on --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 50 steps with checkpoints at 40, 50 (the best) and 25 (the best before); the newest names a segment of its own."""
    return Path(small_train(tmp_path_factory.mktemp("trained") / "run", 50).run)


@pytest.fixture
def run(trained, tmp_path) -> Run:
    shutil.copytree(trained, tmp_path / "run")
    return Run.open(tmp_path / "run")


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    put(file, data)


def spoil_checkpoint(run: Run, step: int, name: str = "world.safetensors") -> None:
    spoil(run.path / "checkpoints" / f"step-{step:012d}" / name)


def named(run: Run, step: int) -> set[int]:
    return {number for number, _ in run.read(step)[2]["replay"]["segments"]}


def goes_on(run: Run) -> list[str]:
    """What is said as the run goes on to its end, where all is whole again."""
    said: list[str] = []
    run.write_result(None)
    assert small_train(run.path, 50, resume=True, log=said.append).real_steps == 50
    assert checkpoint.newest(run.path / "checkpoints", pytest.fail)[0] == 50
    assert run.replay().added >= 50 and run.agent(50).num_timesteps == 50
    return said


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "world.safetensors", "agent.safetensors", "optim.safetensors"])
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used_and_the_loss_is_said(name, run, caplog):
    spoil_checkpoint(run, 50, name)
    assert run.agent().num_timesteps == 40 and Dreamer.load(run.path).num_timesteps == 40
    assert "Checkpoint of step 50 is skipped" in caplog.text and name in caplog.text
    assert "Step 40 is the newest that verifies: 10 steps behind it are lost." in caplog.text


def test_a_resume_goes_on_from_the_newest_checkpoint_that_verifies_and_says_what_is_lost(run, figure):
    """Teeth: without the line in Run.resume nothing says how much is lost."""
    spoil_checkpoint(run, 50)
    assert "Back to step 40: the 10 steps saved behind it are lost, and will be made again." in goes_on(run)
    figure("F2", "newest checkpoint damaged: goes on from the one before; 10 of 50 steps lost, as it says")


def test_where_all_checkpoints_are_damaged_an_error_says_so_and_nothing_is_deleted(run, figure):
    for step in run.checkpoints:
        spoil_checkpoint(run, step)
    run.write_result(None)
    before = sorted(str(p) for p in run.path.rglob("*"))
    for act in (run.agent, run.replay, run.manifest, run.world_model, lambda: small_train(run.path, 50, resume=True)):
        with pytest.raises(CorruptError, match=r"No checkpoint of .*run verifies, of steps \[25, 40, 50\]. Restore one"):
            act()
    assert sorted(str(p) for p in run.path.rglob("*") if p.name != ".lock") == [p for p in before if not p.endswith(".lock")]
    figure("F2", "all checkpoints damaged: one error that names the run and its steps; nothing is deleted")


def test_a_damaged_segment_of_the_newest_checkpoint_costs_only_its_steps(run, caplog, figure):
    """Teeth: `Replay.load` of the newest checkpoint alone raises, and the run cannot be resumed."""
    (only,) = named(run, 50) - named(run, 40)
    spoil(segments.path_of(run.path / "replay", only))
    assert run.agent().num_timesteps == 50  # the weights are whole
    assert run.replay().added < Run.open(run.path).manifest()["replay"]["rows"][0]
    assert f"step 50 is skipped, as its replay is damaged: {segments.path_of(run.path / 'replay', only)}" in caplog.text
    said = goes_on(run)
    assert "Back to step 40: the 10 steps saved behind it are lost, and will be made again." in said
    figure("F3", "newest segment damaged: the run goes on from the checkpoint before; 10 of 50 steps lost, as it says")


def test_a_segment_that_every_checkpoint_names_leaves_the_weights(run, figure):
    shared = segments.path_of(run.path / "replay", min(named(run, 50) & named(run, 40)))
    spoil(shared)
    run.write_result(None)
    for act in (run.replay, lambda: small_train(run.path, 50, resume=True)):
        with pytest.raises(
            CorruptError, match=rf"No checkpoint of .* has a whole replay: .*{shared.name} is damaged at offset \d+"
        ):
            act()
    assert run.agent().num_timesteps == 50 and run.checkpoints == [25, 40, 50]
    figure("F3", "oldest segment damaged: an error that names file and offset; all checkpoints' weights stay and load")
