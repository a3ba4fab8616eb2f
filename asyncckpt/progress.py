"""A progress bar on a terminal, once something takes longer than a second."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from asyncckpt import events
from asyncckpt.save import Ledger

_DELAY_S = 1.0


def bar(total_bytes: int, what: str) -> "tqdm[Any]":
    """A byte-counting bar on stderr; shows nothing where stderr is no terminal."""
    return tqdm(
        total=total_bytes,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=_DELAY_S,
        disable=not sys.stderr.isatty(),
        leave=False,
    )


@contextlib.contextmanager
def saving(ledger: Ledger, hooks: events.Hooks) -> Iterator[None]:
    """Show the shards of the saves in flight as they are stored."""
    if not ledger.in_flight or not sys.stderr.isatty():
        yield
        return
    with tqdm(desc="saving", unit="shard", delay=_DELAY_S, leave=False) as shown:

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
