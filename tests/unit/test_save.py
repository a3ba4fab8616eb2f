"""The handle of a save and the ledger of all of them: who is told what, and when."""

import threading
import time
import warnings

import pytest

from asyncckpt import errors, events
from asyncckpt.events import Hooks, SaveReport
from asyncckpt.save import Ledger

PATIENCE_S = 15.0


@pytest.fixture
def seen():
    return []


@pytest.fixture
def ledger(seen):
    return Ledger(Hooks((seen.append,)), max_failed_saves=None)


def opened(ledger, step):
    save = ledger.new(step, time.perf_counter())
    ledger.open(save)
    return save


def fail(ledger, save, text="broken"):
    ledger.conclude(save, None, errors.StoreError(text))


def succeed(ledger, save):
    ledger.conclude(save, SaveReport(save.step), None)


def test_result_gives_the_report(ledger, seen):
    save = opened(ledger, 1)
    assert not save.done()
    succeed(ledger, save)
    assert save.done()
    assert save.result() == SaveReport(1)
    assert seen == [events.SaveCommitted(SaveReport(1))]


def test_a_timeout_of_result_and_wait_raises_and_the_save_goes_on(ledger):
    save = opened(ledger, 7)
    for wait in (save.result, ledger.wait, save.wait_staged):
        with pytest.raises(TimeoutError, match="step 7"):
            wait(0.001)
    succeed(ledger, save)
    ledger.wait(None)
    assert save.result(0).step == 7


def test_result_raises_the_saves_own_error_each_time(ledger, seen):
    save = opened(ledger, 3)
    fail(ledger, save)
    for _ in range(2):
        with pytest.raises(errors.StoreError) as raised:
            save.result()
        assert raised.value.step == 3
    assert isinstance(seen[0], events.SaveFailed)
    assert seen[0].step == 3


def test_wait_raises_each_failure_once_and_names_all(ledger):
    for step in (1, 2, 3):
        save = opened(ledger, step)
        fail(ledger, save) if step != 2 else succeed(ledger, save)
    with pytest.raises(errors.SaveFailedError) as raised:
        ledger.wait(None)
    assert list(raised.value.failures) == [1, 3]
    assert isinstance(raised.value.__cause__, errors.StoreError)
    ledger.wait(None)


def test_a_failure_that_result_raised_is_not_raised_again_by_wait(ledger):
    save = opened(ledger, 1)
    fail(ledger, save)
    with pytest.raises(errors.StoreError):
        save.result()
    ledger.wait(None)


def test_whoever_waits_while_a_save_fails_is_told(ledger):
    """The failure is in the ledger before the waiter wakes, however slow logging and hooks are."""
    for step in range(200):
        save = opened(ledger, step)
        told = []

        def wait(told=told):
            try:
                ledger.wait(PATIENCE_S)
            except errors.SaveFailedError as error:
                told += error.failures

        thread = threading.Thread(target=wait)
        thread.start()
        fail(ledger, save)
        thread.join()
        assert told == [step]


def test_the_next_save_warns_of_a_failure_and_wait_still_raises_it(ledger):
    fail(ledger, opened(ledger, 1), "the disk is full")
    with pytest.warns(RuntimeWarning, match="step 1 failed: StoreError: the disk is full"):
        ledger.report_earlier(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.report_earlier(3)
    with pytest.raises(errors.SaveFailedError):
        ledger.wait(None)


def test_a_failure_that_was_raised_is_not_warned_of(ledger):
    save = opened(ledger, 1)
    fail(ledger, save)
    with pytest.raises(errors.StoreError):
        save.result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.report_earlier(2)


def test_a_skip_is_counted_told_and_warned_of_also_when_another_save_failed(ledger, seen):
    ledger.conclude(opened(ledger, 1), SaveReport(1, skipped="the step exists already"), None)
    fail(ledger, opened(ledger, 2))
    with pytest.raises(errors.SaveFailedError):
        ledger.wait(None)
    assert ledger.skipped_saves == 1
    assert events.SaveSkipped(1, "the step exists already") in seen
    with pytest.warns(RuntimeWarning, match="step 1 was skipped: the step exists already"):
        ledger.report_earlier(3)


def test_the_nth_failure_in_a_row_raises_and_the_count_begins_anew():
    ledger = Ledger(Hooks(), max_failed_saves=2)
    fail(ledger, opened(ledger, 1))
    with pytest.warns(RuntimeWarning, match="step 1 failed"):
        ledger.report_earlier(2)
    fail(ledger, opened(ledger, 2))
    with pytest.raises(errors.SaveFailedError) as raised:
        ledger.report_earlier(3)
    assert list(raised.value.failures) == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.report_earlier(4)  # a loop that catches it may try again


def test_the_nth_failure_in_a_row_raises_also_when_all_were_raised_before():
    ledger = Ledger(Hooks(), max_failed_saves=1)
    save = opened(ledger, 1)
    fail(ledger, save)
    with pytest.raises(errors.StoreError):
        save.result()
    with pytest.raises(errors.CheckpointError, match="max_failed_saves"):
        ledger.report_earlier(2)


def test_a_success_between_failures_resets_the_count():
    ledger = Ledger(Hooks(), max_failed_saves=2)
    fail(ledger, opened(ledger, 1))
    succeed(ledger, opened(ledger, 2))
    fail(ledger, opened(ledger, 3))
    with pytest.warns(RuntimeWarning):
        ledger.report_earlier(4)


def test_wait_staged_does_not_raise_what_happened_to_a_complete_snapshot(ledger):
    """The store may fail before the loop asks; that is no reason to stop training."""
    save = opened(ledger, 1)
    save._staged.set()
    fail(ledger, save)
    save.wait_staged(0)
    with pytest.raises(errors.SaveFailedError):
        ledger.wait(None)


def test_wait_staged_raises_why_the_snapshot_failed(ledger):
    save = opened(ledger, 1)
    ledger.conclude(save, None, errors.TornSnapshotError("somebody wrote", key="model/weight"))
    with pytest.raises(errors.TornSnapshotError):
        save.wait_staged(PATIENCE_S)


def test_a_hook_that_fails_does_not_harm_the_save(seen, caplog):
    def broken(event):
        raise RuntimeError("hook")

    ledger = Ledger(Hooks((broken, seen.append)), None)
    save = opened(ledger, 1)
    succeed(ledger, save)
    assert save.result(0).step == 1
    assert len(seen) == 1
    assert "a hook failed" in caplog.text


def test_a_save_that_never_started_is_nobodys_failure(ledger):
    save = opened(ledger, 1)
    ledger.forget(save, errors.UnsupportedTensorError("meta"))
    assert ledger.in_flight == []
    ledger.wait(None)
    assert save.done()


def test_one_line_is_logged_for_every_save(ledger, caplog):
    caplog.set_level("INFO", logger="asyncckpt")
    succeed(ledger, opened(ledger, 1))
    fail(ledger, opened(ledger, 2))
    ledger.conclude(opened(ledger, 3), SaveReport(3, skipped="why"), None)
    assert [(record.levelname, record.message.split(":")[0]) for record in caplog.records] == [
        ("INFO", "step 1"),
        ("ERROR", "step 2"),
        ("WARNING", "step 3"),
    ]


def test_the_handle_says_how_it_stands(ledger):
    save = opened(ledger, 5)
    assert repr(save) == "<Save step=5 in flight>"
    fail(ledger, save)
    assert repr(save) == "<Save step=5 failed>"
