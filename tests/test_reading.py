"""Readers bound what they allocate, run nothing, and name the file."""

import json
import os
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import mutated_tensors
from granq_plugin.reading import existing_file, load_torch, parse_toml, read_json, read_text


def test_what_is_no_regular_file(tmp_path):
    """A pipe would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "absent", "does not exist"), (tmp_path, "is a folder"),
                        (tmp_path / "pipe", "is no regular file"), ("/dev/zero", "is no regular file")):
        with pytest.raises(FileNotFoundError, match=f"weights file .*{words}"):
            existing_file(path, "weights file")
        with pytest.raises(FileNotFoundError, match=words):
            read_text(path)


def test_text_is_bounded_and_utf_8(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 2**20)
    assert read_text(file) == "x" * 2**20
    file.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ValueError, match=r"a' has more than 1048576 bytes"):
        read_text(file)
    file.write_bytes(b"x\xff")
    with pytest.raises(ValueError, match=r"a' is not text in UTF-8: .* at byte 1"):
        read_text(file)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda v: st.lists(v) | st.dictionaries(
        st.text(), v), max_leaves=30))
def test_json_is_read_or_refused(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "value.json"
    file.write_text(json.dumps(value))
    if isinstance(value, dict) and depth(value) <= 16:
        assert read_json(file) == value
    else:
        with pytest.raises(ValueError, match=r"value.json' (must hold a JSON object|is not a readable JSON file: nested deeper)"):
            read_json(file)


def depth(value) -> int:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if values is None else 1 + max(map(depth, values), default=0)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a":' + "[" * 500 + "]" * 500 + "}", "{", "1" * 5000, "null"])
def test_hostile_json(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run.json' (is not a readable JSON file|must hold a JSON object)"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize("text", [
    "a = " + "[" * 4000, "a" + ".a" * 2000 + " = 1", "a = " + "[" * 300 + "]" * 300, "a" + ".a" * 40_000 + " = 1",
    "a = 1\n" * 20_000, "a = " + "9" * 4096, "a = \x00"])
def test_hostile_toml(text):
    with pytest.raises(ValueError, match=r"not a TOML file|a TOML text has at most"):
        parse_toml(text)


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def test_torch_files_are_read_as_they_were_written(tmp_path):
    value = dict(a=torch.arange(6.).view(2, 3).t(), b=[1, dict(c=None)], d=torch.zeros(0), e=torch.tensor(3))
    for options in ({}, dict(_use_new_zipfile_serialization=False)):
        found = load_torch(saved(tmp_path / "a.pt", value, **options))
        assert torch.equal(found["a"], value["a"]) and found["b"] == value["b"] and found["e"] == 3 and found["d"].shape == (0, )


def test_a_single_wrong_bit_is_noticed(tmp_path):
    """torch.load does not look at the sums that torch.save writes."""
    data = bytearray(saved(tmp_path / "a.pt", torch.arange(1000.)).read_bytes())
    data[data.index(torch.arange(500., 502.).numpy().tobytes())] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert not torch.equal(torch.load(tmp_path / "a.pt", weights_only=True), torch.arange(1000.))
    with pytest.raises(ValueError, match=r"a.pt' is damaged: the checksum of .*data/0 is wrong"):
        load_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("value, words", [
    (torch.zeros(1).expand(10**12), "without memory of its own"), (torch.eye(2).to_sparse(), "not a plain one"),
    (torch.empty(3, device="meta"), "not a plain one")])
def test_tensors_that_are_larger_than_the_file(tmp_path, value, words):
    with pytest.raises(ValueError, match=words):
        load_torch(saved(tmp_path / "a.pt", dict(deep=[dict(x=value)])))


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path):
    stored = saved(tmp_path / "a.pt", torch.zeros(2**20))
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 2**14
    with pytest.raises(ValueError, match=r"b.pt' is damaged: its archive is compressed"):
        load_torch(tmp_path / "b.pt")


@pytest.mark.parametrize("archive", [True, False])
def test_payloads_do_not_run(tmp_path, monkeypatch, archive):
    monkeypatch.setenv(mutated_tensors.CANARY, str(tmp_path / "canary"))
    saved(tmp_path / "a.pt", mutated_tensors.Exploit(), _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        load_torch(tmp_path / "a.pt")
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "canary").exists()  # so it is a payload
