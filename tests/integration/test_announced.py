"""A snapshot that is still being taken is stored already, shard by shard; committed only when it is complete, and gone if it never is."""

import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import Saver, errors, events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.client import ServiceEngine
from asyncckpt.engine.job import SaveJob
from asyncckpt.engine.spawn import EngineOptions
from asyncckpt.format.plan import Group, Structure, TensorSpec, plan
from asyncckpt.state.statefile import write_state
from tests.processes import PATIENCE_S, children, eventually, kill
from tests.training import Training, fingerprint

TENSORS, ELEMENTS = 4, 1000


class Rig:
    """One save through a service, whose snapshot is taken by hand: each tensor is a shard of its own."""

    def __init__(self, url: Path) -> None:
        self.url = url
        tensors = tuple(TensorSpec(0, f"t{number}", "float32", (ELEMENTS,)) for number in range(TENSORS))
        tree = {"dict": {"m": {"dict": {f"t{number}": "tensor" for number in range(TENSORS)}}}}
        self.plan = plan(Structure((Group("m", "m"),), tensors, (), tree), codec="none", shard_bytes=4 * ELEMENTS)
        assert len(self.plan.shards) == TENSORS
        self.arena = Arena.create(1, self.plan.arena_bytes)
        self.answers: queue.Queue[tuple[int, object, BaseException | None]] = queue.Queue()
        self.attempts = iter(range(100, 200))
        options = EngineOptions(str(url), None, workers=1)
        self.engine = ServiceEngine(options, self, lambda: f"bbbbbbbb-{next(self.attempts):06d}")
        self.engine.start()

    def ended(self, number, outcome, error):
        self.answers.put((number, outcome, error))

    def event(self, event):
        pass

    def job(self, number=1, step=7, on_exists="skip"):
        attempt = f"aaaaaaaa-{number:06d}"
        where = {"structure": 1, "arena": 1, "codec": "none", "shard_bytes": 4 * ELEMENTS}
        return SaveJob(number, step, attempt, time_s=0.0, on_exists=on_exists, **where)

    def announce(self, job):
        self.arena.reset_counter()
        self.engine.announce(job, self.plan, self.arena)

    def fill(self, shards, *, value=1.0):
        """Write the first so many tensors, then the counter."""
        flat = torch.frombuffer(self.arena.buffer, dtype=torch.uint8, count=self.arena.bytes).view(torch.float32)
        for number in range(shards):
            start = self.plan.tensor_offsets[number] // 4
            flat[start : start + ELEMENTS] = value + number
        counter = torch.frombuffer(self.arena.buffer, dtype=torch.int64, count=1, offset=self.arena.counter_offset)
        counter.fill_(shards)

    def submit(self, job):
        self.engine.submit(job, self.plan, self.arena, write_state({}))

    def answer(self):
        return self.answers.get(timeout=PATIENCE_S)

    def shards(self):
        found = [
            name for _, _, names in os.walk(self.url) for name in names
        ]  # unlike rglob it bears a folder that goes away
        return [name for name in found if name.endswith(".safetensors")]

    def assert_stored(self, step=7, *, value=1.0):
        loaded = asyncckpt.load(self.url, step=step)["m"]
        for number in range(TENSORS):
            assert torch.equal(loaded[f"t{number}"], torch.full((ELEMENTS,), value + number))

    def close(self):
        self.engine.close()
        self.arena.close()


def assert_nothing_is_found(url):
    with pytest.raises(errors.CheckpointNotFoundError):
        asyncckpt.restore(url, {})


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path / "run")
    yield made
    made.close()


def test_shards_are_stored_as_they_are_filled_and_nothing_is_committed_before_the_last(rig):
    job = rig.job()
    rig.announce(job)
    for filled in range(1, TENSORS + 1):
        rig.fill(filled)
        eventually(lambda filled=filled: len(rig.shards()) == filled, f"{filled} shards are stored")
    assert_nothing_is_found(rig.url)
    assert rig.answers.empty()
    rig.submit(job)
    number, outcome, error = rig.answer()
    assert (number, outcome.result, error) == (1, "committed", None)
    rig.assert_stored()


def test_a_save_that_is_submitted_at_once_needs_no_announcement(rig):
    for number in range(1, 30):
        job = rig.job(number, step=number)
        rig.announce(job)
        rig.fill(TENSORS, value=float(number))
        rig.submit(job)  # before, while or after the announcement is sent
        assert rig.answer()[::2] == (number, None)
        rig.assert_stored(number, value=float(number))


def test_a_snapshot_that_fails_leaves_nothing_and_its_own_error(rig):
    job = rig.job()
    rig.announce(job)
    rig.fill(2)
    eventually(lambda: len(rig.shards()) == 2, "two shards are stored")
    torn = errors.TornSnapshotError("somebody wrote")
    rig.engine.withdraw(1, torn)
    assert rig.answer() == (1, None, torn)
    eventually(lambda: not rig.shards(), "what was stored is gone")
    again = rig.job(2)
    rig.fill(TENSORS, value=5.0)
    rig.submit(again)
    assert rig.answer()[1].result == "committed"
    rig.assert_stored(value=5.0)


def test_a_snapshot_that_was_never_announced_can_be_withdrawn(rig):
    torn = errors.TornSnapshotError("somebody wrote")
    rig.engine.withdraw(1, torn)
    assert rig.answer() == (1, None, torn)


@pytest.mark.parametrize("completes", [True, False])
def test_an_answer_waits_until_the_arena_is_no_longer_written(rig, completes):
    rig.fill(TENSORS)
    rig.submit(rig.job(1))
    assert rig.answer()[1].result == "committed"
    job = rig.job(2)  # the same step
    rig.announce(job)
    eventually(lambda: (save := rig.engine._submitted.get(2)) and save.answer, "the service says that the step exists")
    assert rig.answers.empty()
    if completes:
        rig.submit(job)
        number, outcome, error = rig.answer()
        assert (number, outcome.result, error) == (2, "exists", None)
    else:
        torn = errors.TornSnapshotError("somebody wrote")
        rig.engine.withdraw(2, torn)
        assert rig.answer() == (2, None, torn)
    rig.assert_stored()


@pytest.mark.parametrize("completes", [True, False])
def test_a_service_killed_while_a_snapshot_is_taken_is_followed_by_one_that_goes_on(rig, completes):
    job = rig.job()
    rig.announce(job)
    rig.fill(2)
    eventually(lambda: len(rig.shards()) == 2, "two shards are stored")
    kill(rig.engine.pid)
    if completes:
        eventually(lambda: len(rig.shards()) == 4, "the next service stores them again")
        rig.fill(TENSORS)
        rig.submit(job)
        assert rig.answer()[1].result == "committed"
        rig.assert_stored()
    else:
        torn = errors.TornSnapshotError("somebody wrote")
        rig.engine.withdraw(1, torn)
        assert rig.answer() == (1, None, torn)


def test_a_service_that_gives_up_answers_when_the_snapshot_is_complete(rig):
    job = rig.job()
    rig.announce(job)
    rig.fill(1)
    eventually(rig.shards, "one shard is stored")
    while not rig.engine.broken:
        kill(rig.engine.pid)
        eventually(lambda pid=rig.engine.pid: rig.engine.broken or rig.engine.pid != pid, "another is started")
    assert rig.answers.empty()
    rig.submit(job)
    number, outcome, error = rig.answer()
    assert (number, outcome) == (1, None)
    assert isinstance(error, errors.WorkerDiedError)


def test_a_worker_killed_while_a_snapshot_is_taken_costs_nothing(rig):
    job = rig.job()
    rig.announce(job)
    rig.fill(2)
    eventually(lambda: len(rig.shards()) == 2, "two shards are stored")
    for worker in children(rig.engine.pid):
        kill(worker)
    rig.fill(TENSORS)
    rig.submit(job)
    assert rig.answer()[1].result == "committed"
    rig.assert_stored()


DIES = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from tests.integration.test_announced import Rig
from tests.processes import eventually
rig = Rig(Path(sys.argv[1]))
rig.announce(rig.job())
rig.fill(2)
eventually(lambda: len(rig.shards()) == 2, "two shards are stored")
print(rig.engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_trainer_killed_while_it_copies_leaves_no_step_no_object_and_no_process(tmp_path):
    url = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-c", DIES, str(url)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    service = int(ended.stdout)
    eventually(lambda: not Path(f"/proc/{service}").exists(), "the service ends")
    assert not [path for path in url.rglob("*") if path.is_file()]
    assert_nothing_is_found(url)


def test_a_torn_snapshot_of_a_saver_is_taken_back_and_training_goes_on(tmp_path):
    training = Training()
    training.step()
    with Saver(tmp_path) as saver:
        saver._launcher._copier._before_copy = lambda: training.model.embed.weight.data.add_(1)
        torn = saver.save(1, training.state)
        with pytest.raises(errors.TornSnapshotError) as caught:
            torn.result(PATIENCE_S)
        assert caught.value.step == 1
        saver._launcher._copier._before_copy = None
        saver.save(2, training.state).result(PATIENCE_S)
    eventually(lambda: not list(tmp_path.rglob("*step-0000000001*")), "nothing of the torn step is left")
    other = Training()
    assert asyncckpt.restore(tmp_path, other.state).step == 2
    assert fingerprint(other.model.state_dict()) == fingerprint(training.model.state_dict())


def test_no_thread_is_left_when_the_engine_closes(tmp_path):
    before = {thread.name for thread in threading.enumerate()}
    rig = Rig(tmp_path / "run")
    rig.close()
    assert {thread.name for thread in threading.enumerate()} == before
    assert os.listdir(tmp_path) in ([], ["run"])


def test_a_save_that_was_answered_while_it_was_copied_leaves_nothing_in_the_service(tmp_path):
    def state(elements):
        parameters = [torch.nn.Parameter(torch.randn(elements // 8)) for _ in range(8)]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {"p": torch.nn.ParameterList(parameters), "o": optimizer}

    seen = []
    with Saver(tmp_path, codec="none", hooks=[seen.append]) as saver:
        small = state(8_000_000)
        saver.save(1, small).result(PATIENCE_S)
        for _ in range(5):  # the step exists: most are answered before the copy ends
            with warnings.catch_warnings(action="ignore"):  # of the one before
                assert saver.save(1, small).result(PATIENCE_S).skipped
        with pytest.warns(RuntimeWarning, match="exists already"):
            saver.save(2, state(40_000_000)).result(PATIENCE_S)  # larger: the arena is replaced, its descriptor closed
        saver.save(3, small).result(PATIENCE_S)
    assert not [event for event in seen if isinstance(event, events.ServiceRestarted)]
