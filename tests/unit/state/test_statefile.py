import contextlib
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import deque

import pytest
import torch

from asyncckpt.errors import CorruptCheckpointError, FormatVersionError, ResourceLimitError, UnsafeCheckpointError
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


def pushed(text):
    return b"X" + struct.pack("<I", len(text)) + text


def nested_hex(levels):
    """A text of some bytes that doubles at each level."""
    inner = b"c_codecs\nencode\n" * levels + pushed(b"A" * 1024) + pushed(b"latin1") + b"\x86R"
    return b"\x80\x02}" + pushed(b"n") + inner + (pushed(b"hex") + b"\x86R") * (levels - 1) + b"s."


def repeated(before, unit, count=50_000):
    """A dict whose one value is a list of what `unit` makes; `before` is remembered."""
    return b"\x80\x02" + before + b"}" + pushed(b"n") + b"](" + unit * count + b"es."


LONG = pushed(b"x" * 100_000) + b"q\x00"
ENCODE = b"c_codecs\nencode\nq\x01" + pushed(b"latin1") + b"q\x02"
NUMBERS = b"](" + b"".join(b"M" + struct.pack("<H", number) for number in range(20_000)) + b"eq\x00"
SET = b"c__builtin__\nset\nq\x01"
BOMBS = {
    "hex of hex": nested_hex(22),
    "more hex of hex": nested_hex(40),
    "punycode": b"\x80\x02}" + pushed(b"n") + b"c_codecs\nencode\n" + pushed("é".encode() * 500_000) + pushed(b"punycode") + b"\x86Rs.",
    "one text encoded often": repeated(LONG + ENCODE, b"h\x01h\x00h\x02\x86R"),
    "one list made a set often": repeated(NUMBERS + SET, b"h\x01h\x00\x85R"),
    "empty sets": repeated(b"]q\x00" + SET, b"h\x01h\x00\x85R"),
    "lists": repeated(b"", b"]", 400_000),
    "dicts": repeated(b"", b"}", 400_000),
    "tuples": repeated(b"", b"N\x85", 200_000),
    "marks": b"\x80\x02}" + b"(" * 400_000 + b".",
    "nothing": repeated(b"", b"N", 400_000),
    "numbers": repeated(b"", b"M\xff\xff", 200_000),
    "one list within another": b"\x80\x02" + b"](" * 300_000 + b"e" * 300_000 + b".",
    "a key of tuples within tuples": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "a set of tuples within tuples": b"\x80\x02" + SET + b"](" + b")" + b"\x85" * 300_000 + b"e\x85R.",
    "a call of tuples within tuples": b"\x80\x02)" + b"\x85" * 300_000 + b")R.",
    "a set of one hash": b"\x80\x02}" + pushed(b"n") + SET + b"](" + b"".join(b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") for number in range(1, 30_000)) + b"e\x85Rs.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_no_pickle_takes_memory_or_time_out_of_proportion(name):
    data = archive(BOMBS[name])
    tracemalloc.start()
    started = time.process_time()
    try:
        with contextlib.suppress(CorruptCheckpointError, UnsafeCheckpointError):
            read_state(data)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20 + 32 * len(data)
        assert time.process_time() - started < 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [b"hex", b"punycode", b"zip", b"rot13", b"utf-7", b"latin-1", b"idna"])
def test_text_is_encoded_by_latin1_alone(codec):
    text = b"c_codecs\nencode\n" + pushed(b"AAAA")
    with pytest.raises(UnsafeCheckpointError, match="latin1"):
        read_state(archive(b"\x80\x02}" + pushed(b"n") + text + pushed(codec) + b"\x86Rs."))
    assert read_state(archive(b"\x80\x02}" + pushed(b"n") + text + pushed(b"latin1") + b"\x86Rs.")) == {"n": b"AAAA"}


def test_a_long_list_of_entries_is_refused_before_it_is_made():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("archive/data.pkl", b"")
        for number in range(3000):
            made.writestr(f"archive/{number}", b"")
    with pytest.raises(UnsafeCheckpointError, match="lists its entries"):
        read_state(buffer.getvalue())


def test_an_element_type_of_a_later_torch_is_newer_and_no_damage():
    for name in (b"float6_e3m2fn", b"int128", b"bfloat32", b"uint9"):
        with pytest.raises(FormatVersionError, match=f"torch.{name.decode()}"):
            read_state(archive(b"\x80\x02}" + pushed(b"n") + b"ctorch\n" + name + b"\ns."))
    with pytest.raises(UnsafeCheckpointError):
        read_state(archive(b"\x80\x02}" + pushed(b"n") + b"ctorch\nload\ns."))


SHARED = (1, "x")
HONEST = {
    "numbers": {
        "a": list(range(-300, 70_000, 7)),
        "b": [2**2039 - 1, -(2**2038), 2**31, -(2**31), -1, 0.5, float("inf")],
    },
    "sets": {f"k{number}": set(range(number % 300)) for number in range(3000)},
    "empty": {f"k{number}": kind() for number, kind in enumerate([set, list, tuple, torch.Size] * 5_000)},
    "bytes": {f"k{number}": bytes([number % 256]) for number in range(50_000)}
    | {"all": [bytes([one]) for one in range(256)]},
    "texts": {"a": ["é", "\ud800", "😀" * 1000, ""], "b": {"x", "y", ""}, "c": ("latin1", b"latin1")},
    "shared": {"a": SHARED, "b": SHARED, "c": [b"x" * 100] * 1000, "d": [torch.Size([1])] * 0},
    "torch": {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
    | {"d": torch.device("cuda:1")},
    "same hash": {"a": {-1, -2, 2**61 - 1, 0, 2**61 - 2}, "b": {2.0**one for one in range(-1000, 1000)}},
}


@pytest.mark.parametrize("name", HONEST)
def test_what_torch_writes_is_read_as_torch_reads_it(name):
    data = write_state(HONEST[name])
    found = read_state(data)
    assert found == torch.load(io.BytesIO(data), weights_only=True) == HONEST[name]
    assert list(map(type, found.values())) == list(map(type, HONEST[name].values()))
