"""What the package says to a person, by logging or as a warning, never fails what it tells of.

A stderr that is closed, or an object that a script put in its place, raises from `logging` as from `warnings`.
"""

import logging
import threading
import warnings
from contextlib import suppress

LOG = logging.getLogger("asyncckpt")
_hand_on = LOG.handle
_PATIENCE_S = 1.0


def _handle(record: logging.LogRecord) -> None:
    with suppress(Exception):
        _hand_on(record)


LOG.handle = _handle  # type: ignore[method-assign]


def warn(text: str, category: type[Warning] = UserWarning, *, stacklevel: int = 1) -> None:
    """`warnings.warn`, but where it cannot be shown it is logged. Filters that make an error of it raise, as they should."""
    try:
        warnings.warn(text, category, stacklevel=stacklevel + 1)
    except category:
        raise
    except Exception:  # noqa: BLE001 - of whatever stands in for stderr
        LOG.warning("%s", text)


def say(level: int, message: str, *args: object) -> None:
    """One line, without waiting for long until it is written.

    A signal handler that waits for a save may have come in the middle of a log line of the training loop, and logging's locks are held then:
    the thread that brings the answer must go on. Such a line is written when the signal handler has returned.
    """
    if not LOG.isEnabledFor(level):
        return
    thread = threading.Thread(target=lambda: LOG.log(level, message, *args), name="asyncckpt-log", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the limit of threads, or the interpreter's end
        LOG.log(level, message, *args)
        return
    thread.join(_PATIENCE_S)
