"""The random number generators of a process, as one object with a state dict."""

import random
from typing import Any

import numpy as np
import torch

from asyncckpt.errors import StateMismatchError
from asyncckpt.state.batches import between_epochs
from asyncckpt.telling import warn


class RNG:
    """Python's `random`, NumPy's global generator, torch's CPU generator and those of all CUDA devices.

    Put it in the state under a key of its own. Generators of your own (`torch.Generator`, `numpy.random.default_rng()`) are not
    among them. CUDA generators are stored once CUDA is in use; a process that never touched it is not made to start it. Stored beside them
    is whether the process stood between two epochs (`Saver.batches`).
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self.between_epochs = False
        """Of what was restored last."""

    def state_dict(self) -> dict[str, Any]:
        """Private copies of all generators' states."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global generator is what is captured
            "torch": torch.get_rng_state(),
            "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
            "between_epochs": between_epochs(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all generators back.

        Raises:
            StateMismatchError: The checkpoint holds more CUDA generators than there are devices; nothing was set.
        """
        cuda = state["cuda"]
        for problem in self.complaints(len(cuda)):
            raise StateMismatchError(problem)
        self._restored = state
        self.between_epochs = bool(state.get("between_epochs"))
        if cuda and torch.cuda.device_count() > len(cuda):
            warn(
                f"the checkpoint holds {len(cuda)} CUDA generators and there are {torch.cuda.device_count()} devices; "
                "the others keep their state",
                stacklevel=2,
            )
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002 - see state_dict
        torch.set_rng_state(state["torch"])
        for device, generator in enumerate(cuda):
            torch.cuda.set_rng_state(generator, device)

    def restore_again(self) -> None:
        """Once after a restore: put all generators back to what was restored, whatever was drawn since."""
        state, self._restored = self._restored, None
        if state is not None:
            self.load_state_dict(state)
            self._restored = None

    def complaints(self, cuda_generators: int) -> list[str]:
        """Why a checkpoint with so many CUDA generators cannot be restored here."""
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if cuda_generators <= devices:
            return []
        have = f"the checkpoint holds {cuda_generators} CUDA generators and there are {devices} CUDA devices"
        return [f"{have}; leave RNG out of the state to restore without it"]
