"""Log lines of threads that others wait for."""

import logging
import threading

_PATIENCE_S = 1.0
_LOG = logging.getLogger("asyncckpt")


def say(level: int, message: str, *args: object) -> None:
    """One line, without waiting for long until it is written.

    A signal handler that waits for a save may have come in the middle of a log line of the training loop, and logging's locks are held then:
    the thread that brings the answer must go on. Such a line is written when the signal handler has returned.
    """
    if not _LOG.isEnabledFor(level):
        return
    thread = threading.Thread(target=_LOG.log, args=(level, message, *args), name="asyncckpt-log", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the limit of threads, or the interpreter's end
        _LOG.log(level, message, *args)
        return
    thread.join(_PATIENCE_S)
