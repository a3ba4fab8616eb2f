"""Whatever stands in for stderr, a save is waited for and a checkpoint restored: a bar or a line that cannot be shown is no failure."""

import io
import logging
import sys
import threading
import warnings
from contextlib import redirect_stderr

import pytest
import torch

import asyncckpt
from asyncckpt import Saver, errors, events
from asyncckpt.format import keys
from asyncckpt.progress import bar, saving
from asyncckpt.store.memory import MemoryStore
from asyncckpt.telling import LOG, warn
from tests.processes import PATIENCE_S


class Terminal(io.StringIO):
    """Says that it is one."""

    encoding = "utf-8"

    def isatty(self):
        return True


class Tee:
    """What scripts put in place of stderr to log it, too."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        self.file.write(text)

    def flush(self):
        self.file.flush()


class Broken(Terminal):
    """A terminal that fails at everything but being one."""

    error: type[Exception] = RuntimeError

    def write(self, text):
        raise self.error("cannot write")

    def flush(self):
        raise self.error("cannot flush")

    def fileno(self):
        raise self.error("no descriptor")

    @property
    def encoding(self):
        raise self.error("no encoding")


class Full(Broken):
    error = OSError


class Unanswering(Terminal):
    def isatty(self):
        raise RuntimeError("who asks?")


class Narrow(Terminal):
    """A console that has few characters."""

    encoding = "cp1252"

    def write(self, text):
        text.encode(self.encoding)
        return super().write(text)


def closed():
    file = Terminal()
    file.close()
    return file


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "tee": lambda: Tee(io.StringIO()),
    "broken": Broken,
    "full": Full,
    "unanswering": Unanswering,
    "narrow": Narrow,
}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS)
def stderr(request):
    with redirect_stderr(request.param()) as stream:
        yield stream


def test_a_save_is_waited_for_and_restored_whatever_stderr_is(stderr):
    store, state = MemoryStore(), {"t": torch.zeros(3)}
    with Saver("memory://", store=store) as saver:
        saver.save(1, {"t": torch.ones(3)})
        saver.wait()
        assert saver.restore(state).step == 1
        saver.save(2, {"t": torch.full((3,), 2.0)})
    assert state["t"].tolist() == [1, 1, 1]
    assert asyncckpt.restore("memory://", state, store=store).step == 2
    assert asyncckpt.load("memory://", store=store)["t"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", ["none", "closed", "tee"])
def test_the_service_saves_whatever_stderr_is(kind, tmp_path):
    with redirect_stderr(STREAMS[kind]()):
        saver = Saver(tmp_path, engine="service")
        saver.save(1, {"t": torch.ones(3)})
        saver.wait()
        saver.save(2, {"t": torch.ones(3)})
        saver.close()
    assert [checkpoint.step for checkpoint in asyncckpt.Run(tmp_path).checkpoints()] == [1, 2]


def test_a_bar_that_cannot_be_shown_raises_nothing_and_holds_no_lock(stderr):
    with bar(100, "restoring", delay_s=0) as shown:
        for _ in range(100):
            shown.update(1)
            shown.refresh()
    other = threading.Thread(target=lambda: bar(1, "another thread's").close(), daemon=True)
    other.start()
    other.join(PATIENCE_S)
    assert not other.is_alive()


def test_a_stderr_that_is_swapped_or_closed_midway_raises_nothing():
    terminal = Terminal()
    with redirect_stderr(terminal), bar(100, "restoring", delay_s=0) as shown:
        shown.update(1)
        with redirect_stderr(None):
            shown.refresh()
        terminal.close()
        shown.refresh()


def test_a_terminal_shows_the_bar_and_no_thread_stays():
    before = set(threading.enumerate())
    with redirect_stderr(Terminal()) as terminal, bar(0, "restoring step 7", delay_s=0) as shown:
        shown.total = 100
        shown.update(50)
        shown.refresh()
        assert "restoring step 7:  50%" in terminal.getvalue()
    assert set(threading.enumerate()) <= before


class Flight:
    in_flight = ("a save",)


@pytest.mark.parametrize("kind", [Terminal, Broken, Narrow])
def test_the_shards_of_saves_in_flight_are_counted_on_a_terminal(kind, caplog):
    hooks = events.Hooks()
    with redirect_stderr(kind()) as terminal, saving(Flight(), hooks, delay_s=0):
        hooks(events.ShardStored(3, "key", 10, 10, 1, 4))
        shown = terminal.getvalue()
    assert ("saving step 3:  25%" in shown) == (kind is not Broken)
    assert hooks.hooks == ()
    assert not caplog.records


def damaged():
    """A store whose latest checkpoint cannot be read."""
    store = MemoryStore()
    with Saver("memory://", store=store) as saver:
        for step in (1, 2):
            saver.save(step, {"t": torch.full((3,), float(step))})
            saver.wait()
    folder = keys.folder(2, "x")[:-2]
    store.delete([entry.key for entry in store.list(folder) if "index" in entry.key])
    return store


def shown_as_usual(text, category, filename, lineno, *_):
    if sys.stderr is not None:  # as Python's own does
        sys.stderr.write(warnings.formatwarning(text, category, filename, lineno))


def test_a_warning_that_cannot_be_shown_does_not_fail_the_restore_that_it_tells_of(stderr, monkeypatch):
    store, state = damaged(), {"t": torch.zeros(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown_as_usual)
        assert asyncckpt.restore("memory://", state, store=store).step == 1
    assert state["t"].tolist() == [1, 1, 1]


def test_a_warning_that_cannot_be_shown_is_logged(monkeypatch, caplog):
    with redirect_stderr(closed()), warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", shown_as_usual)
        warn("look here")
    assert [record.getMessage() for record in caplog.records] == ["look here"]


def test_a_user_who_makes_errors_of_warnings_gets_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="look here"):
            warn("look here")


class Raising(logging.Handler):
    """What a replaced logging may do."""

    def emit(self, record):
        raise RuntimeError("not configured")


def test_a_handler_that_raises_does_not_fail_the_save_that_it_logs():
    class Refusing(MemoryStore):
        def put(self, key, data, *, if_absent=False):
            raise errors.StoreAuthError("no")

    handler = Raising()
    LOG.addHandler(handler)
    try:
        saver = Saver("memory://", store=Refusing())
        saver.save(1, {"t": torch.ones(3)})
        with pytest.raises(errors.SaveFailedError, match="StoreAuthError: no"):
            saver.wait(10)
        saver.close()
        with Saver("memory://", store=MemoryStore()) as saver:
            assert saver.restore({"t": torch.ones(3)}) is None
            for _ in range(2):
                saver.save(1, {"t": torch.ones(3)})
                saver.wait(10)
    finally:
        LOG.removeHandler(handler)
