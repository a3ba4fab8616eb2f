"""What `save()` takes is read back, at every limit; what is beyond one is refused with its name before anything starts.

Limits too large for a test are made small, for writer and reader at once: both ask `format.limits`.
"""

import io
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch

import asyncckpt
from asyncckpt.errors import UnsupportedObjectError, UnsupportedTensorError
from asyncckpt.format import limits
from asyncckpt.request import _FIXED_BYTES, Config
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flattener
from tests.unit.state.pocket import Pocket

STATE = {"w": torch.arange(3)}
MIB = 2**20


def saved(tmp_path, state, *, config=None, codec="auto", **said):
    with asyncckpt.Saver(tmp_path, engine="inline", config=config, codec=codec) as saver:
        saver.save(said.pop("step", 1), state, **said).result()
    return asyncckpt.Run(tmp_path).latest()


def refused(tmp_path, state, match, *, error=ValueError, config=None, codec="auto", **said):
    with asyncckpt.Saver(tmp_path, engine="inline", config=config, codec=codec) as saver:
        saver.save(0, STATE).result()
        with pytest.raises(error, match=match) as raised:
            saver.save(said.pop("step", 1), state, **said)
        saver.save(2, STATE).result()
    assert [one.step for one in asyncckpt.Run(tmp_path).checkpoints()] == [0, 2]
    return raised.value


@pytest.mark.parametrize("step", [10**10 - 1, 10**10, 2**53 - 1, 2**53])
def test_steps_up_to_the_limit_are_read_back(tmp_path, step):
    found = saved(tmp_path, STATE, step=step)
    assert found.step == step
    assert torch.equal(asyncckpt.load(tmp_path, step=step)["w"], STATE["w"])
    assert asyncckpt.restore(tmp_path, {"w": torch.zeros(3, dtype=torch.int64)}).step == step


RECORD_BYTES = 2 * MIB


@pytest.fixture
def small_record(monkeypatch):
    monkeypatch.setattr(limits, "RECORD_BYTES", RECORD_BYTES)
    monkeypatch.setattr(limits, "RECORD_VALUES", 20_000)


ROOM = RECORD_BYTES - 3 * _FIXED_BYTES


@pytest.mark.usefixtures("small_record")
@pytest.mark.parametrize(
    ("said", "config"),
    [
        ({"tags": ["x" * ROOM]}, None),
        ({"tags": ["x" * (ROOM // 2)]}, "y" * (ROOM // 2)),
        ({"tags": ["\U0001f600" * (ROOM // 12)]}, None),
        ({"tags": ["a"] * 18_000}, None),
        ({"tags": ["," * 18_000]}, None),
        ({"metrics": {str(number): 0.5 for number in range(18_000)}}, None),
        ({"tags": ["a"] * 4_000}, [0] * 14_000),
    ],
    ids=range(7),
)
def test_a_record_near_its_limit_is_read_back(tmp_path, said, config):
    found = saved(tmp_path, STATE, config=config, **said)
    assert list(found.tags) == said.get("tags", [])
    assert found.metrics == said.get("metrics", {})
    assert found.config == config
    assert "w" in asyncckpt.load(tmp_path)


@pytest.mark.usefixtures("small_record")
@pytest.mark.parametrize(
    ("said", "config"),
    [
        ({"tags": ["x" * RECORD_BYTES]}, None),
        ({"tags": ["x" * (RECORD_BYTES // 2)]}, "y" * (RECORD_BYTES // 2 - 1000)),
        ({"tags": ["a"] * 20_000}, None),
        ({"tags": ["," * 20_000]}, None),
        ({"metrics": {str(number): 0.5 for number in range(20_000)}}, None),
        ({"tags": ["a"] * 6_000}, [0] * 14_000),
    ],
    ids=range(6),
)
def test_a_record_beyond_its_limit_is_refused(tmp_path, said, config):
    refused(tmp_path, STATE, "could not be read back", config=config, **said)


@pytest.mark.usefixtures("small_record")
def test_a_config_is_measured_as_a_record_writes_it(tmp_path):
    deep = [0] * 15_000  # two bytes each on one line, but the record gives each a line of its own, with its indent
    for _ in range(28):
        deep = [deep]
    assert len(json.dumps(deep)) < limits.RECORD_BYTES // 20
    assert Config.of(deep).text_bytes > 15_000 * 28
    assert saved(tmp_path, STATE, config=deep).config == deep
    with pytest.raises(ValueError, match="config"):
        asyncckpt.Saver(tmp_path, config=[0] * 20_000)


@pytest.mark.parametrize(
    "said", [{"tags": ["a\ud800"]}, {"metrics": {"\ud800": 1.0}}, {"metrics": {"m": 10**400}}], ids=repr
)
def test_text_that_is_none_and_numbers_that_are_no_float_are_refused(tmp_path, said):
    refused(tmp_path, STATE, "lone surrogate|too large", **said)


@pytest.mark.parametrize("key", [2**63 - 1, -(2**63), 0, -1])
def test_integer_keys_within_64_bits_are_read_back(tmp_path, key):
    saved(tmp_path, {key: {key: torch.ones(1), "v": 1}, "m": {key: 5}})
    loaded = asyncckpt.load(tmp_path)
    assert list(loaded) == [key, "m"]
    assert list(loaded[key]) == [key, "v"]
    assert loaded["m"] == {key: 5}


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1, 10**4000])
def test_integer_keys_beyond_64_bits_are_refused(tmp_path, key):
    for number, state in enumerate(({key: torch.ones(1)}, {"m": {key: 5}}, {"m": [{key: torch.ones(1)}]})):
        refused(tmp_path / str(number), state, "2\\^63", error=UnsupportedObjectError)


def test_as_many_tensors_as_the_limit_are_read_back_and_one_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TENSORS", 50)
    tensors = list(torch.arange(51).unbind())
    saved(tmp_path / "at", {"m": tensors[:50]})
    assert len(asyncckpt.load(tmp_path / "at")["m"]) == 50
    assert refused(tmp_path / "beyond", {"m": tensors}, "51 tensors", error=UnsupportedObjectError).key == "m/#50"


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_names_that_fill_a_header_are_read_back_and_longer_ones_are_refused(tmp_path, monkeypatch, codec):
    tensors = {f"{number:04}" + "n" * 996: torch.ones(1) for number in range(100)}
    monkeypatch.setattr(limits, "HEADER_BYTES", 120_000)
    saved(tmp_path / "at", {"m": tensors}, codec=codec)
    assert set(asyncckpt.load(tmp_path / "at")["m"]) == set(tensors)
    monkeypatch.setattr(limits, "HEADER_BYTES", 100_000)
    error = refused(tmp_path / "beyond", {"m": tensors}, "Use shorter keys", error=UnsupportedObjectError, codec=codec)
    assert error.key.startswith("m/0")


def test_a_name_that_swells_the_index_is_refused(tmp_path):
    saved(tmp_path / "at", {"m": {"k" * 10**6: torch.ones(2)}})
    assert len(next(iter(asyncckpt.load(tmp_path / "at")["m"]))) == 10**6
    for state in ({"k" * 2_500_000: torch.ones(2)}, {"m": {"k" * 5_000_000: 1}}, {"m": [{"k" * 5_000_000: {}}]}):
        with pytest.raises(UnsupportedObjectError, match="too long") as raised:
            Flattener().flatten(state)
        assert "kkk" in raised.value.key


def test_a_dimension_beyond_53_bits_is_refused():
    Flattener().flatten({"m": torch.empty(2**53, 0)})
    with pytest.raises(UnsupportedTensorError, match="2\\^53") as raised:
        Flattener().flatten({"m": torch.empty(2**54, 0)})
    assert raised.value.key == "m"


def test_strides_that_no_reader_can_hold_are_refused():
    Flattener().flatten({"m": torch.empty(2**53, 2**8 - 1, 0)})
    with pytest.raises(UnsupportedTensorError, match="no elements") as raised:
        Flattener().flatten({"m": torch.empty(2**53, 2**8, 0)})
    assert raised.value.key == "m"


VALUES = {
    "text": lambda size: "x" * size,
    "wide text": lambda size: "\U0001f600" * (size // 4),
    "short bytes": lambda size: [b"\xff" * 1000] * (size // 2000),
    "numbers": lambda size: [2.5] * (size // 9),
    "integers": lambda size: list(range(size // 5)),
    "many": lambda size: {f"k{number}": number for number in range(size // 40)},
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_up_to_the_limit_are_read_back_and_more_is_refused(tmp_path, monkeypatch, kind):
    made = VALUES[kind](MIB)
    size = len(write_state(Flattener().flatten({"v": made}).values))
    monkeypatch.setattr(limits, "STATE_BYTES", size)
    saved(tmp_path / "at", {"v": made})
    assert asyncckpt.load(tmp_path / "at")["v"] == made
    monkeypatch.setattr(limits, "STATE_BYTES", size - 1)
    error = refused(tmp_path / "beyond", {"v": made, "small": 1}, "above the limit", error=UnsupportedObjectError)
    assert error.key.startswith("v")


def test_values_far_below_the_limit_are_not_written_twice(monkeypatch):
    monkeypatch.setattr("asyncckpt.state.tree.write_state", None)
    Flattener().flatten({"v": ["x" * 1000] * 1000, "n": list(range(1_000_000)), "b": b"x" * 1000})


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1])
@pytest.mark.parametrize("codec", ["none", "planes"])
def test_bytes_come_back_as_bytes_whatever_their_length(tmp_path, size, codec):
    value = np.random.default_rng(0).bytes(size)
    state = {"replay": value, "deep": [value, {"in": (value, 1)}], "w": torch.ones(1), "set": {b"x" * size}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tmp_path, state, codec=codec)
    assert asyncckpt.load(tmp_path) == state
    assert asyncckpt.load(tmp_path, prefix="replay") == value
    target = {"replay": b"", "deep": [b"", {"in": (b"", 0)}], "w": torch.zeros(1), "set": set()}
    asyncckpt.restore(tmp_path, target)
    assert target == state


def test_long_bytes_are_no_part_of_the_state_file_and_are_not_copied_to_be_read():
    value = b"ab" * MIB
    flat = Flattener().flatten({"replay": value})
    assert flat.values == {}
    assert flat.structure.tree == {"dict": {"replay": "bytes"}}
    assert bytes(flat.tensors[0].numpy().data) == value
    kept = flat.tensors[0].data_ptr()
    del flat
    assert Flattener().flatten({"replay": value}).tensors[0].data_ptr() == kept


@pytest.mark.parametrize("size", [3, 2 * MIB])
def test_bytes_enter_a_dict_that_has_no_such_key_whatever_their_length(size):
    target = {"meta": {}}
    Pocket.of({"meta": {"replay": b"x" * size, "number": 1}}).restore(target)
    assert target == {"meta": {"replay": b"x" * size, "number": 1}}


def test_long_bytes_are_not_exported_and_are_no_tensor_by_name(tmp_path):
    found = saved(tmp_path / "run", {"model": {"w": torch.ones(2), "extra": b"ab" * MIB, "list": [b"cd" * MIB]}})
    assert found.names() == ["model/w"]
    found.export(tmp_path / "weights.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "weights.safetensors")) == ["w"]


def test_a_leaf_of_bytes_that_is_another_tensor_is_corrupt():
    pocket = Pocket.of({"replay": b"ab" * MIB})
    pocket.data["replay"] = torch.zeros(2, 2)
    with pytest.raises(asyncckpt.errors.CorruptCheckpointError, match="as bytes"):
        pocket.load()


def test_a_tensor_does_not_take_long_bytes():
    with pytest.raises(asyncckpt.errors.StateMismatchError, match="a tensor in the state, bytes"):
        Pocket.of({"x": b"ab" * MIB}).restore({"x": torch.zeros(2 * MIB, dtype=torch.uint8)})


def test_the_state_files_limit_counts_all_of_them(tmp_path, monkeypatch):
    saved(tmp_path, {"v": "x" * 1000})
    monkeypatch.setattr(limits, "STATE_BYTES", 1000)
    with pytest.raises(asyncckpt.errors.FormatVersionError, match="and 1000 are read"):
        asyncckpt.load(tmp_path, step=1)


def test_a_state_file_is_read_by_torch_alone():
    data = write_state(Flattener().flatten({"v": [b"x", "y"]}).values)
    assert torch.load(io.BytesIO(data), weights_only=True) == {"v": [b"x", "y"]}
