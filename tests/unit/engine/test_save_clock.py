"""One clock a save: when it runs, what resets it, and what a save does whose clock ran out. Time is a number here."""

from asyncckpt import errors
from asyncckpt.engine.save_clock import SaveClock
from asyncckpt.engine.schedule import GRACE_S, Schedule
from asyncckpt.events import StoreRetried
from tests.unit.engine.test_schedule import finish, job, take


def started(shards, *, retention=False):
    """A save whose check is over and whose shards are encoded and on their way; and the saves that were given up."""
    given_up = []
    schedule = Schedule(retention=retention, deadline_s=600, give_up=given_up.append)
    run = schedule.submit(job(), shards)
    check, *tasks = take(schedule)
    finish(schedule, check)
    for task in tasks:
        schedule.encoded(task.number)
    return schedule, run, tasks, given_up


def test_the_clock_begins_with_the_try_that_failed_first():
    clock = SaveClock(600)
    assert not clock.ran_out(10**9)
    clock.fails("one", 1000)
    clock.fails("two", 1300)
    assert not clock.ran_out(1599)
    assert clock.ran_out(1600)


def test_an_acknowledged_part_resets_it_whoever_sent_it():
    clock = SaveClock(600)
    clock.fails("one", 1000)
    clock.acknowledges(1500)
    assert not clock.ran_out(2099)
    assert clock.ran_out(2100)


def test_a_request_that_hung_since_before_the_last_acknowledged_part_counts_from_that_part():
    clock = SaveClock(600)
    clock.acknowledges(1030)
    clock.fails("one", 1000)
    assert not clock.ran_out(1629)


def test_it_stands_while_no_request_fails():
    clock = SaveClock(600)
    clock.fails("one", 1000)
    clock.eases("one")
    assert not clock.ran_out(10**9)
    clock.fails("one", 5000)
    assert not clock.ran_out(5599)


def test_a_save_of_many_shards_fails_once_its_one_clock_ran_out_and_nothing_of_its_queue_is_sent():
    schedule, run, tasks, given_up = started(40)
    run.clock.fails("worker", 1000)
    run.clock.last = StoreRetried("put", "a-shard", 7, 0.5, "SlowDown")
    assert schedule.look(1599) == []
    (ended,) = schedule.look(1600)
    assert isinstance(ended.error, errors.DeadlineExceededError)
    assert (ended.error.step, ended.error.key) == (10, "a-shard")
    assert "for 600 s nothing of this save could be stored" in ended.error.message
    assert "SlowDown" in ended.error.message
    assert isinstance(ended.error.__cause__, errors.TransientStoreError)
    assert given_up == [run.job]
    assert take(schedule) == [], "the removal waits for the requests that are under way"
    answers = [schedule.failed(task, errors.DeadlineExceededError("was not sent")) for task in tasks]
    assert answers == [None] * 40, "it is answered once"
    (abandon,) = take(schedule)
    assert abandon.kind == "abandon"
    finish(schedule, abandon)
    assert schedule.idle


def test_a_shard_that_is_still_read_from_the_arena_keeps_the_answer_back():
    """An encoder writes digests into the arena: whoever used it again would store them as its own."""
    schedule = Schedule(retention=False, deadline_s=600)
    run = schedule.submit(job(), 2)
    check, first, second = take(schedule)
    finish(schedule, check)
    schedule.encoded(first.number)
    run.clock.fails("worker", 1000)
    assert schedule.look(1600) == []
    assert schedule.look(1700) == []
    ended = schedule.encoded(second.number)
    assert isinstance(ended.error, errors.DeadlineExceededError)


def test_the_first_failed_shard_ends_the_others_and_the_save_is_answered_without_them():
    schedule, run, (first, second), given_up = started(2)
    ended = schedule.failed(first, errors.StoreAuthError("forbidden"))
    assert isinstance(ended.error, errors.StoreAuthError)
    assert given_up == [run.job]
    assert schedule.failed(second, errors.DeadlineExceededError("was not sent")) is None
    (abandon,) = take(schedule)
    assert abandon.kind == "abandon"


def committing():
    schedule, run, (shard,), given_up = started(1)
    finish(schedule, shard)
    (commit,) = take(schedule)
    run.clock.fails("worker", 1000)
    assert schedule.look(1600) == []
    assert given_up == [run.job]
    return schedule, commit


def test_a_commit_that_comes_home_in_time_says_itself_what_became_of_the_record():
    schedule, commit = committing()
    ended = schedule.failed(commit, errors.DeadlineExceededError("the index was not stored"))
    assert isinstance(ended.error, errors.DeadlineExceededError)
    assert [task.kind for task in take(schedule)] == ["abandon"]
    schedule, commit = committing()
    ended = schedule.failed(commit, errors.CommitUnknownError("it was sent"))
    assert isinstance(ended.error, errors.CommitUnknownError)
    assert schedule.idle, "its record may still arrive, and needs its folder"
    schedule, commit = committing()
    assert finish(schedule, commit).outcome.result == "committed"


def test_a_commit_that_hangs_is_unknown_and_nothing_of_it_is_removed():
    schedule, commit = committing()
    assert schedule.look(1600 + GRACE_S / 2) == []
    (ended,) = schedule.look(1600 + GRACE_S)
    assert isinstance(ended.error, errors.CommitUnknownError)
    assert isinstance(ended.error.__cause__, errors.DeadlineExceededError)
    assert schedule.look(2000) == []
    assert schedule.failed(commit, errors.DeadlineExceededError("late")) is None
    assert schedule.idle


def test_a_commit_that_was_thought_unknown_and_stands_is_followed_by_retention():
    schedule, run, _, _ = started(0, retention=True)
    (commit,) = [task for number in run.running for task in [schedule.tasks[number]]]
    run.clock.fails("worker", 1000)
    schedule.look(1600)
    assert len(schedule.look(1700)) == 1
    assert finish(schedule, commit) is None
    (retain,) = take(schedule)
    finish(schedule, retain)
    assert schedule.idle


def test_a_snapshot_that_is_complete_after_its_save_was_given_up_is_not_taken():
    schedule = Schedule(retention=False, deadline_s=600)
    run = schedule.submit(job(), 2, staged=False)
    check, *_ = take(schedule)
    run.clock.fails("worker", 1000)
    assert len(schedule.look(1600)) == 1
    assert not schedule.staged(1)
    schedule.failed(check, errors.DeadlineExceededError("late"))
    finish(schedule, *take(schedule))
    assert schedule.idle
