"""A copy behind the training loop takes the cores that are idle, and nobody else's number of threads changes."""

import os
import threading

import pytest
import torch

from asyncckpt.engine.cores import parse_runnable
from asyncckpt.state.threads import _loadavg, idle_cores, within_idle_cores


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_thread(act):
    found = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def test_the_limit_counts_for_the_thread_that_entered_and_ends_with_it(monkeypatch):
    monkeypatch.setattr("asyncckpt.state.threads.idle_cores", lambda: 1)

    def look():
        with within_idle_cores():
            inside = torch.get_num_threads()
            started_meanwhile = in_thread(torch.get_num_threads)
        return inside, started_meanwhile, torch.get_num_threads()

    assert in_thread(look) == (1, 2, 2)
    assert torch.get_num_threads() == 2


def test_without_a_neighbour_nothing_is_limited(monkeypatch):
    monkeypatch.setattr("asyncckpt.state.threads.idle_cores", lambda: 2)
    with within_idle_cores():
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("loadavg", "idle"),
    [("0.5 0.4 0.3 1/250 99", 4), ("9 9 9 3/250 99", 2), ("9 9 9 90/250 99", 1), ("what?", 4), ("", 4)],
)
def test_idle_cores_are_those_that_no_runnable_thread_wants(loadavg, idle, monkeypatch):
    monkeypatch.setattr("asyncckpt.state.threads._loadavg", lambda: loadavg)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert idle_cores() == idle


def test_the_kernel_says_how_many_threads_run():
    assert 1 <= parse_runnable(_loadavg()) < 10_000


def test_cores_may_be_reserved_for_who_does_not_run_now(monkeypatch):
    monkeypatch.setattr("asyncckpt.state.threads.idle_cores", lambda: 2)

    def look():
        with within_idle_cores(reserved=1):
            return torch.get_num_threads()

    assert in_thread(look) == 1
