"""A checkpoint as one zip of stored members: the same content, and nothing else gets in."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from test_checkpoint import assert_equal, content, names, put

from worldmodel.errors import CorruptError, StorageError
from worldmodel.storage import checkpoint


def test_a_zip_holds_the_same_and_is_the_same_each_time(tmp_path):
    a, b = (checkpoint.pack(tmp_path / "new" / name, 9, *content()) for name in ("a.zip", "b.zip"))
    assert_equal(checkpoint.unpack(a), content(), 9)
    assert a.read_bytes() == b.read_bytes()
    checkpoint.pack(a, 10, *content(1))
    assert_equal(checkpoint.unpack(a), content(1), 10)
    assert names(a.parent) == ["a.zip", "b.zip"]
    with zipfile.ZipFile(a) as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}


def test_every_flipped_byte_of_a_zip_is_noticed_or_changes_nothing(tmp_path):
    path = checkpoint.pack(tmp_path / "a.zip", 3, *content())
    whole = path.read_bytes()
    noticed = 0
    for at in range(len(whole)):
        put(path, whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            assert_equal(checkpoint.unpack(path), content(), 3)
        except CorruptError as error:
            noticed += 1
            assert "a.zip" in str(error)
    for cut in range(0, len(whole), 11):
        put(path, whole[:cut])
        with pytest.raises(CorruptError):
            checkpoint.unpack(path)
    assert noticed > 0.8 * len(whole)  # dates and versions are harmless


def rezip(path: Path, change) -> None:
    """Writes the members again after `change(list of (ZipInfo, data))`."""
    with zipfile.ZipFile(path) as archive:
        members = [(zipfile.ZipInfo(i.filename), archive.read(i)) for i in archive.infolist()]
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members:
            archive.writestr(info, data)


def compress(members: list, which: int = 0) -> None:
    members[which][0].compress_type = zipfile.ZIP_DEFLATED


def add(name: str, data: bytes = b"x"):
    return lambda members: members.append((zipfile.ZipInfo(name), data))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compress, "is compressed"),
        (lambda m: (m.clear(), add("state.json", bytes(10_000_000))(m), compress(m)), "is compressed"),
        (add("extra.safetensors"), r"differ on the members \['extra\.safetensors'\]"),
        (lambda m: m.pop(0), r"differ on the members \['world\.safetensors'\]"),
        (lambda m: m.pop(), "has no manifest"),
        (add("../evil.safetensors"), r"a member '\.\./evil"),
        (add("/etc/evil.safetensors"), "a member '/etc/evil"),
        (add("a/b.safetensors"), "a member 'a/b"),
        (add("folder/"), "a member 'folder/'"),
        (add("World.safetensors"), "a member 'World"),
        (add("policy.pth", b"\x80\x04."), "a member 'policy.pth', which no archive of this library has.*another library"),
        (add("data", b"{}"), r"differ on the members \['data'\]"),
        (add("world.safetensors"), "two members of one name"),
        (add("manifest.json"), "two members of one name"),
        (lambda m: m.extend((zipfile.ZipInfo(f"a{i}.safetensors"), b"") for i in range(99)), "more members or bytes"),
        (lambda m: m.__setitem__(0, (m[0][0], m[0][1][:-1] + b"\x7f")), "size or SHA-256"),
    ],
)
def test_a_zip_that_pack_would_not_write_is_refused(tmp_path, change, message):
    path = checkpoint.pack(tmp_path / "a.zip", 3, *content())
    rezip(path, lambda members: None)
    assert_equal(checkpoint.unpack(path), content(), 3)
    rezip(path, change)
    with pytest.raises(CorruptError, match=message):
        checkpoint.unpack(path)
    assert names(tmp_path) == ["a.zip"]


def test_the_member_data_is_json_that_the_manifest_vouches_for(tmp_path):
    path = checkpoint.pack(tmp_path / "a.zip", 3, *content(), {"what": "a model"})
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("data")) == {"what": "a model"}
    assert checkpoint.unpack(path)[1] == content()[1]

    def other(members):
        at = next(i for i, (info, _) in enumerate(members) if info.filename == "data")
        members[at] = members[at][0], members[at][1].replace(b"model", b"virus")

    rezip(path, other)
    with pytest.raises(CorruptError, match="'data' is damaged: size or SHA-256"):
        checkpoint.unpack(path)


def test_a_zip_with_something_before_or_behind_it_is_refused(tmp_path):
    path = checkpoint.pack(tmp_path / "a.zip", 3, *content())
    whole = path.read_bytes()
    put(path, b"#!/bin/sh\n" + whole)
    with pytest.raises(CorruptError):
        checkpoint.unpack(path)
    with zipfile.ZipFile(path := tmp_path / "b.zip", "w") as archive:
        archive.comment = b"hidden"
        archive.writestr("manifest.json", "{}")
    with pytest.raises(CorruptError, match="more than its members"):
        checkpoint.unpack(path)


def test_overlapping_members_cannot_claim_more_than_the_file_holds(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("manifest.json", "state.json"):
            archive.writestr(name, bytes(1000))
    whole = bytearray(path.read_bytes())
    at = whole.index(b"PK\x01\x02")  # the first entry of the directory: sizes at +20 and +24
    whole[at + 20 : at + 28] = (10**9).to_bytes(4, "little") * 2
    put(path, whole)
    with pytest.raises(CorruptError, match="more members or bytes"):
        checkpoint.unpack(path)


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), b"no zip at all", b"\x80\x04K\x01."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, data):
    path = tmp_path / "a.zip"
    put(path, data)
    with pytest.raises(CorruptError, match=r"a\.zip"):
        checkpoint.unpack(path)
    with pytest.raises(StorageError, match=r"b\.zip"):
        checkpoint.unpack(tmp_path / "b.zip")
