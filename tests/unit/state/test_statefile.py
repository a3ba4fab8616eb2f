import io
import os
import pickle
import sys
import zipfile
from collections import deque

import pytest
import torch

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError, UnsafeCheckpointError
from asyncckpt.state import statefile
from asyncckpt.state.statefile import read_state, write_state

VALUES = {
    "a/b": 1,
    "c": [1, None, "x"],
    "d": (1.5, True),
    "e": {1, 2},
    "f": torch.Size([2]),
    "g": torch.bfloat16,
    "": b"\xff",
    "h": 1j,
}


def archive(pickled, *, compression=zipfile.ZIP_STORED, **entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/version", "3\n")
        for name, data in entries.items():
            made.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def test_values_come_back():
    assert read_state(write_state(VALUES)) == VALUES
    assert read_state(write_state({})) == {}


def test_torch_load_opens_it_without_us():
    assert torch.load(io.BytesIO(write_state(VALUES)), weights_only=True) == VALUES


class Canary:
    def __reduce__(self):
        return (os.mkdir, ("/nonexistent/canary",))


class Chained:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


MALICIOUS = {
    "system call": {"x": Canary()},
    "eval": {"x": Chained(eval, ("1",))},
    "import": {"x": Chained(__import__, ("os",))},
    "getattr": {"x": Chained(getattr, (dict, "update"))},
    "bytearray bomb": {"x": Chained(bytearray, (2**40,))},
    "counter": {"x": Chained(type, ("x", (), {}))},
    "deque": {"x": deque()},
    "tensor": {"x": torch.zeros(1)},
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_pickle_that_names_anything_but_values_is_refused_and_never_runs(name):
    seen = []
    watching = [True]

    def audit(event, arguments):
        if watching[0] and event in ("os.mkdir", "os.system", "exec", "pickle.find_class"):
            seen.append(event)

    buffer = io.BytesIO()
    torch.save(MALICIOUS[name], buffer)
    sys.addaudithook(audit)
    try:
        with pytest.raises(UnsafeCheckpointError):
            read_state(buffer.getvalue())
    finally:
        watching[0] = False
    assert seen == []


def test_a_pickle_of_a_later_protocol_is_refused():
    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError)):
        read_state(archive(pickle.dumps({"x": Canary()}, protocol=4)))


def test_a_compressed_bomb_is_refused_before_it_is_opened():
    bomb = archive(pickle.dumps({"x": "0" * 2**24}, protocol=2), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**18
    with pytest.raises(UnsafeCheckpointError, match="compressed"):
        read_state(bomb)


def test_a_file_above_the_limit_is_refused():
    with pytest.raises(ResourceLimitError):
        read_state(write_state({"x": "0" * 1000}), max_bytes=500)


def test_many_entries_are_refused():
    with pytest.raises(UnsafeCheckpointError, match="entries"):
        read_state(archive(b"", **{f"x{at}": b"" for at in range(100)}))


def test_two_pickles_or_none_are_corrupt():
    with pytest.raises(CorruptCheckpointError):
        read_state(archive(b"", **{"inner/data.pkl": b""}))
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    with pytest.raises(CorruptCheckpointError):
        read_state(buffer.getvalue())


@pytest.mark.parametrize("values", [[], {1: 2}, {"x": [[1]]}, {"x": {}}, {"x": ((1,),)}, None, "x"], ids=repr)
def test_anything_but_a_flat_dict_of_values_is_corrupt(values):
    with pytest.raises(CorruptCheckpointError):
        read_state(archive(pickle.dumps(values, protocol=2)))


def test_every_cut_and_flip_of_a_state_file_reads_the_same_or_raises_ours():
    data = write_state({"a": 1, "b": [1, 2, "x"]})
    for at in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[at] ^= 0x41
        for broken in (data[:at], bytes(flipped)):
            try:
                read_state(broken)
            except (CorruptCheckpointError, UnsafeCheckpointError):
                continue


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UnsafeCheckpointError, match="or later"):
        read_state(write_state({}))
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0+git"):
        monkeypatch.setattr(torch, "__version__", version)
        statefile._require_safe_torch()
