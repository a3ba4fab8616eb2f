"""The record: what it holds comes back, and what cannot be is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CheckpointError, RecordError, ResourceLimitError, UnsafeCheckpointError
from asyncckpt.format import record as records
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.record import FileRef, Record, check_config

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
    raw_bytes=10**12,
    stored_bytes=8 * 10**11,
    index=FileRef(FOLDER + "index.json.zst", 500, hexdigest(b"index")),
    states=(FileRef(FOLDER + "state.pt", 700, hexdigest(b"state")),),
    folders=(FOLDER, "step-0000000900/0a1b2c3d-3/"),
)
GOOD = json.loads(RECORD.to_json())


def parse(data, key=KEY) -> Record:
    return Record.parse(data if isinstance(data, bytes) else json.dumps(data).encode(), key)


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


def test_an_unknown_version_is_refused_and_says_to_upgrade():
    with pytest.raises(RecordError, match="upgrade") as caught:
        parse(GOOD | {"format": 2})
    assert caught.value.key == KEY


@pytest.mark.parametrize("field", [name for name in GOOD if name not in ("config", "epoch")])
def test_a_missing_field_is_refused_and_named(field):
    with pytest.raises(RecordError, match=field):
        parse({name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize("value", [-1, 2**53 + 1, 2**63, 10**30, 1.0, True, "1", [], {}])
@pytest.mark.parametrize("field", ["step", "epoch", "world_size", "raw_bytes", "stored_bytes", "format"])
def test_a_number_that_cannot_be_is_refused(field, value):
    with pytest.raises(RecordError):
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
        {"states": [GOOD["index"] | {"bytes": 2**63}]},
        {"folders": []},
        {"folders": ["step-0000000900/0a1b2c3d-3/"]},
        {"config": {"seed": 2**70}},
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
        b"",
        b"null",
        b"[1]",
        b"\xff\xfe",
        b"{",
        b'{"step": 1, "step": 1}',
        RECORD.to_json().replace(b"2.5", b"NaN"),
        RECORD.to_json().replace(b"2.5", b"-Infinity"),
        RECORD.to_json().replace(b"2.5", b"1e999"),
        RECORD.to_json().replace(b"2.5", b"9" * 5000),
        RECORD.to_json() + b"{}",
    ],
)
def test_what_is_no_strict_json_is_refused(text):
    with pytest.raises(RecordError):
        parse(text)


def test_deep_nesting_is_refused():
    deep: object = 1
    for _ in range(40):
        deep = [deep]
    for text in (json.dumps(GOOD | {"config": deep}).encode(), b"[" * 200_000, b'{"a":' * 200_000):
        with pytest.raises(ResourceLimitError, match="deep"):
            parse(text)


def test_size_and_number_of_values_are_limited(monkeypatch):
    with pytest.raises(ResourceLimitError, match="values"):
        parse(b"[" + b"[]," * 3_000_000 + b"[]]")
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1000)
    with pytest.raises(ResourceLimitError, match="above 1000"):
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
