"""The schedule, driven through every order in which its tasks can end."""

from asyncckpt import errors
from asyncckpt.engine.job import CommitOutcome, SaveJob, ShardReceipt
from asyncckpt.engine.schedule import MAX_DEATHS, MAX_LOST_UPLOADS, Schedule


def job(number=1, step=10, **fields):
    return SaveJob(number, step, f"run-{number}", structure=1, arena=number, codec="planes", time_s=0.0, **fields)


def receipt(shard):
    return ShardReceipt(shard, f"key-{shard}", 1, 1, (), 0.0, 0.0).to_json()


def take(schedule, *, encoder_free=True):
    """Every task that may start now."""
    found = []
    while (task := schedule.next(encoder_free=encoder_free)) is not None:
        found.append(task)
    return found


def finish(schedule, task, *, exists=False, result="committed"):
    results = {
        "check": {"exists": exists},
        "shard": receipt(task.shard),
        "commit": CommitOutcome(result).to_json(),
        "abandon": {},
        "retain": {"removed": []},
        "collect": {},
    }
    return schedule.done(task, results[task.kind])


class Walk:
    """One way through a save, along a list of choices; what could have been chosen at each point is remembered."""

    def __init__(self, choices, *, shards, retention, collection=False, staged=True, harm=2):
        self.choices = choices
        self.branches = []
        self.schedule = Schedule(retention=retention, collection=collection)
        self.run = self.schedule.submit(job(), shards, staged=staged)
        self.copying = not staged
        self.running = []
        self.ended = []
        self.kinds = []
        self.harm = harm  # so many tasks may fail or lose their worker

    def go(self):
        for position in range(60):
            self.running += take(self.schedule)
            if self.schedule.idle:
                assert not self.running
                return self
            assert not any(task.kind == "shard" and task.shard >= self.run.filled for task in self.running)
            options = self.options()
            self.branches.append(len(options))
            choice = self.choices[position] if position < len(self.choices) else 0
            self.follow(*options[choice])
        raise AssertionError("the save does not come to an end")

    def options(self):
        found = []
        if self.copying:
            found += [(None, "staged"), (None, "withdrawn")]
            found += [(None, "filled")] if self.run.filled < self.run.shards else []
        for task in self.running:
            if task.kind == "check":
                found += [(task, "free"), (task, "taken")]
            elif task.kind == "commit":
                found += [(task, "done"), (task, "lost a race")]
            else:
                found.append((task, "done"))
            if self.harm:
                found += [(task, "failed"), (task, "worker died")]
                found += [(task, "nobody knows")] if task.kind == "commit" else []
                found += [(task, "lost its upload")] if task.kind == "shard" else []
        return found

    def follow(self, task, what):
        if task is None:
            self.snapshot(what)
            return
        self.running.remove(task)
        if what in ("done", "free"):
            ended = finish(self.schedule, task)
        elif what == "taken":
            ended = finish(self.schedule, task, exists=True)
        elif what == "lost a race":
            ended = finish(self.schedule, task, result="exists")
        else:
            self.harm -= 1
            if what == "worker died":
                ended = self.schedule.lost(task, "was killed")
            else:
                kinds = {"failed": errors.StoreError, "lost its upload": errors.UploadLostError}
                ended = self.schedule.failed(task, kinds.get(what, errors.CommitUnknownError)("no"))
        self.kinds.append((task.kind, what))
        self.answer(ended)

    def snapshot(self, what):
        self.kinds.append(("snapshot", what))
        if what == "filled":
            known = self.schedule.runs.get(1) is self.run
            assert self.schedule.filled(1, self.run.filled + 1) or not known
            self.run.filled += not known
            return
        self.copying = False
        if what == "withdrawn":
            self.answer(self.schedule.withdraw(1))
        else:
            assert self.schedule.staged(1) == (not self.ended)

    def answer(self, ended):
        if ended is not None:
            busy = [other.kind for other in self.running if other.kind in ("shard", "commit")]
            assert not busy, f"the arena may be written again while {busy} still read it"
            self.ended.append(ended)


def every_walk(**options):
    """All ways, by counting up the choices."""
    choices = []
    while True:
        walk = Walk(choices, **options).go()
        yield walk
        choices = [*choices, *[0] * (len(walk.branches) - len(choices))]
        while choices and choices[-1] + 1 == walk.branches[len(choices) - 1]:
            choices.pop()
        if not choices:
            return
        choices[-1] += 1


def check_walk(walk, *, retention):
    assert len(walk.ended) == 1, f"{len(walk.ended)} answers after {walk.kinds}"
    ended = walk.ended[0]
    assert (ended.outcome is None) != (ended.error is None), walk.kinds
    committed = ("commit", "done") in walk.kinds
    if committed and ("snapshot", "staged") in walk.kinds:
        assert walk.kinds.index(("snapshot", "staged")) < walk.kinds.index(("commit", "done"))
    assert not (committed and ("snapshot", "withdrawn") in walk.kinds)
    if ended.outcome is not None and ended.outcome.result == "committed":
        assert committed
        assert "abandon" not in [kind for kind, _ in walk.kinds], "what is committed is never taken away"
        assert ("retain" in [kind for kind, _ in walk.kinds]) == retention
        return
    assert not committed, f"a committed save was answered with {ended}: {walk.kinds}"
    again = ("worker died", "lost its upload")
    kinds = [kind for kind, what in walk.kinds if what not in again and kind != "snapshot"]
    if {("commit", "worker died"), ("commit", "nobody knows")} & set(walk.kinds):
        assert "abandon" not in kinds, f"the record may still arrive, and needs its folder: {walk.kinds}"
    else:
        assert kinds[-1] == "abandon", walk.kinds
        assert kinds.count("abandon") == 1
    whats = [what for _, what in walk.kinds]
    if isinstance(ended.error, errors.SnapshotError):
        assert "withdrawn" in whats
    elif isinstance(ended.error, errors.CommitUnknownError):
        assert "nobody knows" in whats
    elif ended.error is not None:
        assert isinstance(ended.error, errors.StoreError)
        assert "failed" in whats


def test_every_order_of_two_shards_ends_in_one_answer_and_leaves_nothing():
    ways = 0
    for walk in every_walk(shards=2, retention=False):
        check_walk(walk, retention=False)
        ways += 1
    assert ways > 1000


def test_every_order_of_a_save_whose_snapshot_is_still_being_taken_ends_in_one_answer():
    ways = 0
    for shards in (0, 1, 2):
        for walk in every_walk(shards=shards, retention=False, staged=False, harm=1):
            check_walk(walk, retention=False)
            ways += 1
    assert ways > 1000


def test_every_order_with_retention_ends_in_one_answer():
    for walk in every_walk(shards=1, retention=True):
        check_walk(walk, retention=True)


def test_every_order_of_a_save_without_tensors_ends_in_one_answer():
    for walk in every_walk(shards=0, retention=True):
        check_walk(walk, retention=True)


def test_a_check_that_fails_after_the_commit_changes_nothing():
    schedule = Schedule(retention=True)
    run = schedule.submit(job(), 0)
    check, commit = take(schedule)
    assert (check.kind, commit.kind) == ("check", "commit")
    assert finish(schedule, commit).outcome.result == "committed"
    assert schedule.failed(check, errors.StoreError("late")) is None
    (retain,) = take(schedule)
    assert retain.kind == "retain"
    assert finish(schedule, retain) is None
    assert schedule.idle
    assert run.error is None


def test_the_check_comes_first_and_needs_no_encoder():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 3)
    assert [task.kind for task in take(schedule, encoder_free=False)] == ["check"]
    assert [task.shard for task in take(schedule)] == [0, 1, 2]


def test_the_oldest_save_goes_first_and_a_younger_one_fills_the_gaps():
    schedule = Schedule(retention=False)
    schedule.submit(job(1), 1)
    schedule.submit(job(2, step=20), 1)
    started = take(schedule)
    assert [(task.run.job.number, task.kind) for task in started] == [
        (1, "check"),
        (1, "shard"),
        (2, "check"),
        (2, "shard"),
    ]
    ended = [finish(schedule, task) for task in reversed(started)]
    assert ended == [None] * 4
    commits = take(schedule)
    assert [(task.run.job.number, task.kind) for task in commits] == [(1, "commit"), (2, "commit")]
    assert finish(schedule, commits[1]).run.job.number == 2  # each is answered when it is committed itself
    assert finish(schedule, commits[0]).run.job.number == 1
    assert schedule.idle


def test_one_failed_save_does_not_touch_the_other():
    schedule = Schedule(retention=False)
    schedule.submit(job(1), 1)
    schedule.submit(job(2, step=20), 1)
    tasks = take(schedule)
    for task in tasks:
        if task.run.job.number == 1 and task.kind == "shard":
            schedule.failed(task, errors.DiskFullError("full"))
        else:
            finish(schedule, task)
    ended = [finish(schedule, task) for task in take(schedule)]
    outcomes = {answer.run.job.number: answer.outcome for answer in ended if answer is not None}
    assert outcomes[2].result == "committed"
    assert schedule.idle


def test_a_task_that_kills_every_worker_fails_its_save_with_its_own_error():
    schedule = Schedule(retention=False)
    run = schedule.submit(job(), 1)
    check, shard = take(schedule)
    finish(schedule, check)
    for death in range(1, MAX_DEATHS):
        assert schedule.lost(shard, "died") is None
        assert take(schedule) == [shard], f"not tried again after death {death}"
    ended = schedule.lost(shard, "died")
    assert isinstance(ended.error, errors.WorkerDiedError)
    assert ended.error.step == run.job.step
    assert [task.kind for task in take(schedule)] == ["abandon"]


def test_a_shard_whose_upload_is_lost_again_and_again_fails_its_save():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 1)
    tasks = take(schedule)
    finish(schedule, tasks[0])
    for number in range(MAX_LOST_UPLOADS + 1):
        task = tasks[-1] if number == 0 else take(schedule)[0]
        ended = schedule.failed(task, errors.UploadLostError("no such upload"))
        assert ended is None or number == MAX_LOST_UPLOADS
    assert isinstance(ended.error, errors.UploadLostError)
    assert ended.run.retries == MAX_LOST_UPLOADS


def test_a_commit_that_kills_every_worker_may_still_appear_and_nothing_of_it_is_removed():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    for _ in range(1, MAX_DEATHS):
        assert schedule.lost(commit, "died") is None
        assert take(schedule) == [commit]
    ended = schedule.lost(commit, "died")
    assert isinstance(ended.error, errors.CommitUnknownError)
    assert isinstance(ended.error.__cause__, errors.WorkerDiedError)
    assert schedule.idle


def test_a_lost_race_whose_record_may_still_arrive_leaves_its_folder():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    ended = schedule.done(commit, CommitOutcome("exists", may_appear=True).to_json())
    assert ended.outcome.result == "exists"
    assert schedule.idle


def test_a_removal_that_kills_every_worker_is_given_up():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    assert schedule.failed(commit, errors.StoreError("no")).error is not None
    for _ in range(MAX_DEATHS):
        (abandon,) = take(schedule)
        assert schedule.lost(abandon, "died") is None
    assert schedule.idle


def test_the_first_error_is_the_one_that_is_told():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 2)
    check, first, second = take(schedule)
    finish(schedule, check)
    assert schedule.failed(second, errors.StoreAuthError("forbidden")) is None
    ended = schedule.failed(first, errors.DiskFullError("full"))
    assert isinstance(ended.error, errors.StoreAuthError)


def test_a_shard_that_fails_after_the_step_was_found_taken_is_no_failure():
    schedule = Schedule(retention=False)
    schedule.submit(job(), 1)
    check, shard = take(schedule)
    assert finish(schedule, check, exists=True) is None
    ended = schedule.failed(shard, errors.DiskFullError("full"))
    assert ended.error is None
    assert ended.outcome.result == "exists"


def test_retries_are_counted_into_the_outcome():
    schedule = Schedule(retention=False)
    run = schedule.submit(job(), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    run.retries = 3
    assert finish(schedule, commit).outcome.retries == 3


def test_no_task_is_remembered_after_the_end():
    for walk in every_walk(shards=1, retention=True):
        assert walk.schedule.tasks == {}, walk.kinds


def test_a_save_below_what_may_be_another_runs_commits_only_when_its_check_found_nothing():
    schedule = Schedule(retention=False)
    schedule.submit(job(newcomer=True), shards=1)
    check, shard = take(schedule)
    finish(schedule, shard)
    assert take(schedule) == [], "the check waits for a slow store, and the shard did not"
    finish(schedule, check)
    (commit,) = take(schedule)
    assert commit.kind == "commit"


def test_a_check_that_finds_another_run_late_ends_the_save_before_its_commit():
    schedule = Schedule(retention=False)
    schedule.submit(job(newcomer=True), shards=1)
    check, shard = take(schedule)
    finish(schedule, shard)
    schedule.failed(check, errors.CheckpointConflictError("another run's"))
    (abandon,) = take(schedule)
    assert abandon.kind == "abandon"


def test_an_ordinary_commit_does_not_wait_for_a_slow_check():
    schedule = Schedule(retention=False)
    schedule.submit(job(), shards=1)
    _, shard = take(schedule)
    finish(schedule, shard)
    (commit,) = take(schedule)
    assert commit.kind == "commit"


def kinds_after_commit(schedule, number):
    """What follows a save that commits at once."""
    schedule.submit(job(number, step=number), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    assert finish(schedule, commit).outcome.result == "committed"
    tasks = take(schedule)
    for task in tasks:
        assert finish(schedule, task) is None
    assert schedule.idle
    return [task.kind for task in tasks]


def test_leftovers_are_collected_behind_the_first_commit_and_behind_the_first_one_after_a_death():
    schedule = Schedule(retention=True, collection=True)
    assert kinds_after_commit(schedule, 1) == ["retain", "collect"]
    assert kinds_after_commit(schedule, 2) == ["retain"]
    schedule.submit(job(3, step=3), 1)
    check, shard = take(schedule)
    assert schedule.lost(shard, "was killed") is None
    finish(schedule, check)
    (shard,) = take(schedule)
    finish(schedule, shard)
    (commit,) = take(schedule)
    finish(schedule, commit)
    retain, collect = take(schedule)
    assert (retain.kind, collect.kind) == ("retain", "collect")
    for _ in range(MAX_DEATHS):
        assert schedule.lost(collect, "was killed") is None
        take(schedule)
    finish(schedule, retain)
    assert schedule.idle
    assert kinds_after_commit(schedule, 4) == ["retain"], "a collection that kills its workers is not begun again"


def test_a_collection_that_fails_fails_no_save():
    schedule = Schedule(retention=False, collection=True)
    schedule.submit(job(), 0)
    check, commit = take(schedule)
    finish(schedule, check)
    assert finish(schedule, commit).outcome.result == "committed"
    (collect,) = take(schedule)
    assert schedule.failed(collect, errors.StoreAuthError("no")) is None
    assert schedule.idle


def test_every_order_with_a_collection_ends_in_one_answer():
    for walk in every_walk(shards=1, retention=True, collection=True, harm=1):
        check_walk(walk, retention=True)
