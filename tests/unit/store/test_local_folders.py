"""Many writers make the same new folders at once."""

import threading

import pytest

from asyncckpt.errors import LocalIOError
from asyncckpt.store.local import LocalStore


def test_puts_into_a_folder_that_several_make_at_once_all_succeed(tmp_path):
    """As the shards of one step do: whoever comes second finds a parent that was missing a moment ago."""
    store = LocalStore(tmp_path)
    failures = []

    def put(number, barrier):
        for step in range(60):
            barrier.wait()
            try:
                store.put(f"step-{step:010d}/aaaaaaaa-000001/{number}", [b"x"])
            except LocalIOError as error:
                failures.append(error)

    barrier = threading.Barrier(6)
    threads = [threading.Thread(target=put, args=(number, barrier)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(store.list())) == 360


def test_a_place_where_no_folder_can_be_made_raises():
    with pytest.raises(LocalIOError):
        LocalStore("/proc/no/such/place").put("step-0000000001/a-1/x", [b"x"])
