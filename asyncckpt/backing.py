"""What a Saver stands on: its store, opened as it is needed, and its engine.

Nothing here leads back to the Saver, so that one which nobody holds any more can be told from one that is used.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace

from asyncckpt import events
from asyncckpt.engine.client import ServiceEngine
from asyncckpt.engine.inline import InlineEngine
from asyncckpt.engine.spawn import EngineOptions, choose_engine, say_in_process
from asyncckpt.engine.submitted import Listener
from asyncckpt.engine.wire import REFUSED
from asyncckpt.options import EngineName, KeepRule, RetryPolicy, S3Options
from asyncckpt.restore import reading_waits
from asyncckpt.store.base import Store
from asyncckpt.store.opening import open_store
from asyncckpt.store.retry import RetryingStore


class Backing:
    """`engine_name`: which engine there is, or will be. `listener`: who hears of a store that is away."""

    def __init__(
        self,
        url: str,
        store: S3Options | Store | None,
        keep: tuple[KeepRule, ...],
        hooks: events.Hooks,
        engine: EngineName | None,
    ) -> None:
        self._url = url
        self._custom = store if isinstance(store, Store) else None
        self.s3 = store if isinstance(store, S3Options) else None
        self._keep = keep
        self._hooks = hooks
        self._chosen = engine
        self._inline: InlineEngine | None = None
        self.listener: Listener | None = None
        self.engine_name = choose_engine(url, engine, in_process=self._custom is not None)
        self.store = self._custom or open_store(url, self.s3, on_retry=self._retried, on_away=self._away)

    def make(
        self, options: EngineOptions, listener: Listener, next_attempt: Callable[[], str]
    ) -> ServiceEngine | InlineEngine:
        """The engine; it is not started."""
        if self.engine_name == "service":
            return ServiceEngine(options, listener, next_attempt)
        clock = self.store.clock if isinstance(self.store, RetryingStore) else time.monotonic
        self._inline = InlineEngine(
            self.store, self._keep, listener, retry=self.retry, closes_store=self._custom is None, clock=clock
        )
        return self._inline

    @property
    def retry(self) -> RetryPolicy:
        """How long saves are tried; a store of the user's own that retries says so itself."""
        if isinstance(self._custom, RetryingStore):
            return self._custom.policy
        return (self.s3 or S3Options()).retry

    def falls_back(self, error: OSError) -> bool:
        """Whether the next engine is threads of this process: the kernel refuses what a service needs, and nobody asked for one."""
        if self.engine_name != "service" or error.errno not in REFUSED or self._chosen is not None:
            return False
        say_in_process(f"the checkpoint service could not be started: {error.strerror}")
        self.engine_name = "inline"
        return True

    def opened_to_look(self) -> AbstractContextManager[Store]:
        """A store for the look before the first save: one that is away must not be asked for ten minutes."""
        if self._custom is not None:
            return nullcontext(self._custom)
        options = self.s3
        if self._url.startswith("s3:"):
            options = options or S3Options()
            retry = replace(options.retry, deadline_s=min(options.retry.deadline_s, options.retry.first_contact_s))
            options = replace(options, retry=retry)
        return closing(open_store(self._url, options, on_retry=self._hooks, on_away=self._told))

    def close(self) -> None:
        """Close the store, unless it is the user's own, or the in-process engine's, which may need it for longer."""
        if self._custom is None and self._inline is None:
            self.store.close()

    def _retried(self, event: events.StoreRetried) -> None:
        if self._inline is not None:
            self._inline.retried(event)
        else:
            self._hooks(event)

    def _away(self, event: events.StoreAway | events.StoreBack) -> None:
        (self._told if self._inline is not None else reading_waits(self._url, self._hooks))(event)

    def _told(self, event: events.StoreAway | events.StoreBack) -> None:
        if self.listener is not None:
            self.listener.event(event)
