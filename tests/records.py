"""Records as other writers, or later versions, might have written them: changed, with the right digest."""

import json

from asyncckpt.format import keys
from asyncckpt.format.record import sealed
from asyncckpt.store.base import Store


def fields_of(data: bytes) -> dict:
    """What a record says, without its digest."""
    return {name: value for name, value in json.loads(data).items() if name != "digest"}


def record_text(fields: dict) -> bytes:
    """A record that says this."""
    return sealed(json.dumps(fields, indent=1).encode())


def change_record(store: Store, step: int, **changes) -> None:
    """Put a step's record again, with these fields changed."""
    key = keys.record_key(step)
    fields = fields_of(store.get(key, max_bytes=2**20)) | changes
    store.put(key, [record_text(fields)])
