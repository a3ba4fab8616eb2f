"""What an engine's event tells a person: a warning, once for each cause, before the hooks hear of it."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from asyncckpt import errors, events
from asyncckpt.store.away import Outage, line
from asyncckpt.telling import say


class News:
    """What one Saver told already.

    Args:
        url: The store's, for people.
        meanwhile: What training does while the store is away.
        in_flight: How many saves have no answer yet.
    """

    def __init__(self, url: str, *, meanwhile: Callable[[], str], in_flight: Callable[[], int]) -> None:
        self._url = url
        self._meanwhile = meanwhile
        self._in_flight = in_flight
        self._outage = Outage()
        self._foreign: set[int] = set()
        self._causes: set[tuple[type, type, tuple[int, ...]]] = set()

    def told(self, event: events.Event) -> events.Event | None:
        """Warn of it if a person should know; the event as hooks shall hear it, None if they have."""
        if isinstance(event, events.ForeignCheckpoints):
            return self._told_foreign(event)
        if isinstance(event, events.RetentionFailed | events.LeftoversRemain) and self._is_new_cause(event):
            say(logging.WARNING, "%s", events.warning_of(event))
        elif isinstance(event, events.StoreAway | events.StoreBack):
            if not self._outage.is_news(event, time.monotonic()):
                return None
            if isinstance(event, events.StoreAway):
                event = replace(event, saves_in_flight=self._in_flight())
            say(logging.WARNING, "%s", line(self._url, event, self._meanwhile()))
        elif isinstance(event, events.ShardStored):
            self._outage.answered(time.monotonic())
        return event

    def _is_new_cause(self, event: events.RetentionFailed | events.LeftoversRemain) -> bool:
        """Once for each kind of a store's failure, and once for each record that cannot be read."""
        steps = event.steps if isinstance(event, events.RetentionFailed) else ()
        cause = (type(event), type(event.error), () if isinstance(event.error, errors.StoreError) else steps)
        is_new = cause not in self._causes
        self._causes.add(cause)
        return is_new

    def _told_foreign(self, event: events.ForeignCheckpoints) -> events.ForeignCheckpoints | None:
        """Of those alone of which no other worker told before."""
        steps = tuple(step for step in event.steps if step not in self._foreign)
        self._foreign.update(steps)
        if not steps:
            return None
        say(
            logging.WARNING,
            "retention leaves checkpoints of another run alone, at step(s) %s: this run did not restore them. "
            "Delete them by hand, or with Run(url).rewind(step), if nobody needs them",
            ", ".join(map(str, steps)),
        )
        return events.ForeignCheckpoints(steps)
