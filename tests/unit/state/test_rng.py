import random

import numpy as np
import pytest
import torch

from asyncckpt.errors import StateMismatchError
from asyncckpt.state.rng import RNG
from tests.unit.state.pocket import Pocket


def draw():
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]
    return [*values, torch.randn(3).tolist(), torch.randperm(5).tolist()]


@pytest.fixture(autouse=True)
def _generators():
    before = RNG().state_dict()
    yield
    RNG().load_state_dict(before)


def test_all_generators_go_on_where_they_stood():
    draw()
    pocket = Pocket.of({"rng": RNG()})
    expected = [draw(), draw()]
    draw()
    pocket.restore({"rng": RNG()})
    assert [draw(), draw()] == expected


def test_the_second_gaussian_of_a_pair_is_kept():
    random.seed(1)
    np.random.seed(1)
    random.gauss(0, 1)
    np.random.randn()
    pocket = Pocket.of({"rng": RNG()})
    expected = (random.gauss(0, 1), np.random.randn())
    pocket.restore({"rng": RNG()})
    assert (random.gauss(0, 1), np.random.randn()) == expected


def test_more_generators_than_devices_are_a_mismatch_before_anything_is_set(monkeypatch):
    monkeypatch.setattr(RNG, "state_dict", lambda self: {**given, "cuda": [torch.zeros(16, dtype=torch.uint8)] * 999})
    given = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state()}
    tensor, pocket = torch.zeros(1), Pocket.of({"t": torch.ones(1), "rng": RNG()})
    with pytest.raises(StateMismatchError, match="999 CUDA generators"):
        pocket.restore({"t": tensor, "rng": RNG()})
    assert tensor.item() == 0
    with pytest.raises(StateMismatchError, match="999 CUDA generators"):
        RNG().load_state_dict(RNG().state_dict())


def test_cuda_that_is_not_in_use_is_not_started():
    assert RNG().state_dict()["cuda"] == [] or torch.cuda.is_initialized()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_go_on_where_they_stood():
    torch.rand(1, device="cuda")
    pocket = Pocket.of({"rng": RNG()})
    expected = torch.rand(5, device="cuda").tolist()
    pocket.restore({"rng": RNG()})
    assert torch.rand(5, device="cuda").tolist() == expected
