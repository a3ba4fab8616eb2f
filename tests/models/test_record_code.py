"""The code of commit and removal, driven through the network of `test_record_model.py`: requests lost, late and doubled, actors killed.

Each actor is a thread that runs the real functions, and only one runs at a time: at every request it waits until it is drawn. So a seed
replays exactly.
"""

import contextlib
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from asyncckpt import errors
from asyncckpt.checkpoints import removal
from asyncckpt.checkpoints.standing import is_set_aside, judge, lacks_index
from asyncckpt.engine import commit as commits
from asyncckpt.engine.job import SaveJob
from asyncckpt.format import keys
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import plan
from asyncckpt.options import RetryPolicy
from asyncckpt.state.statefile import write_state
from asyncckpt.state.tree import Flattener
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from tests.faulty import FaultyStore
from tests.writer import _put

SEEDS = 150
STEPS = 260
FAULTS = 0.12
STEP = 10
WRITES = ("put", "replace", "remove", "delete")

FLAT = Flattener().flatten({"weight": torch.ones(50)})
PLAN = plan(FLAT.structure, codec="none")
BUILDER = IndexBuilder(PLAN)
STATE = write_state(FLAT.values)


class Killed(BaseException):
    """Whoever is killed does nothing more."""


class Actor:
    """A thread that runs only while it is drawn."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.drawn, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.killed = False, False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        self.drawn.acquire()
        try:
            if not self.killed:
                self.work()
        except Killed:
            pass
        except BaseException as error:  # raised by whoever plays
            self.error = error
        self.ended = True
        self.waits.release()

    def go(self) -> None:
        """Until its next request, or its end."""
        self.drawn.release()
        self.waits.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, _seconds: float = 0.0) -> None:
        self.waits.release()
        self.drawn.acquire()
        if self.killed:
            raise Killed


class Network(FaultyStore):
    """What an actor sees of the store: each request waits for its turn, and then meets its fate."""

    def __init__(self, play: "Play") -> None:
        super().__init__(play.store)
        self.play = play

    def run(self, operation, key, call):
        play, actor = self.play, self.play.actor_here()
        if actor is None:  # a helper's thread: index and state are put side by side
            return call()
        actor.pause()
        if play.clean:
            return call()
        if operation not in WRITES:
            if play.random.random() < FAULTS / 2:
                raise errors.TransientStoreError("no answer", key=key)
            return call()
        if play.random.random() > FAULTS:
            return call()
        fate = play.random.choice(("answer lost", "never arrives", "arrives late", "arrives twice"))
        if fate in ("arrives late", "arrives twice"):
            play.late.append(call)
        if fate in ("answer lost", "arrives twice"):
            answer = call()
            if fate == "arrives twice":
                return answer
        raise errors.TransientStoreError("no answer", key=key)


class Play:
    """One seed: a store, its actors, the requests under way, and what everybody was told."""

    def __init__(self, seed: int, store: MemoryStore) -> None:
        self.random = random.Random(seed)
        self.store = store
        self.actors: list[Actor] = []
        self.late: list[Callable[[], object]] = []
        self.clean = False
        self.numbers = itertools.count(1)
        self.acknowledged: set[str] = set()
        self.given_up: set[str] = set()
        self.told: dict[str, str] = {}
        self.wrong: Counter[str] = Counter()

    def actor_here(self) -> Actor | None:
        return next((actor for actor in self.actors if actor.thread is threading.current_thread()), None)

    def network(self) -> RetryingStore:
        seconds = itertools.count()
        return RetryingStore(
            Network(self),
            RetryPolicy(deadline_s=2.0, first_wait_s=0.001, max_wait_s=0.001),
            clock=lambda: float(next(seconds)),
            sleep=lambda _: None,
        )

    # -- actors

    def writer(self) -> None:
        name = f"{next(self.numbers):08x}-000001"
        job = SaveJob(1, STEP, name, structure=1, arena=1, codec="none", time_s=5.0)
        store, actor = self.network(), self.actor_here()
        assert actor is not None
        self.told[name] = "failed"
        arena = memoryview(bytearray(PLAN.arena_bytes))
        try:
            if commits.exists(store, job):
                self.told[name] = "exists"
                return
            receipts = [_put(store, keys.folder(STEP, name), PLAN, shard, arena) for shard in PLAN.shards]
            digests = bytes(arena[PLAN.digests_offset : PLAN.digests_offset + 32 * PLAN.piece_count])
            outcome = commits.commit(
                store, job, BUILDER, receipts=receipts, digests=digests, state=STATE, sleep=actor.pause
            )
        except errors.CommitUnknownError:
            return
        except errors.CheckpointError:
            self.abandon(store, name)
            return
        self.told[name] = outcome.result
        if outcome.result == "committed":
            self.acknowledged.add(name)
        elif not outcome.may_appear:
            self.abandon(store, name)

    def abandon(self, store: RetryingStore, name: str) -> None:
        try:
            removal.abandon(store, STEP, name)
        except errors.StoreError:
            return

    def remover(self) -> None:
        store = self.network()
        try:
            standing = judge(store, STEP)
            if standing is not None:
                self.given_up.add(standing.attempt)
                removal.remove_checkpoint(store, standing)
        except errors.StoreError:
            return

    def marker(self) -> None:
        store = self.network()
        try:
            standing = judge(store, STEP)
            if standing is not None:
                self.given_up.add(standing.attempt)
                store.put(keys.damaged_key(STEP), [standing.attempt.encode()])
        except errors.StoreError:
            return

    # -- the play

    def spawn(self) -> None:
        drawn = self.random.random()
        self.actors.append(Actor(self.writer if drawn < 0.6 else self.remover if drawn < 0.85 else self.marker))

    def turn(self, actor: Actor) -> None:
        actor.go()
        if actor.ended:
            self.actors.remove(actor)
        self.check()

    def deliver(self) -> None:
        call = self.late.pop(self.random.randrange(len(self.late)))
        with contextlib.suppress(errors.StoreError):  # refused, and nobody hears
            call()
        self.check()

    def kill(self) -> None:
        actor = self.random.choice(self.actors)
        actor.killed = True
        actor.go()
        self.actors.remove(actor)

    def run(self) -> Counter[str]:
        for _ in range(STEPS):
            chance = self.random.random()
            if not self.actors or chance < 0.05:
                self.spawn()
            elif self.late and chance < 0.10:
                self.deliver()
            elif chance < 0.13:
                self.kill()
            else:
                self.turn(self.random.choice(self.actors))
        self.clean = True
        while self.actors:
            self.turn(self.random.choice(self.actors))
        while self.late:
            self.deliver()
        self.actors.append(Actor(self.writer))
        while self.actors:
            self.turn(self.actors[0])
        if not self.ends_well():
            self.wrong["the step is blocked"] += 1
        return self.wrong

    # -- what must hold

    def check(self) -> None:
        for name in self.acknowledged - self.given_up:
            standing = judge(self.store, STEP)
            if standing is None or standing.attempt != name or not self.is_whole(name):
                self.wrong["an acknowledged step is lost"] += 1
                self.given_up.add(name)

    def is_whole(self, name: str) -> bool:
        return len(list(self.store.list(keys.folder(STEP, name)))) == len(PLAN.shards) + 2

    def ends_well(self) -> bool:
        standing = judge(self.store, STEP)
        if standing is None or standing.record is None or lacks_index(self.store, standing.record):
            return False
        last = self.told[max(self.told)]
        if last == "committed":
            return standing.attempt == max(self.told)
        return last == "exists" and not is_set_aside(self.store, standing)


class PutsOverAnything(MemoryStore):
    """Ignores the condition of a replacement."""

    def replace(self, key, data, old):
        self.put(key, data)


class DeletesAnything(MemoryStore):
    """Ignores the condition of a removal."""

    def remove(self, key, old):
        self.delete([key])


def test_nothing_acknowledged_is_lost_and_no_step_is_blocked():
    for seed in range(SEEDS):
        assert not (wrong := Play(seed, MemoryStore()).run()), f"seed {seed}: {dict(wrong)}"


@pytest.mark.parametrize("store", [PutsOverAnything, DeletesAnything])
def test_a_store_that_ignores_a_condition_is_noticed(store):
    assert any(Play(seed, store()).run() for seed in range(SEEDS))
