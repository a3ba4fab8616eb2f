"""What an error says: its facts, once, and what it says of others."""

import re
from collections.abc import Callable

import pytest

from asyncckpt import RetryPolicy, Saver, errors
from asyncckpt.format.index import Index
from asyncckpt.format.record import Outline
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from asyncckpt.store.s3_checksums import Checksums
from tests.faulty import FaultyStore

ALWAYS = range(1, 10**6)
FACTS = re.compile(r"\[(?:step|key) [^\]]*\]")


def retrying(inner: FaultyStore) -> RetryingStore:
    return RetryingStore(inner, RetryPolicy(deadline_s=0.02, first_wait_s=0.001, max_wait_s=0.002))


def failed_save(*operations: str) -> errors.CheckpointError:
    def fail() -> Exception:
        return errors.TransientStoreError("no answer", key="step-0000000001/shard", step=1)

    store = retrying(FaultyStore(MemoryStore(), ALWAYS, operations=set(operations), error=fail))
    saver = Saver("memory://", store=store)
    saver.save(1, {"n": 1})
    with pytest.raises(errors.SaveFailedError) as caught:
        saver.close()
    return caught.value


def changed_body() -> errors.CheckpointError:
    checksums = Checksums("crc32c", lambda *_, **__: None, lambda _: None)
    error: errors.StoreError = errors.TransientStoreError("BadDigest", key="shard")
    for _ in range(3):
        error = checksums.changed("shard", 0, errors.TransientStoreError("BadDigest", key="shard"))
    return error.at(step=1, key="shard")


def newer(parse: Callable[[], object]) -> errors.CheckpointError:
    with pytest.raises(errors.CheckpointError) as caught:
        parse()
    return caught.value.at(step=1, key="step-0000000001.json")


@pytest.mark.parametrize(
    "provoke",
    [
        lambda: failed_save("put"),
        lambda: failed_save("put", "start_upload"),
        changed_body,
        lambda: newer(lambda: Index.parse(b"[" * 10**5)),
        lambda: newer(lambda: Outline.parse(b'{"a":' * 100, "step-0000000001.json")),
    ],
)
def test_a_message_names_step_and_key_once(provoke: Callable[[], errors.CheckpointError]) -> None:
    said = str(provoke())
    assert len(FACTS.findall(said)) == 1, said
    assert said.count("key ") == 1


def test_the_key_of_the_last_failure_survives_the_deadline() -> None:
    """A deletion is tried as a whole, and one of its keys is the one that fails."""
    inner = FaultyStore(MemoryStore(), ALWAYS, error=lambda: errors.TransientStoreError("no answer", key="second"))
    with pytest.raises(errors.DeadlineExceededError) as caught:
        retrying(inner).delete(["first", "second"])
    assert caught.value.key == "second"
    assert str(caught.value).endswith("the last said: no answer [key second]")


def test_failures_of_several_saves_each_name_their_own_step_and_key() -> None:
    failures = {
        1: errors.StoreError("full", step=1, key="a"),
        2: errors.StoreError("away", step=2, key="b"),
    }
    said = str(errors.SaveFailedError(failures))
    assert (
        said
        == "2 save(s) did not commit: step 1: StoreError: full [step 1, key a]; step 2: StoreError: away [step 2, key b]"
    )
