import mmap

import numpy as np
import pytest
import torch

from asyncckpt.state.sight import Sight, addresses_of
from asyncckpt.state.witness import Ahead, Layout, Witnesses, draw, freed

ALIGN = 64


class Copied:
    """Tensors, and an arena that holds their bytes."""

    def __init__(self, *tensors: torch.Tensor, seed: int = 0) -> None:
        self.tensors = list(tensors)
        self.offsets = [0]
        for tensor in tensors:
            self.offsets.append(-(-(self.offsets[-1] + tensor.nbytes) // ALIGN) * ALIGN)
        self.arena = mmap.mmap(-1, max(self.offsets[-1], 1))
        self.layout = Layout.of(
            [tuple(tensor.shape) for tensor in tensors], self.offsets[:-1], [tensor.itemsize for tensor in tensors]
        )
        self.random = np.random.default_rng(seed)
        self.copy()
        self.witnesses = Witnesses(self.tensors, Sight.of(self.tensors), self.layout, Ahead(self.random))

    def copy(self) -> None:
        for tensor, offset in zip(self.tensors, self.offsets, strict=False):
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            self.arena[offset : offset + len(data)] = data

    def difference(self) -> tuple[int, str] | None:
        return self.witnesses.difference(self.arena)


def randoms(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape) for _ in range(count)]


def test_untouched_tensors_show_no_difference() -> None:
    assert Copied(*randoms(50, 7, 3)).difference() is None


@pytest.mark.parametrize("member", [0, 17, 49])
def test_an_in_place_write_shows_by_its_version(member: int) -> None:
    copied = Copied(*randoms(50, 7, 3))
    copied.tensors[member].add_(1)
    assert copied.difference() == (member, "was written in place")


@pytest.mark.parametrize("member", [0, 17, 49])
def test_another_storage_shows_by_its_address(member: int) -> None:
    copied = Copied(*randoms(50, 7, 3))
    held = copied.tensors[member].untyped_storage()
    copied.tensors[member].data = torch.zeros(7, 3)
    assert held.nbytes()
    assert copied.difference() == (member, "got another storage")


@pytest.mark.parametrize("member", [0, 17, 49])
def test_a_write_without_a_version_shows_by_the_word_in_the_source(member: int) -> None:
    copied = Copied(*randoms(50, 7, 3))
    copied.tensors[member].data.add_(1)
    found = copied.difference()
    assert found is not None
    assert found[0] == member
    assert ".data" in found[1]


@pytest.mark.parametrize("member", [0, 17, 49])
def test_a_copy_that_read_other_bytes_shows_by_the_word_in_the_arena(member: int) -> None:
    copied = Copied(*randoms(50, 7, 3))
    begin, end = copied.offsets[member], copied.offsets[member] + copied.tensors[member].nbytes
    copied.arena[begin:end] = bytes(byte ^ 0xFF for byte in copied.arena[begin:end])
    found = copied.difference()
    assert found is not None
    assert found[0] == member


def test_before_the_copy_is_complete_the_words_are_left_out() -> None:
    copied = Copied(*randoms(5, 7))
    copied.tensors[2].data.add_(1)
    assert copied.witnesses.difference(None) is None
    copied.tensors[3].add_(1)
    assert copied.witnesses.difference(None) == (3, "was written in place")


def test_inference_tensors_have_no_version_but_a_word() -> None:
    with torch.inference_mode():
        tensors = randoms(3, 9)
    copied = Copied(*tensors, torch.randn(4))
    assert copied.difference() is None
    with torch.inference_mode():
        tensors[1].add_(1)
    found = copied.difference()
    assert found is not None
    assert found[0] == 1


ODD = {
    "one byte": lambda: torch.randint(0, 2, (1,), dtype=torch.uint8),
    "three bytes": lambda: torch.randint(0, 255, (3,), dtype=torch.uint8),
    "bool": lambda: torch.rand(9) > 0.5,
    "scalar": lambda: torch.randn(()),
    "half": lambda: torch.randn(1).half(),
    "odd address": lambda: torch.randint(0, 255, (64,), dtype=torch.uint8)[1:],
    "odd half": lambda: torch.randn(9).bfloat16()[1:],
    "double": lambda: torch.randn(3, dtype=torch.float64),
    "complex": lambda: torch.randn(5, dtype=torch.complex128),
    "complex strided": lambda: torch.randn(5, 4, dtype=torch.complex128).t(),
    "transposed": lambda: torch.randn(5, 7).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 6).expand(4, 6),
    "strided bytes": lambda: torch.randint(0, 255, (40,), dtype=torch.uint8)[3::7],
    "strided half": lambda: torch.randn(40).half()[3::7],
    "flipped": lambda: torch.randn(6, 5).flip(0)[::2, ::2],
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_have_a_true_word_wherever_it_is_drawn(kind: str) -> None:
    for seed in range(30):
        copied = Copied(torch.randn(5), ODD[kind](), torch.randn(3, 3).t(), seed=seed)
        assert copied.difference() is None


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_that_are_rewritten_entirely_are_always_seen(kind: str) -> None:
    for seed in range(30):
        copied = Copied(torch.randn(5), ODD[kind](), torch.randn(3, 3).t(), seed=seed)
        view = copied.tensors[1]
        whole = view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0).view(torch.uint8)
        whole.numpy()[...] ^= 0xFF
        found = copied.difference()
        assert found is not None
        assert found[0] == 1


def test_every_part_of_a_tensor_is_drawn_sooner_or_later() -> None:
    copied = Copied(torch.arange(16, dtype=torch.float32), torch.arange(12).float().view(3, 4).t())
    strides = {1: copied.tensors[1].stride()}
    seen: tuple[set[int], set[int]] = (set(), set())
    for _ in range(400):
        for words in draw(copied.layout, addresses_of(copied.tensors), strides, copied.random):
            for member, place in zip(words.members.tolist(), (words.in_arena * words.size_bytes).tolist(), strict=True):
                seen[member].add(place - copied.offsets[member])
    assert seen == (set(range(0, 64, 8)), set(range(0, 48, 4)))


def test_a_freed_storage_is_found_and_an_empty_tensor_is_not_taken_for_one() -> None:
    tensors = [torch.randn(0), torch.randn(3), torch.randn(0, 4)]
    assert freed(tensors, addresses_of(tensors)) is None
    tensors[1].untyped_storage().resize_(0)
    assert freed(tensors, addresses_of(tensors)) == 1


def test_the_global_generators_are_not_touched() -> None:
    torch.manual_seed(3)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tensors = [torch.zeros(4, 4), torch.zeros(3, 5).t()]
    Copied(*tensors)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
