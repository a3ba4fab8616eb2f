"""A signal handler may save, close and exit at any moment, or raise; `python -m tests.moments` sweeps over all of them."""

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from asyncckpt import Run, Save, Saver, errors
from tests.moments import at_moment
from tests.processes import PATIENCE_S, eventually
from tests.training import Training

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("engine", "sample"), [("service", 8), ("inline", 24)])
def test_no_moment_of_a_call_hangs_a_handler_or_loses_its_checkpoint(engine, sample):
    found = subprocess.run(
        [sys.executable, "-m", "tests.moments", "--sample", str(sample), "--seed", "1", "--engine", engine],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def moments_of(call):
    """How many a call has, counted once; then at each of some the handler comes."""
    return at_moment(0, lambda: None, call)


def test_a_handler_that_restores_in_the_middle_of_save_is_told_at_once(tmp_path):
    training = Training().step()
    told = []
    with Saver(tmp_path, engine="inline") as saver:
        saver.save(1, training.state).result(PATIENCE_S)

        def handler():
            for call in (saver.restore, saver.prepare):
                try:
                    call(training.state)
                except errors.ReentrantCallError as error:
                    told.append(str(error))

        count = moments_of(lambda: saver.save(2, training.state).result(PATIENCE_S))
        for step, number in enumerate(range(1, count, count // 8), 3):
            at_moment(number, handler, lambda step=step: saver.save(step, training.state))
            saver.wait(PATIENCE_S)
    assert len(told) > 8
    assert all("flag" in message and "next step" in message for message in told)
    assert len(Run(tmp_path).checkpoints()) == step


def test_a_handler_that_saves_in_the_middle_of_restore_is_told_at_once(tmp_path):
    training = Training().step()
    told = []
    with Saver(tmp_path, engine="inline") as saver:
        saver.save(1, training.state).result(PATIENCE_S)

        def handler():
            try:
                saver.save(2, training.state).result(PATIENCE_S)
            except errors.ReentrantCallError as error:
                told.append(str(error))

        count = moments_of(lambda: saver.restore(training.state))
        for number in range(1, count, count // 20):
            at_moment(number, handler, lambda: saver.restore(training.state))
    assert len(told) > 10
    assert all("neither the old nor the new" in message for message in told)
    assert Run(tmp_path).checkpoints()[-1].step in (1, 2)


def keep(saves, saver, step, training):
    saves.append(saver.save(step, training.state))


def test_a_save_within_a_save_takes_an_arena_for_itself_and_gives_it_up(tmp_path):
    """Both are committed, each with the values of its own moment."""
    training = Training().step()
    with Saver(tmp_path) as saver:
        saver.save(1, training.state).result(PATIENCE_S)
        for step, number in ((10, 200), (20, 400), (30, 500)):
            inner: list[Save] = []
            handler = partial(keep, inner, saver, step + 1, training)
            at_moment(number, handler, partial(saver.save, step, training.state))
            assert inner, "the handler came"
            inner[0].result(PATIENCE_S)
            saver.wait(PATIENCE_S)
            assert len(saver._launcher._arenas.all()) == 1
            training.step()
    assert [checkpoint.step for checkpoint in Run(tmp_path).checkpoints()] == [1, 10, 11, 20, 21, 30, 31]


def test_a_handler_in_the_middle_of_a_log_line_saves_and_closes(tmp_path):
    """The locks of logging are held by then, and the answers of saves are logged on another thread."""
    training = Training().step()
    saver = Saver(tmp_path, engine="inline")
    saved = []

    class Interrupted(logging.Handler):
        def emit(self, record):
            if record.name == "training":
                saver.save(1, training.state)
                saver.close()
                saved.append([checkpoint.step for checkpoint in Run(tmp_path).checkpoints()])
            else:
                saved.append(record.getMessage())

    interrupted = Interrupted()
    ours, theirs = logging.getLogger("asyncckpt"), logging.getLogger("training")
    before = ours.level
    for log in (ours, theirs):
        log.addHandler(interrupted)
        log.setLevel(logging.INFO)
    try:
        theirs.info("loss 1.0")
        eventually(lambda: len(saved) == 2, "what was said meanwhile is logged behind it")
    finally:
        ours.setLevel(before)
        for log in (ours, theirs):
            log.removeHandler(interrupted)
    assert saved[0] == [1]
    assert "committed" in saved[1]
