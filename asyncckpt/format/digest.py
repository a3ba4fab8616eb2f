"""BLAKE3, the one digest: integrity, identity and tamper evidence in one pass at memory speed."""

from blake3 import blake3

DIGEST_BYTES = 32

Buffer = bytes | bytearray | memoryview


class Hasher:
    """A digest taken piece by piece. Large pieces are hashed without the GIL."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = blake3()

    def update(self, data: Buffer) -> None:
        """Add contiguous bytes."""
        self._state.update(data)

    def digest(self) -> bytes:
        """The 32 bytes over everything added so far."""
        return self._state.digest()


def digest(*buffers: Buffer) -> bytes:
    """The 32 bytes of BLAKE3 over the buffers, joined."""
    state = blake3()
    for data in buffers:
        state.update(data)
    return state.digest()


def hexdigest(*buffers: Buffer) -> str:
    """The same in 64 lower-case hex digits."""
    return digest(*buffers).hex()


def from_hex(text: str) -> bytes:
    """The 32 bytes of a stored digest; `ValueError` unless it is exactly 64 lower-case hex digits."""
    if not isinstance(text, str) or len(text) != 2 * DIGEST_BYTES or not text.isascii() or text != text.lower():
        raise ValueError(f"not a BLAKE3 digest: {str(text)[:100]!r}")
    data = bytes.fromhex(text)
    if len(data) != DIGEST_BYTES:
        raise ValueError(f"not a BLAKE3 digest: {text[:100]!r}")
    return data
