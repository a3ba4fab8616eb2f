"""When a save is given up: so long after a request of it began to fail, without a put or a part that was acknowledged since."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from asyncckpt import errors
from asyncckpt.events import StoreRetried


@dataclass(slots=True)
class SaveClock:
    """One clock for all requests of a save, in whichever process they are sent. Moments are monotonic seconds of this host.

    Bytes that were pushed are no progress: a store that refuses everything would get a save that never ends.
    """

    deadline_s: float
    failing: set[Hashable] = field(default_factory=set)
    since_s: float = 0.0
    acknowledged_s: float = 0.0
    last: StoreRetried | None = None

    def fails(self, who: Hashable, sent_s: float) -> None:
        """A request of this worker begins to fail, with a try that was sent then."""
        if not self.failing:
            self.since_s = max(sent_s, self.acknowledged_s)
        self.failing.add(who)

    def eases(self, who: Hashable) -> None:
        """No request of this worker fails any more, or the worker is gone."""
        self.failing.discard(who)

    def acknowledges(self, now_s: float) -> None:
        """A put or a part was acknowledged."""
        self.acknowledged_s = self.since_s = now_s

    def ran_out(self, now_s: float) -> bool:
        """Whether it is time to give the save up."""
        return self.left_s(now_s) <= 0

    def left_s(self, now_s: float) -> float:
        """Until then, if nothing gets better: a request that hangs fails in the end."""
        return self.deadline_s - (now_s - self.since_s if self.failing else 0.0)

    def error(self, now_s: float, step: int) -> errors.DeadlineExceededError:
        """Why the save is given up."""
        took = f"for {now_s - self.since_s:.0f} s nothing of this save could be stored"
        if self.last is None:
            return errors.DeadlineExceededError(f"{took}: the store does not answer", step=step)
        last = self.last
        error = errors.DeadlineExceededError(
            f"{took}; the last failure, of {last.operation} after {last.tries} tries, said: {last.error}",
            step=step,
            key=last.key,
        )
        error.__cause__ = errors.TransientStoreError(last.error, key=last.key)
        return error
