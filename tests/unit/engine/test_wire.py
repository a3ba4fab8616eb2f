"""The channel between trainer, service and workers."""

import os
import socket
import threading

import pytest

from asyncckpt.engine.wire import INLINE_BYTES, Channel, memory_file, pair, read_memory_file


@pytest.fixture
def ends():
    ours, theirs = pair()
    made = Channel(ours), Channel(theirs)
    yield made
    for channel in made:
        channel.close()


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def receive(channel, count):
    """Exactly `count` messages, with their descriptors."""
    found = []
    while len(found) < count:
        messages = channel.receive()
        assert messages is not None, f"the stream ended after {len(found)} of {count} messages"
        found += messages
    assert len(found) == count
    return found


def test_messages_arrive_whole_and_in_order(ends):
    ours, theirs = ends
    sent = [{"op": "task", "number": number, "text": "ä" * number} for number in range(200)]
    sender = threading.Thread(target=lambda: [ours.send(message) for message in sent])
    sender.start()
    got = receive(theirs, 200)
    sender.join()
    assert [{key: value for key, value in message.items() if key != "fds"} for message, _ in got] == sent
    assert all(fds == [] for _, fds in got)


def test_each_descriptor_arrives_with_its_own_message(ends):
    ours, theirs = ends
    for number in range(40):
        fds = [memory_file("test", b"%d/%d" % (number, place)) for place in range(number % 3)]
        ours.send({"number": number}, fds)
        for fd in fds:
            os.close(fd)
    for number, (message, fds) in enumerate(receive(theirs, 40)):
        assert message["number"] == number
        assert [read_memory_file(fd) for fd in fds] == [b"%d/%d" % (number, place) for place in range(number % 3)]
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("size", [INLINE_BYTES - 100, INLINE_BYTES + 1, 5_000_000])
def test_a_large_message_never_waits_for_the_reader_and_keeps_its_descriptors(ends, size):
    ours, theirs = ends
    before = open_descriptors()
    fd = memory_file("test", b"beside")
    ours.send({"text": "x" * size}, [fd])  # nobody reads: it would block if it travelled inline
    os.close(fd)
    ((message, fds),) = receive(theirs, 1)
    assert message["text"] == "x" * size
    assert [read_memory_file(fd) for fd in fds] == [b"beside"]
    os.close(fds[0])
    assert open_descriptors() == before


def test_what_does_not_fit_is_posted_without_waiting_and_flushed_later(ends):
    ours, theirs = ends
    ours.sock.setblocking(False)
    ours.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = 0
    while not ours.pending:
        ours.post({"number": sent, "text": "x" * 3000})
        sent += 1
    fd = memory_file("test", b"behind")
    ours.post({"number": sent}, [fd])
    os.close(fd)
    sent += 1
    got = []
    while len(got) < sent:
        messages = theirs.receive()
        assert messages is not None
        got += messages
        ours.flush()
    assert not ours.pending
    assert [message["number"] for message, _ in got] == list(range(sent))
    assert read_memory_file(got[-1][1][0]) == b"behind"
    os.close(got[-1][1][0])


def test_a_message_that_is_cut_anywhere_is_put_together(ends):
    ours, theirs = ends
    ours.send({"number": 7})
    frame = theirs.sock.recv(1000)
    for cut in range(len(frame)):
        ours.sock.sendall(frame[:cut])
        rest = threading.Timer(0.001, ours.sock.sendall, [frame[cut:]])
        rest.start()
        ((message, _),) = receive(theirs, 1)
        rest.join()
        assert message["number"] == 7


def test_a_non_blocking_reader_sees_nothing_only_when_nothing_more_is_there(ends):
    """Else the service, draining what a killed trainer sent, would stop at the first cut message."""
    ours, theirs = ends
    theirs.sock.setblocking(False)
    assert theirs.receive() == []
    ours.send({"number": 1})
    frame = theirs.sock.recv(1000)
    middle = memory_file("test", b"")
    socket.send_fds(ours.sock, [frame[:2]], [middle])  # a descriptor ends the kernel's read in the middle
    ours.sock.sendall(frame[2:])
    os.close(middle)
    assert [message["number"] for message, _ in theirs.receive()] == [1]
    assert theirs.receive() == []


def test_the_end_of_the_stream_is_told_once_all_messages_are_read(ends):
    ours, theirs = ends
    ours.send({"number": 1})
    ours.close()
    assert [message["number"] for message, _ in receive(theirs, 1)] == [1]
    assert theirs.receive() is None
    assert theirs.receive() is None


def test_sending_to_an_end_that_is_gone_raises_a_broken_pipe(ends):
    ours, theirs = ends
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.send({"number": 1})
    with pytest.raises(BrokenPipeError):
        ours.post({"number": 2})


def test_close_leaves_no_descriptor_received_queued_or_untaken():
    before = open_descriptors()
    ours, theirs = (Channel(sock) for sock in pair())
    fd = memory_file("test", b"")
    ours.send({"number": 1}, [fd])
    ours.send({"number": 2, "text": "x" * (INLINE_BYTES + 1)}, [fd])
    ours.sock.setblocking(False)
    while not ours.pending:
        ours.post({"text": "x" * 10_000}, [fd])
    os.close(fd)
    for _, fds in theirs.receive():
        for taken in fds:
            os.close(taken)
    theirs.close()
    ours.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [0, INLINE_BYTES + 1])
@pytest.mark.parametrize("way", ["send", "post"])
def test_a_message_that_nobody_will_read_keeps_no_descriptor(ends, way, size):
    ours, theirs = ends
    theirs.close()
    fd = memory_file("test", b"")
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(BrokenPipeError):
            getattr(ours, way)({"text": "x" * size}, [fd])
    assert open_descriptors() == before
    assert not ours.pending
    os.close(fd)


def test_a_descriptor_that_cannot_be_sent_leaves_no_other_one_open(ends):
    fd = memory_file("test", b"")
    before = open_descriptors()
    with pytest.raises(OSError, match="Bad file descriptor"):
        ends[0].send({"number": 1}, [fd, 1_000_000])
    assert open_descriptors() == before
    os.close(fd)


def test_many_threads_may_send_at_once(ends):
    ours, theirs = ends
    threads = [
        threading.Thread(target=lambda name=name: [ours.send({"by": name, "n": n}) for n in range(100)])
        for name in range(4)
    ]
    for thread in threads:
        thread.start()
    got = receive(theirs, 400)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [message["n"] for message, _ in got if message["by"] == name] == list(range(100))


def test_a_memory_file_gives_back_what_was_written():
    for data in (b"", b"x", os.urandom(3_000_000)):
        fd = memory_file("test", data)
        assert read_memory_file(fd) == data
        os.close(fd)
