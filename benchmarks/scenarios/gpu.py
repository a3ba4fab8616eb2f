"""Systems side by side on a GPT that trains on a device: what a save costs its steps, and how fast bytes leave the device.

The state is what is trained, so every save stores another one; a copy of it stays on the device, beside the tensors that saves are
restored into: the device holds three states and the gradients.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from asyncckpt.engine.choice import SETTLING_SAVES
from benchmarks.devices import copy_s, host_memory, link_gbps
from benchmarks.loops import DeviceTraining, Window, no_barrier
from benchmarks.measure import Observer, Spread, spread
from benchmarks.results import Result
from benchmarks.scenarios.base import BitsDifferError, Run, Scenario, System, Verifier
from benchmarks.scenarios.rounds import QUIET_S, Waits, compared
from benchmarks.scenarios.samples import FOREIGN_CORES, Round, Samples
from benchmarks.scenarios.saves import AGAIN, turned
from benchmarks.states import State, StateSpec

PEERS = (
    "asyncckpt",
    "asyncckpt-eager",
    "dcp-thread",
    "dcp-process",
    "torch_checkpointing",
    "torch.save",
    "safetensors",
)
LEAST_STEPS = 4  # in a window, also if the save is durable before
_FIRST_COUNTED = 2  # of the settling saves: the first ones make the arena


@dataclass(frozen=True, slots=True)
class Size:
    """Of the GPT. `window`: bytes of text in a sequence, `batch`: sequences a step."""

    width: int = 2048
    layers: int = 8
    batch: int = 16
    window: int = 512


@dataclass(frozen=True, slots=True)
class StepRound(Round):
    """`quiet_steps_s`: each step while nothing was saved. `first_step_s`: the step that a save began, its call included.
    `later_steps_s`: those behind it, until the save was durable. Seconds.
    """

    quiet_steps_s: tuple[float, ...] = ()
    first_step_s: float = 0.0
    later_steps_s: tuple[float, ...] = ()

    @property
    def stall_s(self) -> float:
        """What the save added to its step."""
        return self.first_step_s - statistics.median(self.quiet_steps_s)


@dataclass(slots=True)
class Found(Samples):
    """One system's rounds, and `idle_staged_s`: the snapshots of saves beside which nothing ran."""

    idle_staged_s: list[float] = field(default_factory=list)

    def beside_training(self, raw_bytes: int, plain_copy_s: float, *, asynchronous: bool) -> dict[str, Spread | float]:
        """What a step says, over the rounds that count, and the rate at which snapshots came from the device."""
        rounds = [one for one in self.kept() if isinstance(one, StepRound)]
        lists = {
            "quiet_step_s": [seconds for one in rounds for seconds in one.quiet_steps_s],
            "step_with_save_s": [one.first_step_s for one in rounds],
            "stall_s": [one.stall_s for one in rounds],
            "step_while_saving_s": [seconds for one in rounds for seconds in one.later_steps_s],
        }
        if asynchronous:  # otherwise the end of the snapshot is nobody's news
            lists["idle_staged_s"] = self.idle_staged_s
            lists["d2h_gbps"] = [raw_bytes / seconds / 1e9 for seconds in self.idle_staged_s]
            lists["d2h_of_plain_copy"] = [plain_copy_s / seconds for seconds in self.idle_staged_s]
        return {name: spread(values) for name, values in lists.items() if values}


class _Bench:
    """What all systems share. `limits`: the rate of the link, and the seconds of a plain copy of the state."""

    def __init__(self, device: torch.device, size: Size, warm: Callable[[State], None] = lambda _: None) -> None:
        self.size = size
        self.warm = warm
        self.training = DeviceTraining(
            device, width=size.width, layers=size.layers, batch=size.batch, window=size.window
        )
        self.state = self.training.state
        self._kept = self.state.twin()
        self.verifier = Verifier(self._kept, warm)
        self.steps = itertools.count(1)
        tensors = self.state.tensors()
        host = host_memory(self.state.raw_bytes + 64 * len(tensors), device)
        self.limits = {"link_gbps": link_gbps(device), "copy_s": min(copy_s(tensors, host) for _ in range(5))}

    def keep(self) -> None:
        """What the next save must hold."""
        self._kept.copy_from(self.state)
        self._kept.settle()


def scenario(peers: tuple[str, ...], rounds: int, store: str) -> Scenario:
    """As data: one, since sizes are the command line's."""
    about = "a GPT that trains on a device, bf16 autocast, fp32 weights and AdamW, saved while it trains"
    return Scenario("gpu", about, (), peers=peers, kind="gpu", loop="train", store=store, rounds=rounds, uncounted=0)


def run(context: Run, device: torch.device, size: Size) -> list[Result]:
    """Settling saves of every system with nothing beside them, then rounds in which the systems take turns."""
    bench = _Bench(device, size, context.warm)
    found = {name: Found() for name in context.scenario.peers}
    opened: dict[str, System] = {}
    try:
        for name, kept in found.items():
            with kept.failing(BitsDifferError):
                opened[name] = context.open(name)
                opened[name].peer.prepare(bench.state)
                kept.idle_staged_s += _settled(opened[name], bench, context)
            context.warn(name, kept.error)
        for number in range(1, context.scenario.rounds + 1):
            for name, system in turned(list(opened.items()), number - 1):
                kept = found[name]
                if kept.error is None:
                    with kept.failing(BitsDifferError):
                        for _ in range(1 + AGAIN):
                            _round(system, bench, kept)
                            context.say(name, number, kept.rounds[-1].summary())
                            if kept.rounds[-1].foreign_cores <= FOREIGN_CORES:
                                break
                    context.warn(name, kept.error)
    finally:
        for name, system in opened.items():
            with found[name].failing():
                system.peer.close()
    return [_result(context, bench, opened.get(name), name, kept) for name, kept in found.items()]


def _result(context: Run, bench: _Bench, system: System | None, name: str, kept: Found) -> Result:
    asynchronous = system is not None and system.peer.asynchronous
    size, state, limits = bench.size, bench.state, bench.limits
    beside = kept.beside_training(state.raw_bytes, limits["copy_s"], asynchronous=asynchronous)
    return context.result(
        StateSpec(f"GPT, {size.layers} layers of {size.width}, on {state.device.type}"),
        state,
        name,
        measures=limits | beside | kept.measures(state.raw_bytes) if beside else {},
        series=kept.series(),
        settings={
            "asynchronous": asynchronous,
            "device": str(state.device),
            "batch": size.batch,
            "window": size.window,
        },
        error=kept.error,
    )


def _settled(system: System, bench: _Bench, context: Run) -> list[float]:
    """Seconds of the snapshot alone, nothing beside it, of all saves behind the first two; as many saves for everybody as codec "auto" tries."""
    found = []
    for number in range(SETTLING_SAVES):
        bench.training(no_barrier)
        bench.keep()
        saving = system.peer.save(next(bench.steps), bench.state)
        saving.wait_durable()
        if number >= _FIRST_COUNTED:
            bench.verifier.check(system.peer, saving.step)
            found.append(saving.staged_s)
        system.peer.forget(saving.step)
        context.say(
            system.peer.name, 0, f"settles: snapshot {saving.staged_s * 1e3:.0f} ms, durable {saving.durable_s:.2f} s"
        )
    return found


def _round(system: System, bench: _Bench, kept: Found) -> None:
    """A window without a save, then one that begins with a save and ends when it is durable; then the save is compared."""
    peer, around = system.peer, Observer()
    quiet, end_s = Window(), time.perf_counter() + QUIET_S
    quiet.run(bench.training, lambda: time.perf_counter() >= end_s and len(quiet.each) >= LEAST_STEPS)
    bench.keep()
    bench.warm(bench.state)
    observer, waits, window = Observer(system.servers), Waits(), Window()
    saving = peer.save(next(bench.steps), bench.state)
    window.run(
        bench.training,
        lambda: saving.done() and len(window.each) >= LEAST_STEPS,
        no_barrier if peer.guards_steps else waits.barrier(saving.wait_staged),
    )
    saving.wait_durable()
    waits.next()
    observed = observer.stop()
    save = compared(peer, saving, bench.verifier, waited_s=waits.each_s[0])
    kept.rounds.append(
        StepRound(
            saves=(save,),
            foreign_cores=max(observed.foreign_cores, around.stop().foreign_cores),
            speed=window.per_s / quiet.per_s,
            lost_s=(1 - window.per_s / quiet.per_s) * window.elapsed_s,
            gap_s=window.longest_gap_s,
            quiet_gap_s=quiet.longest_gap_s,
            series_name="iterations_per_s",
            quiet_series=quiet.series(),
            series=window.series(),
            quiet_steps_s=tuple(took_s for _, took_s in quiet.each),
            first_step_s=window.each[0][1],  # the window began right before the call
            later_steps_s=tuple(took_s for _, took_s in window.each[1:]),
        )
    )
