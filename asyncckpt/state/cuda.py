"""What snapshots and restores need of CUDA: page-locked memory of the host, and one side stream a device.

Nothing here but `capturing` is called unless a state holds CUDA tensors. Whatever is called names its device: the copy thread's current
one is device 0, and a call that meant it would make a context there, on the device of another rank.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from asyncckpt.engine.arena import Arena

_LOG = logging.getLogger("asyncckpt")
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device, not only the current one


class Lane:
    """Copies from one device to the arena on a stream of its own, so that compute goes on.

    Whoever gives `finish` sources keeps their storages until the event has passed, and looks whether one was resized to nothing
    meanwhile. (`record_stream` would keep the memory of that one too, at 5 us a tensor with the GIL: 95 ms for 20,000 tensors, which the
    next optimizer step waits for.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, alone: bool) -> None:
        """Order all later copies behind what the caller's stream was given so far; enqueue those that must not overlap.

        The caller's stream waits for the latter (the host does not): whatever it writes next comes behind the copy. They may be dropped
        at once, whatever stream their memory is of; not if they are `alone`: then the caller waits until they are copied.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        if sources:
            self._enqueue(targets, sources)
            current.wait_stream(self._stream)
            for source in () if alone else sources:
                source.record_stream(self._stream)

    def finish(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> torch.cuda.Event:
        """Enqueue the rest; the event has passed when every byte of this lane is in the arena."""
        self._enqueue(targets, sources)
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps instead of spinning
        with torch.cuda.device(self._device):
            event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Return when nothing that was enqueued is left."""
        self._stream.synchronize()

    def hold(self, event: torch.cuda.Event) -> None:
        """Make the calling thread's compute stream wait for the event; the host goes on."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def _enqueue(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        if not sources:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)


class Pins:
    """Page-locks arenas. Where that fails, copies go through pageable memory: slower, and warned about once."""

    def __init__(self) -> None:
        self._pinned: dict[int, torch.device] = {}
        self._failed = False

    def pin(self, arena: Arena, device: torch.device) -> None:
        """Page-lock the arena, through this device and for all, unless it is; touches all its pages, 0.3 s a GB."""
        if arena.address in self._pinned or self._failed:
            return
        code = _lock_pages(arena.address, arena.bytes, device)
        if code == 0:
            self._pinned[arena.address] = device
            return
        self._failed = True
        _LOG.warning(
            "could not page-lock %d bytes of host memory (CUDA error %d): snapshots go through pageable memory and are "
            "slower. Raise the locked-memory limit (ulimit -l) or give the job more host memory.",
            arena.bytes,
            code,
        )

    def unpin(self, arena: Arena) -> None:
        """Undo `pin`; no copy into the arena may be in flight."""
        device = self._pinned.pop(arena.address, None)
        if device is not None:
            _unlock_pages(arena.address, device)


@contextmanager
def page_locked(memory: memoryview, device: torch.device | None) -> Iterator[None]:
    """Meanwhile copies from this memory to the device run at the rate of the link (54 instead of 9.4 GB/s: PCIe 5, one H200).

    Locking takes 0.05 s a GB of pages that were touched. Where it cannot be, copies are as slow as without it. `device` None: not needed.
    """
    if device is None or not len(memory):
        yield
        return
    address, locked = ctypes.addressof(ctypes.c_char.from_buffer(memory)), True
    try:
        locked = _lock_pages(address, len(memory), device) == 0
        yield
    finally:
        if locked:  # or was perhaps, if an interrupt came: the runtime must not think so of what else comes to lie here
            try:
                with suppress(RuntimeError):  # an error of the device is somebody else's, and told at their next call
                    torch.cuda.synchronize(device)  # somebody's own code may have left copies in flight
            finally:
                _unlock_pages(address, device)


def capturing() -> bool:
    """Whether the calling thread's stream is being captured into a CUDA graph; free where CUDA is not in use."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _lock_pages(address: int, size_bytes: int, device: torch.device) -> int:
    """The runtime's error code, 0 if they are locked, for all devices. No error stays behind."""
    with torch.cuda.device(device):
        code = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _PORTABLE))
        if code:
            _clear_last_error()
    return code


def _unlock_pages(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostUnregister(address)):
            _clear_last_error()


def _clear_last_error() -> None:
    """A failed runtime call stays behind as the "last error" and would be blamed on the next kernel: take it here."""
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.current_stream().query()
    except RuntimeError:
        _LOG.debug("cleared the CUDA error of a failed page lock", exc_info=True)
