"""The commit of many ranks as a small random model: who decides, and what may be removed when.

Rank 0's service waits for everybody's receipt and puts the record; if one is missing at its deadline it puts a mark of failure, and then ranks
remove what they stored. Hosts die, services are started again, ranks are late, a new run begins beside the orphans of the old one, and one
put of the record in ten has no answer, of which half arrive later. Today one rank writes, so this holds the design of what is to come; its
rule about the unknown put is already the code's: nothing is removed, and no failure is told, once a record was sent without an answer.
"""

import random
from collections import Counter

import pytest

SEEDS = 1200
RANKS = 3
STEPS = 400
SHARDS = 2
DEADLINE_S, WAIT_S = 30.0, 60.0
RIGHT = "unknown stays"
WRONG = ("a mark after an unknown put", "each rank has a deadline of its own")


class Model:
    """One step in one store. `rule`: what is done when a deadline passes or an answer is missing."""

    def __init__(self, seed: int, rule: str) -> None:
        self.random = random.Random(seed)
        self.rule = rule
        self.objects: dict[str, object] = {}
        self.late: list[str] = []  # records under way
        self.now_s = 0.0
        self.runs = [[Rank(self, "A", number, self.random.choice((0, 0, 0, 0, 1, 20))) for number in range(RANKS)]]

    def put_record(self, attempt: str) -> bool:
        return self.objects.setdefault("record", attempt) == attempt

    @property
    def ranks(self) -> "list[Rank]":
        return [rank for run in self.runs for rank in run]

    def lacks_shards(self) -> bool:
        record = self.objects.get("record")
        names = [f"{record}/shard-{rank}-{shard}" for rank in range(RANKS) for shard in range(SHARDS)]
        return record is not None and any(name not in self.objects for name in names)

    def happen(self) -> None:
        """One thing, of any of them."""
        self.now_s += self.random.random() * self.random.choice((0.1, 0.1, 1, 8))
        rank, chance = self.random.choice(self.ranks), self.random.random()
        if chance < 0.01:
            rank.dead = True
        elif chance < 0.03 and rank.answer is None:
            rank.restart()
        elif chance < 0.035 and len(self.runs) == 1 and any(one.dead for one in self.runs[0]):
            self.runs.append([Rank(self, "B", number, 0) for number in range(RANKS)])
        elif chance < 0.06 and self.late:
            self.put_record(self.late.pop())
        else:
            rank.go()

    def end(self) -> None:
        """What is late arrives, everybody who lives goes on, and time passes."""
        while self.late:
            self.put_record(self.late.pop())
        self.now_s += 1000
        for _ in range(60):
            for rank in self.ranks:
                rank.go()
            self.now_s += 10


class Rank:
    """One rank's service: stores its shards, puts its receipt, waits for the answer. Rank 0's decides."""

    def __init__(self, model: Model, attempt: str, number: int, late_s: float) -> None:
        self.model, self.attempt, self.number, self.late_s = model, attempt, number, late_s
        self.stored, self.receipt_put, self.dead = 0, False, False
        self.answer: str | None = None
        self.ended = False
        self.deadline_s, self.wait_s = model.now_s + DEADLINE_S, model.now_s + WAIT_S
        self.fails = model.random.random() < 0.05

    def name(self, what: str) -> str:
        return f"{self.attempt}/{what}"

    def restart(self) -> None:
        """The service died, and another is given the same save."""
        if not self.ended:
            self.stored, self.receipt_put = 0, False

    def go(self) -> None:
        if self.dead or self.answer is not None:
            return
        if self.receipt_put:
            self.decide() if self.number == 0 else self.listen()
        elif not self.late_s or self.model.now_s >= self.deadline_s + self.late_s:
            self.store()

    def store(self) -> None:
        objects = self.model.objects
        if self.fails and self.stored == 1:
            objects[self.name(f"receipt-{self.number}")] = "failed"
            self.ended = True
            self.fail()
        elif self.stored < SHARDS:
            objects[self.name(f"shard-{self.number}-{self.stored}")] = 1
            self.stored += 1
        else:
            objects[self.name(f"receipt-{self.number}")] = "stored"
            self.receipt_put = True

    def listen(self) -> None:
        record = self.model.objects.get("record")
        alone = self.model.rule == "each rank has a deadline of its own"
        if record is not None:
            self.answer = "committed" if record == self.attempt else "exists"
        elif self.name("failed") in self.model.objects or (alone and self.model.now_s > self.deadline_s):
            self.fail()
        elif self.model.now_s > self.wait_s:
            self.answer = "unknown"

    def decide(self) -> None:
        objects = self.model.objects
        if self.name("failed") in objects:
            self.answer = "failed"
            return
        receipts = [objects.get(self.name(f"receipt-{rank}")) for rank in range(RANKS)]
        if "failed" in receipts or (self.model.now_s > self.deadline_s and None in receipts):
            if objects.get("record") == self.attempt:
                self.answer = "committed"  # a service that was started again had committed before
            else:
                self.mark("failed")
        elif None not in receipts:
            self.commit()

    def commit(self) -> None:
        if self.model.random.random() < 0.1:  # sent, and nobody answers
            if self.model.random.random() < 0.5:
                self.model.late.append(self.attempt)
            if self.model.rule == "a mark after an unknown put":
                self.mark("failed")
            else:
                self.answer = "unknown"
        elif self.model.put_record(self.attempt):
            self.answer = "committed"
        else:
            self.mark("exists")

    def mark(self, answer: str) -> None:
        self.model.objects[self.name("failed")] = answer
        self.fail()
        self.answer = answer

    def fail(self) -> None:
        for name in [name for name in self.model.objects if name.startswith(self.name(f"shard-{self.number}-"))]:
            del self.model.objects[name]
        self.answer = "failed"


def violations(seed: int, rule: str) -> Counter[str]:
    model, found = Model(seed, rule), Counter()
    for _ in range(STEPS):
        model.happen()
        if model.lacks_shards():
            found["a record without shards"] += 1
            break
    model.end()
    record = model.objects.get("record")
    for rank in (rank for rank in model.ranks if not rank.dead):
        found["a wait without an end"] += rank.answer is None
        found["told committed, and it is not"] += rank.answer == "committed" and record != rank.attempt
        found["told failed, and it is committed"] += rank.answer == "failed" and record == rank.attempt
    found["a record without shards"] += model.lacks_shards()
    return +found


def test_no_record_lacks_its_shards_and_every_rank_that_lives_hears_the_truth():
    for seed in range(SEEDS):
        assert not (found := violations(seed, RIGHT)), f"seed {seed}: {dict(found)}"


@pytest.mark.parametrize("rule", WRONG)
def test_the_model_notices_each_wrong_rule(rule):
    assert any(violations(seed, rule) for seed in range(SEEDS))
