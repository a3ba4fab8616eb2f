"""What a service does when its trainer is gone: it has one deadline for everything, and tells the next Saver how it ended."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from asyncckpt.engine.notices import Notice, take_notices

_LOG = logging.getLogger("asyncckpt")
_UNANSWERED = ""
_STORED = "stored"
_DONE, _LATE = "done", "late"


class Alone:
    """The time after the trainer.

    It is over when for `deadline_s` no save has moved, whatever is still to be removed: the node's next run wants the memory.

    Args:
        notices: The folder of notices to later Savers.
        place: What the saves are stored in, as a later Saver names it.
        deadline_s: How long it may last without a save that moves.
        steps: Those of the saves that the trainer handed over and had no answer to.
    """

    def __init__(
        self,
        notices: Path,
        place: str,
        *,
        deadline_s: float,
        steps: Iterable[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notices = notices
        self._place = place
        self._deadline_s = deadline_s
        self._clock = clock
        self._moved_s = clock()
        self._since_s = time.time()
        self._saves = dict.fromkeys(steps, _UNANSWERED)
        self._notice: Notice | None = None
        self._ended = ""
        self._write()

    @property
    def left_s(self) -> float:
        """So long it may still last; 0 when it is over."""
        return max(0.0, self._moved_s + self._deadline_s - self._clock())

    def moved(self) -> None:
        """A piece of a save is stored: a deadline is no reason to give up what goes on."""
        self._moved_s = self._clock()

    def answered(self, step: int, error: BaseException | None) -> None:
        """A save of that step has ended."""
        self._saves[step] = _STORED if error is None else f"{type(error).__name__}: {error}"
        self._write()

    def end(self, *, unfinished: bool) -> None:
        """The service ends. `unfinished`: not everything was done."""
        self._ended = _LATE if unfinished else _DONE
        self._write()

    def _write(self) -> None:
        if not self._saves:
            return
        if self._notice is None:
            self._notice = Notice(self._notices, self._place)
        self._notice.write(
            {
                "since_s": self._since_s,
                "deadline_s": self._deadline_s,
                "saves": {str(step): answer for step, answer in self._saves.items()},
                "ended": self._ended,
            }
        )


def tell_notices(notices: Path, place: str) -> None:
    """Log what services of earlier runs left for a Saver of this place: INFO if all was stored, else a WARNING."""
    for facts, alive in take_notices(notices, place):
        try:
            bad, text = _told(facts, alive=alive)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue  # written in the middle of a crash
        (_LOG.warning if bad else _LOG.info)("%s: %s", place, text)


def _told(facts: Mapping[str, Any], *, alive: bool) -> tuple[bool, str]:
    """Whether something was lost or may be, and what to say."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since_s"]))
    saves = {int(step): str(answer) for step, answer in facts["saves"].items()}
    stored = [str(step) for step, answer in saves.items() if answer == _STORED]
    failed = [
        f"step {step} failed ({answer})" for step, answer in saves.items() if answer not in (_STORED, _UNANSWERED)
    ]
    unanswered = [str(step) for step, answer in saves.items() if answer == _UNANSWERED]
    parts = [f"step(s) {', '.join(stored)} stored"] if stored else []
    parts += failed
    bad = bool(failed or unanswered)
    if alive:
        wait = f"step(s) {', '.join(unanswered)} on their way" if unanswered else "it cleans up"
        parts.append(f"{wait}; it goes on, and gives up after {facts['deadline_s']:.0f} s in which nothing is stored")
    elif unanswered and facts["ended"]:
        late = f"given up: nothing was stored for {facts['deadline_s']:.0f} s (RetryPolicy.deadline_s)"
        parts.append(f"step(s) {', '.join(unanswered)} {late}")
    elif unanswered:
        parts.append(f"step(s) {', '.join(unanswered)} not finished: the service was killed")
    elif facts["ended"] == _LATE:
        parts.append("its clean-up was not finished")
    return bad or alive, f"a checkpoint service that was left alone at {since}: {'; '.join(parts)}"
