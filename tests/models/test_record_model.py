"""The protocol of one record's key as a small random model: writers, removers and markers of one step, over a network without mercy.

Every request may lose its answer, never arrive, arrive late, or arrive twice; actors may be killed between any two requests. At the end all
late requests are delivered and one more writer tries. The rules that the code follows must hold over thousands of seeds, and each wrong rule
must be caught by the same model: what it says nothing against would otherwise prove nothing.

`test_record_code.py` drives the real code through the same network.
"""

import random
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace

import pytest

SEEDS = 3000
STEPS = 260
FAULTS = 0.12
TRIES = 3
ROUNDS = 5
LOST = "lost"
RECORD, MARK = "record", "mark"


@dataclass(frozen=True)
class Rules:
    """How records are changed. Removal and replacement on the condition that the record is the one that was judged; the folder of a save
    whose record may still arrive stays; a record whose folder is gone may be replaced."""

    replaces_on_condition: bool = True
    removes_on_condition: bool = True
    keeps_folder_of_unknown: bool = True
    replaces_stumps: bool = True
    deletes_before_putting: bool = False


RIGHT = Rules()
WRONG = {
    "as it once was: delete, then put": Rules(False, False, False, False, deletes_before_putting=True),
    "a replacement that is not conditional": replace(RIGHT, replaces_on_condition=False),
    "a removal that is not conditional": replace(RIGHT, removes_on_condition=False),
    "stumps stay for ever": replace(RIGHT, replaces_stumps=False),
}

Request = tuple[str, str, object, object]  # operation, key, value, condition
Actor = Generator[Request, object, None]


class World:
    """One step's objects, the requests on their way, and what everybody was told."""

    def __init__(self, seed: int, rules: Rules) -> None:
        self.random = random.Random(seed)
        self.rules = rules
        self.objects: dict[str, object] = {}
        self.late: list[Request] = []
        self.acknowledged: set[str] = set()
        self.given_up: set[str] = set()  # attempts that somebody removed, or set aside, on purpose
        self.told: dict[str, str] = {}
        self.wrong: Counter[str] = Counter()

    # -- the store

    def serve(self, request: Request) -> object:
        operation, key, value, condition = request
        there = self.objects.get(key)
        if operation == "get":
            return there
        if condition == "absent" and there is not None:
            return "refused"
        if condition not in (None, "absent") and there != condition:
            return "gone" if there is None else "refused"
        if operation == "put":
            self.objects[key] = value
        else:
            self.objects.pop(key, None)
        return "done"

    def send(self, request: Request, *, clean: bool) -> object:
        if clean:
            return self.serve(request)
        if request[0] == "get":
            return LOST if self.random.random() < FAULTS / 2 else self.serve(request)
        if self.random.random() > FAULTS:
            return self.serve(request)
        kind = self.random.choice(("answer lost", "never arrives", "arrives late", "arrives twice"))
        if kind in ("answer lost", "arrives twice"):
            answer = self.serve(request)
        if kind in ("arrives late", "arrives twice"):
            self.late.append(request)
        return answer if kind == "arrives twice" else LOST

    # -- the actors

    def asks(self, *request: object) -> Generator[Request, object, tuple[object, bool]]:
        """A request and its repetitions: the answer, and whether one of them had none."""
        unanswered = False
        for _ in range(TRIES):
            answer = yield (*request, *(None,) * (4 - len(request)))  # type: ignore[misc]
            if answer is not LOST:
                return answer, unanswered
            unanswered = True
        return LOST, True

    def writer(self, name: str) -> Actor:
        self.told[name] = "failed"
        record, _ = yield from self.asks("get", RECORD)
        if record is LOST:
            return
        if record is not None and not (yield from self.may_replace(record)):
            self.told[name] = "exists"
            return
        stored, _ = yield from self.asks("put", f"{name}/index", 1)
        if stored is LOST:
            yield from self.abandon(name)
            return
        condition, unknown = "absent", False
        for _ in range(ROUNDS):
            answer, unanswered = yield from self.asks("put", RECORD, name, condition)
            unknown = unknown or unanswered
            if answer == "done":
                self.acknowledge(name)
                return
            if answer is LOST:
                break
            record, _ = yield from self.asks("get", RECORD)
            if record == name:
                self.acknowledge(name)
                return
            if record is LOST or (record is None and unknown):
                break
            if record is None:
                condition = "absent"
            elif not (yield from self.may_replace(record)):
                self.told[name] = "exists"
                break
            elif self.rules.deletes_before_putting:
                yield from self.asks("delete", RECORD)
                condition = "absent"
            else:
                condition = record if self.rules.replaces_on_condition else None
        if not (unknown and self.rules.keeps_folder_of_unknown):
            yield from self.abandon(name)

    def acknowledge(self, name: str) -> None:
        self.told[name] = "committed"
        self.acknowledged.add(name)

    def may_replace(self, record: object) -> Generator[Request, object, bool]:
        mark, _ = yield from self.asks("get", MARK)
        if mark == record:
            return True
        if self.rules.replaces_stumps:
            index, _ = yield from self.asks("get", f"{record}/index")
            if index is None:
                again, _ = yield from self.asks("get", RECORD)
                return again == record
        return False

    def abandon(self, name: str) -> Actor:
        record, _ = yield from self.asks("get", RECORD)
        if record not in (LOST, name):
            yield from self.asks("delete", f"{name}/index")

    def remover(self) -> Actor:
        record, _ = yield from self.asks("get", RECORD)
        if record in (None, LOST):
            return
        self.given_up.add(str(record))
        yield from self.asks("delete", RECORD, None, record if self.rules.removes_on_condition else None)
        now, _ = yield from self.asks("get", RECORD)
        if now not in (LOST, record):
            yield from self.asks("delete", f"{record}/index")

    def marker(self) -> Actor:
        record, _ = yield from self.asks("get", RECORD)
        if record not in (None, LOST):
            self.given_up.add(str(record))
            yield from self.asks("put", MARK, record)

    # -- what must hold

    def check(self) -> None:
        record = self.objects.get(RECORD)
        for name in self.acknowledged - self.given_up:
            if record != name or f"{name}/index" not in self.objects:
                self.wrong["an acknowledged step is lost"] += 1
                self.given_up.add(name)

    def ends_well(self) -> bool:
        record = self.objects.get(RECORD)
        if record is None or f"{record}/index" not in self.objects:
            return False
        if self.told["last"] == "committed":
            return record == "last"
        return self.told["last"] == "exists" and self.objects.get(MARK) != record


class Play:
    """Actors that take turns."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.actors: list[list] = []  # [generator, answer, begun]
        self.writers = 0

    def spawn(self) -> None:
        drawn = self.world.random.random()
        if drawn < 0.6:
            self.writers += 1
            self.begin(self.world.writer(f"w{self.writers}"))
        else:
            self.begin(self.world.remover() if drawn < 0.85 else self.world.marker())

    def begin(self, actor: Actor) -> None:
        self.actors.append([actor, None, False])

    def turn(self, position: int, *, clean: bool = False) -> None:
        actor = self.actors[position]
        try:
            request = actor[0].send(actor[1]) if actor[2] else next(actor[0])
        except StopIteration:
            del self.actors[position]
        else:
            actor[1], actor[2] = self.world.send(request, clean=clean), True
        self.world.check()


def play(seed: int, rules: Rules) -> Counter[str]:
    world = World(seed, rules)
    drawn, stage = world.random, Play(world)
    for _ in range(STEPS):
        chance = drawn.random()
        if not stage.actors or chance < 0.05:
            stage.spawn()
        elif world.late and chance < 0.10:
            world.serve(world.late.pop(drawn.randrange(len(world.late))))
            world.check()
        elif chance < 0.13:
            stage.actors.pop(drawn.randrange(len(stage.actors)))  # killed
        else:
            stage.turn(drawn.randrange(len(stage.actors)))
    while stage.actors:
        stage.turn(drawn.randrange(len(stage.actors)), clean=True)
    drawn.shuffle(world.late)
    while world.late:
        world.serve(world.late.pop())
        world.check()
    stage.begin(world.writer("last"))
    while stage.actors:
        stage.turn(0, clean=True)
    if not world.ends_well():
        world.wrong["the step is blocked"] += 1
    return world.wrong


def test_under_the_rules_nothing_acknowledged_is_lost_and_no_step_is_blocked():
    for seed in range(SEEDS):
        assert not (wrong := play(seed, RIGHT)), f"seed {seed}: {dict(wrong)}"


@pytest.mark.parametrize("rules", WRONG.values(), ids=WRONG.keys())
def test_the_model_notices_each_wrong_rule(rules):
    assert any(play(seed, rules) for seed in range(SEEDS))
