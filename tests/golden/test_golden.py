"""What was written once must restore for ever."""

from pathlib import Path

import numpy as np
import pytest
import torch

import asyncckpt
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.format.box import run_start
from asyncckpt.store.local import LocalStore
from tests.golden.by_hand import EARLIER, boxes_state
from tests.golden.golden import CODECS, STEP, Net, state, trained

ALL = sorted(path for path in Path(__file__).parent.glob("v*/*") if path.is_dir())
FOLDERS = [path for path in ALL if not path.name.startswith("boxes-")]
BOXES = [path for path in ALL if path.name.startswith("boxes-")]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and all(map(torch.equal, *([one.contiguous().flatten().view(torch.uint8)] for one in (a, b))))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_there_is_a_golden_checkpoint_of_every_codec():
    assert {path.name for path in FOLDERS} == set(CODECS)
    assert {path.name for path in BOXES} == {f"boxes-{codec}" for codec in CODECS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_loads_bit_exact(folder):
    loaded = asyncckpt.load(folder)
    expected = state()
    assert set(loaded) == {*expected, *trained()}
    for key in expected:
        assert equal(expected[key], loaded[key]), key
    assert loaded["model"]["tied.a"].data_ptr() == loaded["model"]["tied.b"].data_ptr()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_verifies_and_keeps_what_was_said_of_it(folder):
    checkpoint = asyncckpt.Run(folder).get(STEP)
    checkpoint.verify()
    assert (checkpoint.metrics, checkpoint.epoch, checkpoint.tags) == ({"loss": 0.5}, 7, ("golden",))
    assert checkpoint.config == {"lr": 0.001}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_optimizer_is_restored_by_the_names_of_its_parameters(folder):
    expected, net = trained(), Net()
    optimizer = net.optimizer(turned=True)
    asyncckpt.restore(folder, {"net": net, "optimizer": optimizer})
    assert equal(expected["net"].state_dict(), net.state_dict())
    for one, other in zip(expected["net"].parameters(), net.parameters(), strict=True):
        assert equal(expected["optimizer"].state[one], optimizer.state[other])
    _, index = read_checkpoint(LocalStore(folder), STEP)
    names = [f"net/{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias")]
    assert index.parameters == {"optimizer": tuple(names)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_has_long_bytes_as_a_leaf_and_a_lineage(folder):
    record, index = read_checkpoint(LocalStore(folder), STEP)
    assert index.tree["dict"]["values"]["dict"]["long bytes"] == "bytes"
    assert index.tensors["values/long bytes"].dtype == "uint8"
    assert len(record.lineage) == 8
    assert record.requires == ()


@pytest.mark.parametrize("folder", BOXES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_boxes_bytes_named_twice_and_an_earlier_steps_shard_load_bit_exact(folder):
    expected = boxes_state(folder.name.removeprefix("boxes-"))
    assert equal(expected, asyncckpt.load(folder))
    assert equal(expected["model"]["kept"], asyncckpt.load(folder, step=EARLIER)["model"]["kept"])
    for checkpoint in asyncckpt.Run(folder).checkpoints():
        checkpoint.verify()


@pytest.mark.parametrize("folder", BOXES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_checkpoint_by_hand_is_what_it_says(folder):
    record, index = read_checkpoint(LocalStore(folder), STEP)
    whirl, again = index.tensors["model/whirl"], index.tensors["model/again"]
    assert any(run_start((chunk.offsets, chunk.sizes), whirl.shape) is None for chunk in whirl.chunks)
    assert whirl.chunks[0][2:] == again.chunks[0][2:]
    assert len(record.folders) == 2
    assert index.parameters == {"optimizer": ("model/whirl", None)}
