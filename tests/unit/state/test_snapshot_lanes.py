"""What a step does beside a copy from a device, with lanes that are not CUDA's: `tests/gpu` has the real ones."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from asyncckpt.errors import SnapshotError, TornSnapshotError
from asyncckpt.state.hook import gate
from asyncckpt.state.in_flight import Copy
from asyncckpt.state.parts import LanePart, Part, Parts, Work
from asyncckpt.state.sight import Sight
from asyncckpt.state.snapshot import Copier
from tests.snapshots import PATIENCE_S, Rig, in_thread


class Event:
    """Passes when the device is done."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def synchronize(self) -> None:
        assert self.passed.wait(PATIENCE_S)


class Lane:
    """A device that copies when its event passes. `held`: events that some stream waits for; `settled`: somebody waited for all of it."""

    def __init__(self, *, fails: bool = False) -> None:
        self.event = Event()
        self.held: list[Event] = []
        self.enqueue = threading.Event()
        self.fails = fails
        self.settled = False

    def finish(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Event:
        assert self.enqueue.wait(PATIENCE_S)
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        torch._foreach_copy_(targets, sources)
        return self.event

    def synchronize(self) -> None:
        self.settled = True

    def hold(self, event: Event) -> None:
        self.held.append(event)


class Deviced:
    """One copy of an optimizer's parameters "on a device", run on a thread as a Copier would."""

    def __init__(self, lane: Lane, *, start: bool = True) -> None:
        self.parameters = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
        self.optimizer = torch.optim.SGD(self.parameters)
        for parameter in self.parameters:
            parameter.grad = torch.ones(5)
        self.rig = Rig({"p": self.parameters, "optimizer": self.optimizer}, Copier())
        copier = self.copier = self.rig.copier
        members = Part((0, 1, 2))
        parts = Parts(Part(), Part(), (LanePart(torch.device("cpu"), Part(), members),), members, None)
        targets = copier._views.of(self.rig.arena, self.rig.plan)
        self.work = Work(parts, self.rig.flat.tensors, targets, self.rig.arena, [lane], self.rig.flat.structure.path)  # type: ignore[list-item]
        self.work.watch(Sight.of(self.rig.flat.tensors), np.random.default_rng())
        self.copy = Copy(self.work, copier._clock, copier._clock())
        gate.open(self)
        gate.enter(self.copy)
        self.thread = in_thread(lambda: self.copy.run(self.rig.then.append) if start else None)

    def close(self) -> None:
        self.thread.join(PATIENCE_S)
        gate.close(self)
        self.rig.close()


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def deviced(lane: Lane) -> Iterator[Deviced]:
    deviced = Deviced(lane)
    yield deviced
    lane.enqueue.set()
    lane.event.passed.set()
    deviced.close()


def test_a_step_waits_until_the_copy_is_enqueued_and_not_until_it_is_complete(deviced: Deviced, lane: Lane) -> None:
    stepper = in_thread(deviced.optimizer.step)
    stepper.join(0.03)
    assert stepper.is_alive()
    lane.enqueue.set()
    stepper.join(PATIENCE_S)
    assert not stepper.is_alive()
    assert lane.held == [lane.event]
    assert not deviced.copy.done()
    lane.event.passed.set()
    deviced.copy.wait(PATIENCE_S)
    assert deviced.copy.error is None  # what the step wrote was legal
    assert deviced.rig.then == [deviced.copy]


def test_a_second_step_is_ordered_behind_the_copy_too(deviced: Deviced, lane: Lane) -> None:
    lane.enqueue.set()
    deviced.optimizer.step()
    torch.optim.SGD(deviced.parameters).step()
    assert lane.held == [lane.event, lane.event]
    lane.event.passed.set()
    deviced.copy.wait(PATIENCE_S)
    assert deviced.copy.error is None


def test_a_write_before_the_hook_is_found_at_the_hook(deviced: Deviced, lane: Lane) -> None:
    with torch.no_grad():
        deviced.parameters[1].add_(1)
    lane.enqueue.set()
    deviced.optimizer.step()
    assert isinstance(deviced.copy.error, TornSnapshotError)
    assert deviced.copy.error.key == "p/#1"
    assert not deviced.copy.done()


def test_a_write_that_no_step_follows_is_found_at_the_end(deviced: Deviced, lane: Lane) -> None:
    lane.enqueue.set()
    deviced.parameters[2].data = torch.zeros(5)
    lane.event.passed.set()
    deviced.copy.wait(PATIENCE_S)
    assert isinstance(deviced.copy.error, TornSnapshotError)
    assert deviced.copy.error.key == "p/#2"


def test_a_device_that_fails_lets_the_step_pass_and_ends_the_copy() -> None:
    lane = Lane(fails=True)
    deviced = Deviced(lane)
    lane.enqueue.set()
    deviced.optimizer.step()
    deviced.copy.wait(PATIENCE_S)
    assert type(deviced.copy.error) is SnapshotError
    assert "out of memory" in str(deviced.copy.error)
    assert lane.settled, "what it was given before may still be written to the arena, which others get now"
    deviced.close()


def test_the_memory_of_a_source_that_moves_behind_a_step_is_kept_until_the_device_has_copied_it(
    deviced: Deviced, lane: Lane
) -> None:
    """Nothing else keeps it: the caching allocator would give it to whoever asks next on its stream."""
    before = {parameter.data_ptr() for parameter in deviced.parameters}
    lane.enqueue.set()
    deviced.optimizer.step()
    for parameter in deviced.parameters:
        parameter.data = torch.zeros(5)
    held = deviced.work.storages
    assert {storage.data_ptr() for storage in held} == before
    assert all(storage.nbytes() == 20 for storage in held)
    lane.event.passed.set()
    deviced.copy.wait(PATIENCE_S)
    assert deviced.copy.error is None


def test_memory_that_is_freed_behind_a_step_and_before_the_device_has_copied_it_tears_the_snapshot(
    deviced: Deviced, lane: Lane
) -> None:
    lane.enqueue.set()
    deviced.optimizer.step()
    deviced.parameters[1].untyped_storage().resize_(0)
    lane.event.passed.set()
    deviced.copy.wait(PATIENCE_S)
    assert isinstance(deviced.copy.error, TornSnapshotError)
    assert "freed" in str(deviced.copy.error)
    assert deviced.copy.error.key == "p/#1"


def test_an_interrupted_save_waits_for_the_device_before_its_arena_is_free(lane: Lane) -> None:
    deviced = Deviced(lane, start=False)
    deviced.copier.settle(deviced.rig.arena)
    assert lane.settled
    assert isinstance(deviced.copy.error, SnapshotError)
    deviced.close()
