"""The record: what it holds comes back, and what cannot be is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import (
    CheckpointError,
    DigestMismatchError,
    FormatVersionError,
    RecordError,
    UnsafeCheckpointError,
)
from asyncckpt.format import limits
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.record import ENDING_BYTES, FileRef, Outline, Record, check_config, sealed

KEY = "step-0000001000.json"
FOLDER = "step-0000001000/0a1b2c3d-4/"
RECORD = Record(
    step=1000,
    epoch=3,
    attempt="0a1b2c3d-4",
    time=1.5e9,
    metrics={"val_loss": 2.5, "lr": 1e-5},
    config={"seed": 2**63, "betas": [0.9, 0.999], "name": "é", "none": None},
    tags=("a", "b"),
    pinned=True,
    versions={"torch": "2.13"},
    world_size=8,
    lineage="00c0ffee",
    raw_bytes=10**12,
    stored_bytes=8 * 10**11,
    index=FileRef(FOLDER + "index.json.zst", 500, hexdigest(b"index")),
    states=(FileRef(FOLDER + "state.pt", 700, hexdigest(b"state")),),
    folders=(FOLDER, "step-0000000900/0a1b2c3d-3/"),
)
GOOD = {name: value for name, value in json.loads(RECORD.to_json()).items() if name != "digest"}


def seal(data) -> bytes:
    """A record that says what `data` says, with the right digest."""
    return sealed(
        (data if isinstance(data, bytes) else json.dumps(data, indent=1).encode()).removesuffix(b"\n}") + b"\n}"
    )


def parse(data, key=KEY) -> Record:
    return Record.parse(seal(data), key)


def test_every_flipped_bit_is_damage_and_never_a_newer_format():
    data = RECORD.to_json()
    for at in range(len(data)):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises((DigestMismatchError, RecordError)):
                Record.parse(flipped, KEY)


def test_every_truncation_and_every_appended_byte_is_damage():
    data = RECORD.to_json()
    for end in range(len(data)):
        with pytest.raises((DigestMismatchError, RecordError)):
            Record.parse(data[:end], KEY)
    with pytest.raises(RecordError):
        Record.parse(data + b" ", KEY)


def test_the_digest_can_be_checked_by_hand():
    data = RECORD.to_json()
    assert data[-82:] == b',\n "digest": "%s"\n}\n' % hexdigest(data[:-82]).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2"),
        ({"format": 2, "index": 5, "states": None, "metrics": "other"}, "format 2"),
        ({"requires": ["delta"]}, "'delta'"),
        ({"config": {"seed": 2**70}}, "integer"),
        ({"states": [GOOD["index"] | {"bytes": 2**53 + 1}]}, r"above 2\^53"),
        ({"epoch": 2**53 + 1}, r"above 2\^53"),
        ({"tags": ["x"] * 2_000_001}, "values"),
    ],
)
def test_what_is_unknown_or_beyond_a_limit_is_newer_and_says_to_upgrade(change, reason):
    with pytest.raises(FormatVersionError, match=reason) as caught:
        parse(GOOD | change)
    assert "Upgrade" in str(caught.value)
    assert caught.value.key == KEY


def test_a_newer_record_still_tells_what_retention_must_leave_alone():
    newer = seal(GOOD | {"format": 7, "requires": ["delta"], "index": "elsewhere", "states": 5})
    outline = Outline.parse(newer, KEY)
    assert (outline.step, outline.attempt, outline.folders) == (1000, RECORD.attempt, RECORD.folders)
    assert (outline.pinned, outline.newer != "") == (True, True)
    assert Outline.parse(RECORD.to_json(), KEY).newer == ""


def test_an_integer_of_more_digits_than_python_reads_is_newer():
    text = seal(GOOD).replace(b"2.5", b"9" * 5000)
    with pytest.raises(FormatVersionError, match="number too long"):
        Record.parse(sealed(text[:-ENDING_BYTES] + b"\n}\n"), KEY)


def test_a_record_comes_back():
    assert Record.parse(RECORD.to_json(), KEY) == RECORD
    bare = dataclasses.replace(RECORD, epoch=None, metrics={}, config=None, tags=(), versions={}, pinned=False)
    assert Record.parse(bare.to_json(), KEY) == bare


def test_metrics_that_are_not_finite_come_back_and_the_json_stays_strict():
    metrics = {"loss": math.nan, "max": math.inf, "min": -math.inf, "count": 3}
    data = dataclasses.replace(RECORD, metrics=metrics).to_json()
    json.loads(data, parse_constant=pytest.fail)
    back = Record.parse(data, KEY).metrics
    assert math.isnan(back["loss"])
    assert (back["max"], back["min"], back["count"]) == (math.inf, -math.inf, 3.0)


def test_unknown_fields_are_ignored():
    assert parse(GOOD | {"later": {"a": 1}}) == RECORD


@pytest.mark.parametrize("field", [name for name in GOOD if name not in ("config", "epoch")])
def test_a_missing_field_is_refused_and_named(field):
    with pytest.raises(RecordError, match=field):
        parse({name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize("value", [-1, 2**53 + 1, 2**63, 10**30, 1.0, True, "1", [], {}])
@pytest.mark.parametrize("field", ["step", "epoch", "world_size", "raw_bytes", "stored_bytes", "format"])
def test_a_number_that_cannot_be_is_refused(field, value):
    with pytest.raises((RecordError, FormatVersionError)):
        parse(GOOD | {field: value})


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1001},
        {"attempt": 5},
        {"time": "now"},
        {"time": True},
        {"metrics": []},
        {"metrics": {"a": "1"}},
        {"metrics": {"a": None}},
        {"metrics": {"a": True}},
        {"tags": "ab"},
        {"tags": [1]},
        {"pinned": 1},
        {"versions": {"torch": 2}},
        {"index": None},
        {"index": {}},
        {"index": GOOD["index"] | {"bytes": -1}},
        {"index": GOOD["index"] | {"digest": "00"}},
        {"index": GOOD["index"] | {"digest": "é" * 64}},
        {"states": {}},
        {"states": [None]},
        {"folders": []},
        {"folders": ["step-0000000900/0a1b2c3d-3/"]},
        {"lineage": ""},
        {"lineage": "0A1B2C3D"},
        {"requires": "delta"},
        {"requires": [1]},
        {"states": [GOOD["states"][0] | {"rank": -1}]},
    ],
)
def test_a_contradiction_is_refused(change):
    with pytest.raises(RecordError):
        parse(GOOD | change)


UNSAFE = ["/etc/passwd", "../x", "step-0000001000/../x/", "s3://b/x", "step-0000001000.json", "a\\b", "", "x" * 10_000]


@pytest.mark.parametrize("key", UNSAFE)
def test_a_key_outside_of_the_checkpoints_is_refused(key):
    for change in (
        {"index": GOOD["index"] | {"key": key}},
        {"states": [GOOD["states"][0] | {"key": key}]},
        {"folders": [*GOOD["folders"], key]},
    ):
        with pytest.raises(UnsafeCheckpointError) as caught:
            parse(GOOD | change)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"{",
        b'{"step": 1, "step": 1',
        RECORD.to_json().replace(b"2.5", b"NaN"),
        RECORD.to_json().replace(b"2.5", b"-Infinity"),
        RECORD.to_json().replace(b"2.5", b"1e999"),
    ],
)
def test_what_is_no_strict_json_is_refused(text):
    with pytest.raises(RecordError):
        parse(text.removesuffix(text[-ENDING_BYTES:]) if text.endswith(b'"\n}\n') else text)
    with pytest.raises((RecordError, DigestMismatchError)):
        Record.parse(text, KEY)


def test_what_is_nested_deeper_than_the_limit_is_newer():
    deep: object = 1
    for _ in range(40):
        deep = [deep]
    for text in (GOOD | {"config": deep}, b"[" * 200_000, b'{"a":' * 200_000):
        with pytest.raises(FormatVersionError, match="deep"):
            parse(text)


def test_what_is_larger_than_the_limit_is_newer(monkeypatch):
    with pytest.raises(FormatVersionError, match="values"):
        parse(b"[" + b"[]," * 3_000_000 + b"[]]")
    monkeypatch.setattr(limits, "RECORD_BYTES", 1000)
    with pytest.raises(FormatVersionError, match="above 1000"):
        parse(GOOD | {"tags": ["x" * 1000]})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_config_that_passes_the_check_comes_back(config):
    check_config(config)
    assert Record.parse(dataclasses.replace(RECORD, config=config).to_json(), KEY).config == config


@pytest.mark.parametrize("config", [math.nan, {1: 2}, (1, 2), {"a": {1}}, object(), 2**65, b"x", {"p": [math.inf]}])
def test_a_config_that_would_not_come_back_is_refused_early(config):
    with pytest.raises(ValueError, match="config"):
        check_config(config)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOOD)), JSON)
def test_junk_in_any_field_never_escapes_the_error_family(field, junk):
    try:
        parse(GOOD | {field: junk})
    except CheckpointError:
        return
