"""What the main thread does while a save runs, and how well it goes on doing it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.devices import synchronize
from benchmarks.states import State
from benchmarks.trained import trainer
from examples import train_gpt

Barrier = Callable[[], None]


def no_barrier() -> None:
    """Nothing to wait for."""


class Loop(Protocol):
    """One iteration a call. A training step calls `barrier` before its optimizer changes what may still be copied.

    `long`: an iteration takes longer than a bin of a `Window`.
    """

    name: str
    long: bool

    def __call__(self, barrier: Barrier, /) -> None: ...


class Idle:
    """Waits, in naps of five milliseconds: the saver has the machine to itself."""

    name = "idle"
    long = False

    def __call__(self, _barrier: Barrier, /) -> None:
        time.sleep(0.005)


class BusyPython:
    """Pure Python that never lets go of the GIL by itself, as a main thread that only dispatches; about 50 us."""

    name = "python"
    long = False

    def __call__(self, _barrier: Barrier, /) -> None:
        total = 0
        for number in range(1500):
            total += number


class SmallTorch:
    """Small torch operations, each too short to let another thread in for long; about 50 us.

    Each makes its result anew, 4 KiB, as the operations of a model do. In place they would leave only what torch trims from its aligned
    numbers to glibc's fast bins, and every 130,000 operations, or at the next larger request of any code, this thread would stand still
    for 20 to 50 ms while malloc joins them: a time that no training shows, and that every system's `save()` would be charged with.
    """

    name = "torch"
    long = False

    def __init__(self) -> None:
        self._a = torch.ones(32, 32)
        self._b = torch.full((32, 32), 1e-3)

    def __call__(self, _barrier: Barrier, /) -> None:
        for _ in range(10):
            self._a = self._a.mul(self._b).add(1.0)


class TrainingStep:
    """Forward, backward and AdamW of a small GPT on the CPU, on all cores; a tenth of a second."""

    name = "train"
    long = True

    def __init__(self) -> None:
        _, optimizer, self._steps = trainer(width=96, seed=1)
        self._barrier: Barrier = no_barrier
        optimizer.register_step_pre_hook(lambda *_: self._barrier())

    def __call__(self, barrier: Barrier, /) -> None:
        self._barrier = barrier
        next(self._steps)


class DeviceTraining:
    """Forward, backward and fused AdamW of a GPT on a device, bf16 autocast where it is CUDA; it returns when the device is done.

    `state` is what it trains, so what is saved changes with each step.
    """

    name = "train"
    long = True

    def __init__(self, device: torch.device, *, width: int, layers: int, batch: int, window: int) -> None:
        torch.manual_seed(0)
        self._device = device
        self._loader = train_gpt.Loader(batch=batch, window=window, seed=0)
        model = train_gpt.GPT(width=width, layers=layers, heads=max(1, width // 64), window=window)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # safetensors refuses tied weights
        self._model = model.to(device)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self._barrier: Barrier = no_barrier
        self._optimizer.register_step_pre_hook(lambda *_: self._barrier())
        for _ in range(3):
            self(no_barrier)  # the optimizer has its moments now, kernels and allocator are warm
        self.state = State(self._model, self._optimizer)

    def __call__(self, barrier: Barrier, /) -> None:
        self._barrier = barrier
        inputs, targets = (rows.to(self._device) for rows in self._loader.next_batch())
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = self._model(inputs)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize(self._device)


LOOPS: dict[str, Callable[[], Loop]] = {
    "idle": Idle,
    "python": BusyPython,
    "torch": SmallTorch,
    "train": TrainingStep,
}


BIN_S = 0.05


@dataclass(slots=True)
class Window:
    """Iterations of a loop over a while. `longest_gap_s`: the longest time between the ends of two iterations.

    `bins`: how many iterations ended in each 50 ms since the window's start. `each`: when each ended, and how long it took, if the
    loop's are `long`.
    """

    started_s: float = field(default_factory=time.perf_counter)
    ended_s: float = 0.0
    iterations: int = 0
    longest_gap_s: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0])
    each: list[tuple[float, float]] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def per_s(self) -> float:
        return self.iterations / self.elapsed_s

    def series(self) -> list[list[float]]:
        """[seconds since the window's start, iterations in these 50 ms], the last, cut short, left out; or iterations per second
        at the end of each, where they are long.
        """
        if self.each:
            return [[round(end_s - self.started_s, 3), 1 / took_s] for end_s, took_s in self.each]
        return [[round(number * BIN_S, 3), float(count)] for number, count in enumerate(self.bins[:-1])]

    def run(self, loop: Loop, until: Callable[[], bool], barrier: Barrier = no_barrier) -> None:
        """Iterate until `until()`, asked after each iteration. May be called again: the window goes on, gaps between included."""
        last = self.ended_s or self.started_s
        gap, iterations = self.longest_gap_s, self.iterations
        bins, full_s = self.bins, self.started_s + len(self.bins) * BIN_S
        clock = time.perf_counter
        while True:
            loop(barrier)
            now = clock()
            iterations += 1
            gap = max(gap, now - last)
            if loop.long:
                self.each.append((now, now - last))
            last = now
            while now >= full_s:
                bins.append(0)
                full_s += BIN_S
            bins[-1] += 1
            if until():
                break
        self.ended_s, self.iterations, self.longest_gap_s = last, iterations, gap


def quiet(loop: Loop, seconds: float) -> Window:
    """A window in which nothing is saved."""
    window = Window()
    end_s = window.started_s + seconds
    window.run(loop, lambda: time.perf_counter() >= end_s)
    return window
