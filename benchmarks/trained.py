"""Weights and AdamW moments as training leaves them: a small GPT, trained for real on the standard library's source.

Noise compresses unlike training state, and so do zeros. So a small model is trained once and its values fill the states of the
benchmarks, repeated when a state is larger (the repeats lie tens of megabytes apart, far beyond the 1 MiB window of the codec).
"""

import hashlib
import inspect
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples import train_gpt

WIDTH = 256
STEPS = 60
BATCH = 8
WINDOW = 128


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and its optimizer, and where they come from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    first_loss: float
    last_loss: float

    @property
    def source(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"GPT of {parameters / 1e6:.1f} M parameters, {self.steps} steps of AdamW on the standard library's source, "
            f"loss {self.first_loss:.2f} to {self.last_loss:.2f}"
        )


def trainer(*, width: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Iterator[float]]:
    """A model, its optimizer, and an endless iterator that trains one step and yields its loss."""
    torch.manual_seed(seed)
    loader = train_gpt.Loader(batch=BATCH, window=WINDOW, seed=seed)
    model = train_gpt.GPT(width=width, heads=4, window=WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def steps() -> Iterator[float]:
        while True:
            inputs, targets = loader.next_batch()
            loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    return model, optimizer, steps()


def trained(steps: int = STEPS) -> Trained:
    """The trained model: from the user's cache folder, or trained now, on one thread: the same values however many cores there are.

    About half a minute on an idle core.
    """
    model, optimizer, train = trainer(width=WIDTH)
    path = _cache(steps)
    if path.exists():
        stored = torch.load(path, weights_only=True)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        return Trained(model, optimizer, steps, *stored["losses"])
    started = time.perf_counter()
    print(f"training the model whose values fill the states, {steps} steps, once ...", flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses = [next(train) for _ in range(steps)]
    torch.set_num_threads(threads)
    print(f"  done in {time.perf_counter() - started:.0f} s, loss {losses[0]:.2f} to {losses[-1]:.2f}", flush=True)
    stored = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": (losses[0], losses[-1])}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(stored, file)
    Path(file.name).replace(path)
    return Trained(model, optimizer, steps, losses[0], losses[-1])


def _cache(steps: int) -> Path:
    made_by = inspect.getsource(train_gpt) + inspect.getsource(trainer) + f"{WIDTH} {steps} {torch.__version__}"
    key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return folder / "asyncckpt-benchmarks" / f"trained-{key}.pt"
