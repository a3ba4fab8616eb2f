"""Ctrl-C at any moment of `save()` costs that save, and nothing else."""

import random
import signal

import pytest
import torch

import asyncckpt
from asyncckpt import Saver
from asyncckpt.state.hook import gate
from tests.processes import PATIENCE_S, eventually

INTERRUPTS = 150


@pytest.fixture
def grad_mode():
    """An interrupt inside torch's own `no_grad.__enter__`, which is Python code, leaves the thread without gradients: as it was again."""
    yield
    torch.set_grad_enabled(True)


# one that comes in a callback of a weak reference is swallowed by Python itself, with this warning
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("pending", [1, 2])
def test_an_interrupt_at_any_moment_of_save_leaves_nothing_that_the_next_one_waits_for(tmp_path, pending):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    draw = random.Random(pending)
    parameters = [torch.nn.Parameter(torch.zeros(5_000)) for _ in range(8)]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"p": torch.nn.ParameterList(parameters), "o": optimizer}
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        with Saver(tmp_path, codec="none", pending=pending) as saver:
            saver.save(0, state).result(PATIENCE_S)
            for step in range(1, INTERRUPTS):
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.fill_(step)
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, draw.uniform(2e-5, 1.5e-3))
                        saver.save(step, state)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                saver.wait_staged(PATIENCE_S)  # a save that was handed over before the interrupt goes on
            eventually(lambda: not saver._ledger.in_flight, "every save has its answer")
            eventually(lambda: not saver._launcher._arenas.in_flight, "no arena is lost")
            assert not gate.in_flight()
            saver.save(INTERRUPTS, state).result(PATIENCE_S)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > INTERRUPTS // 10
    for checkpoint in asyncckpt.Run(tmp_path).checkpoints():
        values = asyncckpt.load(tmp_path, step=checkpoint.step)["p"]
        stored = {float(value) for tensor in dict(values).values() for value in tensor.unique()}
        assert stored == {float(min(checkpoint.step, INTERRUPTS - 1))}, "a step holds the values of its own moment"
