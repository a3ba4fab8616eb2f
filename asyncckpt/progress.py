"""A progress bar on a terminal, once something takes longer than a second."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from asyncckpt import events
from asyncckpt.save import Ledger

_DELAY_S = 1.0


def bar(total_bytes: int, what: str, *, delay_s: float = _DELAY_S) -> "tqdm[Any]":
    """A byte-counting bar on stderr; shows nothing where stderr is no terminal, and never raises."""
    return _bar(total=total_bytes, desc=what, unit="B", unit_scale=True, delay=delay_s)


@contextlib.contextmanager
def saving(ledger: Ledger, hooks: events.Hooks, *, delay_s: float = _DELAY_S) -> Iterator[None]:
    """Show the shards of the saves in flight as they are stored."""
    if not ledger.in_flight or _terminal() is None:
        yield
        return
    with _bar(desc="saving", unit="shard", delay=delay_s) as shown:

        def on_event(event: events.Event) -> None:
            if isinstance(event, events.ShardStored):
                shown.total = event.shards
                shown.desc = f"saving step {event.step}"
                shown.n = event.shards_done
                shown.refresh()

        hooks.hooks = (*hooks.hooks, on_event)
        try:
            yield
        finally:
            hooks.hooks = tuple(hook for hook in hooks.hooks if hook is not on_event)


class _Bar(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread that outlives the bar


def _bar(**options: Any) -> "tqdm[Any]":
    terminal = _terminal()
    return _Bar(file=_Screen(terminal), disable=terminal is None, dynamic_ncols=True, leave=False, **options)


def _terminal() -> Any:
    """Stderr if it says that it is a terminal. Scripts put objects of their own there, close it, or run without one."""
    try:
        return sys.stderr if sys.stderr.isatty() else None
    except Exception:  # noqa: BLE001 - of somebody else's object
        return None


class _Screen:
    """What tqdm writes to. A terminal that fails must not fail a restore, nor leave tqdm's lock held."""

    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal
        self.encoding = None
        with contextlib.suppress(Exception):
            self.encoding = terminal.encoding

    def write(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._terminal.write(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self._terminal.flush()

    def fileno(self) -> int:
        return int(self._terminal.fileno())  # tqdm asks it for the width, and does without
