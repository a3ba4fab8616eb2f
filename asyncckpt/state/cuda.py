"""What a snapshot needs of CUDA: page-locked arenas and one side stream a device.

Nothing here but `capturing` is called unless a state holds CUDA tensors. Whatever is called names its device: the copy thread's current
one is device 0, and a call that meant it would make a context there, on the device of another rank.
"""

import logging
from collections.abc import Sequence

import torch

from asyncckpt.engine.arena import Arena

_LOG = logging.getLogger("asyncckpt")
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device, not only the current one


class Lane:
    """Copies from one device to the arena on a stream of its own, so that compute goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Order all later copies behind what the caller's stream was given so far; enqueue those that must not overlap.

        The caller's stream waits for the latter (the host does not): whatever it writes next comes behind the copy.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        if sources:
            self._enqueue(targets, sources)
            current.wait_stream(self._stream)

    def finish(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> torch.cuda.Event:
        """Enqueue the rest; the event has passed when every byte of this lane is in the arena."""
        self._enqueue(targets, sources)
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps instead of spinning
        with torch.cuda.device(self._device):
            event.record(self._stream)
        return event

    def hold(self, event: torch.cuda.Event) -> None:
        """Make the calling thread's compute stream wait for the event; the host goes on."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def _enqueue(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        if not sources:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
        for source in sources:  # its memory is not given to others before the copy has passed
            source.record_stream(self._stream)


class Pins:
    """Page-locks arenas. Where that fails, copies go through pageable memory: slower, and warned about once."""

    def __init__(self) -> None:
        self._pinned: dict[int, torch.device] = {}
        self._failed = False

    def pin(self, arena: Arena, device: torch.device) -> None:
        """Page-lock the arena, through this device and for all, unless it is; touches all its pages, 0.3 s a GB."""
        if arena.address in self._pinned or self._failed:
            return
        with torch.cuda.device(device):
            code = int(torch.cuda.cudart().cudaHostRegister(arena.address, arena.bytes, _PORTABLE))
            if code == 0:
                self._pinned[arena.address] = device
                return
            self._failed = True
            _clear_last_error()
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
            with torch.cuda.device(device):
                torch.cuda.cudart().cudaHostUnregister(arena.address)


def capturing() -> bool:
    """Whether the calling thread's stream is being captured into a CUDA graph; free where CUDA is not in use."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _clear_last_error() -> None:
    """A failed runtime call stays behind as the "last error" and would be blamed on the next kernel: take it here."""
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.current_stream().query()
    except RuntimeError:
        _LOG.debug("cleared the CUDA error of a failed page lock", exc_info=True)
