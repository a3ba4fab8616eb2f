"""Python's cyclic garbage collector, made rarer while a restore makes many objects that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG_OBJECTS = 200_000
"""Containers made since the last collection before the next one begins; Python's own number is 700."""


@contextmanager
def seldom(young_objects: int = _YOUNG_OBJECTS) -> Iterator[None]:
    """Collections are rare meanwhile, in the whole process: a restore of 133,000 tensors takes 6 s instead of 9.

    `young_objects`: how many more containers are made before the next collection begins. Its objects are no garbage, but their number makes the collector look through all of them again and again. Not held off
    altogether, since a download may take minutes and what other threads drop must be freed.
    """
    usual = gc.get_threshold()
    if not 0 < usual[0] < young_objects:  # off, or rarer already: a restore on another thread
        yield
        return
    gc.set_threshold(young_objects, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
