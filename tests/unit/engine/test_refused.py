"""What is refused by the kernel for good is told from what is only short at this moment."""

import errno
import threading

import pytest

from asyncckpt import errors
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.spawn import choose_engine
from asyncckpt.engine.wire import memory_files_refused
from tests.refusals import KNOWN, refuse

pytestmark = pytest.mark.skipif(not KNOWN, reason="the numbers of system calls are known for x86_64 and aarch64")


def where_refused(call, code, act):
    """What `act` returns or raises on a thread of its own: the filter ends with that."""
    found = []

    def work():
        refuse(call, code)
        try:
            found.append(act())
        except errors.CheckpointError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(autouse=True)
def _asked_anew():
    memory_files_refused.cache_clear()
    yield
    memory_files_refused.cache_clear()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EACCES])
def test_no_memory_files_is_threads_of_this_process(code):
    assert where_refused("memfd_create", code, lambda: choose_engine("/x", None, in_process=False)) == "inline"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_no_memory_file_at_this_moment_is_no_reason_to_do_without(code):
    assert where_refused("memfd_create", code, lambda: choose_engine("/x", None, in_process=False)) == "service"


def test_a_service_that_was_asked_for_and_cannot_run_is_an_error_that_names_the_reason():
    error = where_refused("memfd_create", errno.EPERM, lambda: choose_engine("/x", "service", in_process=False))
    assert 'engine="service" cannot run on this host: memfd_create: Operation not permitted' in str(error)


def test_a_kernel_that_does_not_count_cores_leaves_one_at_least():
    assert where_refused("sched_getaffinity", errno.EPERM, usable_cores) >= 1
