"""What every store must do. A new store is done when a small subclass of `StoreContract` passes."""

import array
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncckpt.errors import (
    CorruptCheckpointError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
    UnsafeCheckpointError,
)
from asyncckpt.store.base import Store, Version

UNSAFE_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "..",
    "../a",
    "a/../b",
    "a/.",
    ".hidden",
    "a/.b",
    "A",
    "a b",
    "a\0",
    "a\\b",
    "ä",
    "a\n",
]


class StoreContract:
    """Subclasses give a fixture `store`: fresh, empty, at a root that was never written."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def keys(self, store: Store, prefix: str = "", *, delimiter: bool = False) -> list[str]:
        return [entry.key for entry in store.list(prefix, delimiter=delimiter)]

    def test_buffers_of_all_kinds_come_back_joined(self, store: Store) -> None:
        numbers = array.array("d", [1.5, -2.0])
        store.put("a/b.bin", [b"one", bytearray(b"two"), b"", memoryview(numbers), memoryview(b"-three-")[1:6]])
        assert store.get("a/b.bin", max_bytes=100) == b"onetwo" + numbers.tobytes() + b"three"

    def test_buffers_that_the_store_gathered_come_back_joined(self, store: Store) -> None:
        for key, count in (("few", 2), ("many", 300)):
            body = store.gather()
            for number in range(count):
                body.append(memoryview(bytes([number % 256]) * 1000))
            store.put(key, body)
            assert store.get(key, max_bytes=10**6) == b"".join(body)

    def test_an_empty_object_exists(self, store: Store) -> None:
        store.put("empty", [])
        assert store.get("empty", max_bytes=0) == b""
        entry = store.head("empty")
        assert entry is not None
        assert entry.stored_bytes == 0

    def test_a_large_object_comes_back_whole(self, store: Store) -> None:
        data = bytes(range(256)) * (12 * 4096)  # 12 MiB
        store.put("large", [memoryview(data)[:5_000_001], memoryview(data)[5_000_001:]])
        assert store.get("large", max_bytes=len(data)) == data

    def test_a_put_replaces_the_object(self, store: Store) -> None:
        store.put("key", [b"a longer first one"])
        store.put("key", [b"second"])
        assert store.get("key", max_bytes=100) == b"second"

    def test_a_put_if_absent_of_a_free_key_stores(self, store: Store) -> None:
        store.put("key", [b"first"], if_absent=True)
        assert store.get("key", max_bytes=100) == b"first"

    def test_an_absent_key_is_told_apart(self, store: Store) -> None:
        store.put("folder/object", [b"x"])
        for key in ("absent", "folder/absent", "folder"):
            assert store.head(key) is None
            with pytest.raises(ObjectNotFoundError) as caught:
                store.get(key, max_bytes=100)
            assert caught.value.key == key
            with pytest.raises(ObjectNotFoundError):
                store.get_into(key, 0, memoryview(bytearray(1)))

    def test_get_refuses_more_than_max_bytes(self, store: Store) -> None:
        store.put("key", [b"12345"])
        assert store.get("key", max_bytes=5) == b"12345"
        with pytest.raises(ResourceLimitError):
            store.get("key", max_bytes=4)

    def test_any_range_can_be_read(self, store: Store) -> None:
        data = bytes(range(256)) * 9000  # 2.3 MB: more than one read
        store.put("key", [data])
        for start, length in ((0, 1), (0, len(data)), (1, 1_500_000), (len(data) - 1, 1), (700, 0), (255, 257)):
            target = bytearray(length + 2)
            store.get_into("key", start, memoryview(target)[1 : length + 1])
            assert target == b"\0" + data[start : start + length] + b"\0"

    def test_a_target_of_wider_elements_is_filled(self, store: Store) -> None:
        numbers = array.array("q", range(100))
        store.put("key", [numbers.tobytes()])
        target = array.array("q", bytes(80))
        store.get_into("key", 8, memoryview(target))
        assert target == numbers[1:11]

    def test_a_range_beyond_the_end_is_corruption(self, store: Store) -> None:
        store.put("key", [b"12345"])
        for start, length in ((0, 6), (4, 2), (5, 1), (100, 1)):
            with pytest.raises(CorruptCheckpointError):
                store.get_into("key", start, memoryview(bytearray(length)))

    def test_head_tells_size_and_time(self, store: Store) -> None:
        store.put("key", [b"12345"])
        entry = store.head("key")
        assert entry is not None
        assert (entry.key, entry.stored_bytes) == ("key", 5)
        assert abs(entry.modified_s - time.time()) < 60

    def test_a_root_that_was_never_written_lists_nothing(self, store: Store) -> None:
        assert self.keys(store) == []
        assert self.keys(store, "a/", delimiter=True) == []
        store.delete(["absent", "a/absent"])

    def test_a_listing_is_in_the_order_of_keys(self, store: Store) -> None:
        names = ["a-b", "a.json", "a/b/c", "a/b.json", "a0", "b"]
        for name in reversed(names):
            store.put(name, [name.encode()])
        assert self.keys(store) == sorted(names)
        assert [entry.stored_bytes for entry in store.list()] == [len(name) for name in sorted(names)]

    def test_a_listing_keeps_to_its_prefix(self, store: Store) -> None:
        for name in ("step-1.json", "step-10.json", "step-1/a/x", "step-1/b", "other"):
            store.put(name, [b"x"])
        assert self.keys(store, "step-1") == ["step-1.json", "step-1/a/x", "step-1/b", "step-10.json"]
        assert self.keys(store, "step-1/") == ["step-1/a/x", "step-1/b"]
        assert self.keys(store, "step-1/b") == ["step-1/b"]
        assert self.keys(store, "none") == []

    def test_a_delimiter_folds_what_is_below(self, store: Store) -> None:
        for name in ("step-1.json", "step-1/a/x", "step-1/a/y", "step-1/b", "step-2/c/z"):
            store.put(name, [b"x"])
        assert self.keys(store, delimiter=True) == ["step-1.json", "step-1/", "step-2/"]
        assert self.keys(store, "step-1/", delimiter=True) == ["step-1/a/", "step-1/b"]
        assert self.keys(store, "step-1/a/", delimiter=True) == ["step-1/a/x", "step-1/a/y"]
        assert [entry.is_prefix for entry in store.list(delimiter=True)] == [False, True, True]

    def test_a_listing_can_start_behind_a_key(self, store: Store) -> None:
        for name in ("a", "b/c", "b/d", "e"):
            store.put(name, [b"x"])
        assert [entry.key for entry in store.list(start_after="a")] == ["b/c", "b/d", "e"]
        assert [entry.key for entry in store.list("b/", start_after="b/c")] == ["b/d"]
        assert [entry.key for entry in store.list(delimiter=True, start_after="b/")] == ["e"]

    def test_deleted_objects_are_gone_with_their_folders(self, store: Store) -> None:
        for name in ("a/b/c", "a/b/d", "a/e", "f"):
            store.put(name, [b"x"])
        store.delete(iter(["a/b/c", "a/b/d", "a/absent", "absent/absent"]))
        assert self.keys(store) == ["a/e", "f"]
        assert self.keys(store, "a/", delimiter=True) == ["a/e"]
        store.delete(["a/e", "f"])
        assert self.keys(store, delimiter=True) == []
        store.put("a/b/c", [b"again"])
        assert self.keys(store) == ["a/b/c"]

    def parts(self, store: Store, count: int) -> list[bytes]:
        part_bytes = max(store.min_part_bytes, 1000)
        return [bytes([65 + number]) * part_bytes for number in range(count - 1)] + [b"the last, shorter"]

    def test_an_upload_takes_parts_in_any_order_and_in_parallel(self, store: Store) -> None:
        parts = self.parts(store, 4)
        upload = store.start_upload("folder/uploaded")

        def send(number: int) -> None:
            view = memoryview(parts[number])
            upload.write(number + 1, number * len(parts[0]), [view[:7], view[7:]])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, (3, 1, 0, 2)))
        assert store.head("folder/uploaded") is None
        upload.complete()
        whole = b"".join(parts)
        assert store.get("folder/uploaded", max_bytes=len(whole)) == whole

    def test_a_part_sent_again_counts_once(self, store: Store) -> None:
        parts = self.parts(store, 2)
        upload = store.start_upload("key")
        upload.write(1, 0, [parts[0]])
        upload.write(2, len(parts[0]), [parts[1]])
        upload.write(1, 0, [parts[0]])
        upload.complete()
        assert store.get("key", max_bytes=10**8) == b"".join(parts)

    def test_an_aborted_upload_leaves_nothing(self, store: Store) -> None:
        upload = store.start_upload("folder/key")
        upload.write(1, 0, [bytes(store.min_part_bytes)])
        upload.abort()
        upload.abort()
        assert self.keys(store) == []

    def test_an_aborted_upload_cannot_be_completed(self, store: Store) -> None:
        upload = store.start_upload("key")
        upload.write(1, 0, [bytes(store.min_part_bytes)])
        upload.abort()
        with pytest.raises(StoreError):
            upload.complete()
        assert store.head("key") is None

    def test_abort_after_complete_keeps_the_object(self, store: Store) -> None:
        upload = store.start_upload("key")
        upload.write(1, 0, [b"content"])
        upload.complete()
        upload.abort()
        assert store.get("key", max_bytes=100) == b"content"

    def test_the_clock_is_the_one_that_stamps_objects(self, store: Store) -> None:
        store.put("key", [b"x"])
        entry = store.head("key")
        assert entry is not None
        assert abs(store.clock_s() - entry.modified_s) < 10
        store.delete(["key"])
        assert abs(store.clock_s() - entry.modified_s) < 10

    def test_a_root_that_was_never_written_has_a_clock_and_no_open_uploads(self, store: Store) -> None:
        assert abs(store.clock_s() - time.time()) < 60
        assert list(store.open_uploads()) == []

    def test_an_open_upload_is_found_and_ended_by_whoever_did_not_begin_it(self, store: Store) -> None:
        upload = store.start_upload("folder/key")
        upload.write(1, 0, [bytes(store.min_part_bytes)])
        for found in store.open_uploads():
            store.abort_upload(found)
            store.abort_upload(found)
        assert list(store.open_uploads()) == []
        store.put("folder/other", [b"x"])
        assert self.keys(store) == ["folder/other"]
        upload.abort()

    def test_an_upload_that_ended_is_not_open(self, store: Store) -> None:
        completed, aborted = store.start_upload("a/completed"), store.start_upload("a/aborted")
        for upload in (completed, aborted):
            upload.write(1, 0, [b"content"])
        completed.complete()
        aborted.abort()
        assert list(store.open_uploads()) == []
        assert self.keys(store) == ["a/completed"]

    def test_an_upload_that_was_touched_lately_is_not_idle(self, store: Store) -> None:
        upload = store.start_upload("folder/key")
        upload.write(1, 0, [bytes(store.min_part_bytes)])
        assert list(store.open_uploads(idle_since_s=store.clock_s() - 60)) == []
        assert list(store.open_uploads(idle_since_s=store.clock_s() + 60)) == list(store.open_uploads())
        upload.abort()

    def test_threads_may_share_the_store(self, store: Store) -> None:
        def cycle(number: int) -> bytes:
            store.put(f"t/{number}", [str(number).encode() * 1000])
            target = bytearray(1000)
            store.get_into(f"t/{number}", 0, memoryview(target))
            return bytes(target)

        assert cycle(0)  # alone: rclone's server fails when two requests make one folder
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(cycle, range(24)))
        assert found == [(str(number) * 1000).encode()[:1000] for number in range(24)]
        assert len(self.keys(store, "t/")) == 24

    @pytest.mark.parametrize("key", UNSAFE_KEYS)
    def test_a_key_that_could_leave_the_root_is_refused(self, store: Store, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.put(key, [b"x"]),
            lambda: store.start_upload(key),
            lambda: store.get(key, max_bytes=1),
            lambda: store.get_into(key, 0, memoryview(bytearray(1))),
            lambda: store.head(key),
            lambda: store.get_version(key, max_bytes=1),
            lambda: store.replace(key, [b"x"], Version(b"y", "")),
            lambda: store.remove(key, Version(b"y", "")),
            lambda: store.delete([key]),
        ]
        for call in calls:
            with pytest.raises(UnsafeCheckpointError):
                call()


class ConditionalContract(StoreContract):
    """A store whose `put(if_absent=True)` sees a taken key."""

    def test_a_put_if_absent_of_a_taken_key_raises_and_changes_nothing(self, store: Store) -> None:
        store.put("key", [b"first"], if_absent=True)
        with pytest.raises(ObjectExistsError) as caught:
            store.put("key", [b"second"], if_absent=True)
        assert caught.value.key == "key"
        assert store.get("key", max_bytes=100) == b"first"

    def test_a_version_holds_what_get_gives(self, store: Store) -> None:
        store.put("key", [b"first"])
        assert store.get_version("key", max_bytes=5).data == b"first"
        with pytest.raises(ResourceLimitError):
            store.get_version("key", max_bytes=4)
        with pytest.raises(ObjectNotFoundError):
            store.get_version("absent", max_bytes=4)

    @pytest.mark.parametrize("size", [3, 6, 300_000])
    def test_what_was_read_is_replaced(self, store: Store, size: int) -> None:
        store.put("key", [b"first"])
        store.replace("key", [b"x" * (size - 1), b"y"], store.get_version("key", max_bytes=100))
        assert store.get("key", max_bytes=size) == b"x" * (size - 1) + b"y"

    def test_an_object_that_came_meanwhile_is_not_replaced(self, store: Store) -> None:
        store.put("key", [b"first"])
        old = store.get_version("key", max_bytes=100)
        for another in (b"other", b"longer than the first"):
            store.put("key", [another])
            with pytest.raises(ObjectChangedError) as caught:
                store.replace("key", [b"mine"], old)
            assert caught.value.key == "key"
            assert not caught.value.unanswered
            assert store.get("key", max_bytes=100) == another

    def test_an_object_that_went_meanwhile_is_not_replaced(self, store: Store) -> None:
        store.put("folder/key", [b"first"])
        old = store.get_version("folder/key", max_bytes=100)
        store.delete(["folder/key"])
        with pytest.raises(ObjectNotFoundError) as caught:
            store.replace("folder/key", [b"mine"], old)
        assert not caught.value.unanswered
        assert self.keys(store) == []

    def test_what_was_read_is_removed(self, store: Store) -> None:
        store.put("a/key", [b"first"])
        store.put("b", [b"x"])
        old = store.get_version("a/key", max_bytes=100)
        store.remove("a/key", old)
        store.remove("a/key", old)
        assert self.keys(store) == ["b"]

    def test_what_was_removed_and_made_again_is_not_removed_by_the_old_version(self, store: Store) -> None:
        store.put("key", [b"first"])
        old = store.get_version("key", max_bytes=100)
        store.remove("key", old)
        store.put("key", [b"again"], if_absent=True)
        with pytest.raises(ObjectChangedError) as caught:
            store.remove("key", old)
        assert not caught.value.unanswered
        assert store.get("key", max_bytes=100) == b"again"

    def test_replacing_and_removing_leave_nothing_else_behind(self, store: Store) -> None:
        store.put("folder/key", [b"first"])
        store.replace("folder/key", [b"second"], store.get_version("folder/key", max_bytes=100))
        assert self.keys(store) == ["folder/key"]


class AtomicContract(ConditionalContract):
    """A store that also decides races: of writers with `if_absent`, and of those who read the same object."""

    def test_of_many_who_replace_what_they_read_one_wins(self, store: Store) -> None:
        store.put("raced", [b"base"])
        old = store.get_version("raced", max_bytes=100)
        barrier = threading.Barrier(8)

        def replace(number: int) -> bool:
            barrier.wait()
            try:
                store.replace("raced", [f"writer {number}".encode()], old)
            except ObjectChangedError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(replace, range(8)))
        assert won.count(True) == 1
        assert store.get("raced", max_bytes=100) == f"writer {won.index(True)}".encode()

    def test_each_object_ends_once_whoever_replaces_and_removes(self, store: Store) -> None:
        """Every move is noted by its doer: no object is replaced twice, and none goes that nobody replaced or removed."""
        barrier = threading.Barrier(6)

        def act(number: int) -> list[tuple[bytes | None, bytes | None]]:
            moves: list[tuple[bytes | None, bytes | None]] = []
            barrier.wait()
            for turn in range(25):
                mine = f"{number}-{turn}".encode()
                try:
                    old = store.get_version("raced", max_bytes=100)
                except ObjectNotFoundError:
                    try:
                        store.put("raced", [mine], if_absent=True)
                        moves.append((None, mine))
                    except ObjectExistsError:
                        pass
                    continue
                try:
                    if (number + turn) % 3:
                        store.replace("raced", [mine], old)
                        moves.append((old.data, mine))
                    else:
                        store.remove("raced", old)
                        moves.append((old.data, None))
                except (ObjectChangedError, ObjectNotFoundError):
                    pass
            return moves

        with ThreadPoolExecutor(6) as pool:
            moves = [move for found in pool.map(act, range(6)) for move in found]
        begun = {new for _, new in moves if new is not None}
        replaced = [old for old, new in moves if old is not None and new is not None]
        removed = {old for old, new in moves if new is None}
        assert len(replaced) == len(set(replaced))
        left = begun - set(replaced) - removed
        try:
            assert left == {store.get("raced", max_bytes=100)}
        except ObjectNotFoundError:
            assert not left

    def test_of_many_writers_with_if_absent_one_wins(self, store: Store) -> None:
        barrier = threading.Barrier(8)

        def write(number: int) -> bool:
            barrier.wait()
            try:
                store.put("raced", [f"writer {number}".encode()], if_absent=True)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert store.get("raced", max_bytes=100) == f"writer {won.index(True)}".encode()
