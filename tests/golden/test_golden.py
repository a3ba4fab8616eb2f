"""What was written once must restore for ever."""

from pathlib import Path

import numpy as np
import pytest
import torch

import asyncckpt
from tests.golden.golden import CODECS, STEP, state

FOLDERS = sorted(path for path in Path(__file__).parent.glob("v*/*") if path.is_dir())


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and bytes(a.contiguous().flatten().view(torch.uint8)) == bytes(
            b.contiguous().flatten().view(torch.uint8)
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_there_is_a_golden_checkpoint_of_every_codec():
    assert {path.name for path in FOLDERS} == set(CODECS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_loads_bit_exact(folder):
    loaded = asyncckpt.load(folder)
    expected = state()
    assert set(loaded) == set(expected)
    for key in expected:
        assert equal(expected[key], loaded[key]), key
    assert loaded["model"]["tied.a"].data_ptr() == loaded["model"]["tied.b"].data_ptr()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_checkpoint_verifies_and_keeps_what_was_said_of_it(folder):
    checkpoint = asyncckpt.Run(folder).get(STEP)
    checkpoint.verify()
    assert (checkpoint.metrics, checkpoint.epoch, checkpoint.tags) == ({"loss": 0.5}, 7, ("golden",))
    assert checkpoint.config == {"lr": 0.001}
