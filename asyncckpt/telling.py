"""What the package says to a person, by logging or as a warning, never fails what it tells of.

A stderr that is closed, or an object that a script put in its place, raises from `logging` as from `warnings`.
"""

import logging
import warnings
from contextlib import suppress

LOG = logging.getLogger("asyncckpt")
_hand_on = LOG.handle


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
