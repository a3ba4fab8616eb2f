"""The store goes away in the middle of a save and comes back."""

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

import asyncckpt
from asyncckpt import KeepLast, RetryPolicy, Run, S3Options, Saver, errors, events
from tests.processes import PATIENCE_S, alive, eventually
from tests.proxy import Proxy
from tests.trainers import FAST, TunedSaver, s3
from tests.training import Training, assert_same


@pytest.mark.parametrize("outage_s", [3.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_the_save_completes_and_training_never_stops(proxy, s3_url, outage_s):
    seen = []
    training = Training().step(2)
    longest_step_s = 0.0
    with Saver(s3_url, store=s3(proxy.url), hooks=[seen.append], when_full="skip") as saver:
        saver.save(1, training.state).result(PATIENCE_S)
        proxy.delay_s = 0.02  # so that the outage falls into the middle
        save = saver.save(2, training.state)
        expected = training.facts()
        proxy.down = True
        proxy.delay_s = 0.0
        steps, began_s = 0, time.monotonic()
        while time.monotonic() - began_s < outage_s:
            started_s = time.monotonic()
            training.step()
            steps += 1
            longest_step_s = max(longest_step_s, time.monotonic() - started_s)
        assert not save.done()
        assert [event for event in seen if isinstance(event, events.StoreRetried)]
        proxy.down = False
        report = save.result(PATIENCE_S)
    assert report.skipped is None
    assert report.retries > 0
    assert steps > 10 * outage_s
    assert longest_step_s < 1.0
    other = Training(seed=5).step()
    assert asyncckpt.restore(s3_url, other.state, store=s3(proxy.url)).step == 2
    assert_same(other.facts(), expected)


def test_an_answer_to_the_commit_that_is_lost_is_one_checkpoint(proxy, moto_endpoint, s3_url):
    """The record's put took effect and the connection broke: our own record is found, and no second one is made."""
    training = Training().step()
    with Run(s3_url, store=s3(moto_endpoint)) as beside, Saver(s3_url, store=s3(proxy.url)) as saver:
        saver.save(1, training.state).result(PATIENCE_S)
        rested = saver._launcher._engine._rested
        eventually(rested.is_set, "what follows the first commit is done: no other answer is lost")
        proxy.delay_s = 0.15
        save = saver.save(2, training.state)
        eventually(lambda: beside.latest().step == 2, "the record stands")
        proxy.drop_responses = 1  # its answer is still on the way
        proxy.delay_s = 0.0
        report = save.result(PATIENCE_S)
        assert proxy.drop_responses == 0
        assert report.retries > 0
        assert report.skipped is None, "our own commit was taken for somebody else's"
        assert [checkpoint.step for checkpoint in beside.checkpoints()] == [1, 2]
        beside.latest().verify()


def test_a_store_that_is_down_from_the_start_holds_the_first_save_for_a_bounded_time_and_training_goes_on(
    proxy, s3_url
):
    """Nobody can look whose folder it is, so the first save waits a little, and then the engine looks before it commits."""
    proxy.down = True
    training = Training().step()
    seen = []
    patient = replace(FAST, first_contact_s=3.0)
    with Saver(s3_url, store=replace(s3(proxy.url), retry=patient), hooks=[seen.append]) as saver:
        began_s = time.monotonic()
        save = saver.save(1, training.state)
        assert 3.0 <= time.monotonic() - began_s < 13.0
        assert [event for event in seen if isinstance(event, events.StoreRetried)], "nobody is told why it waits"
        asked = proxy.connections
        eventually(lambda: proxy.connections > asked + 3, "it asks again and again")
        assert not save.done()
        proxy.down = False
        assert save.result(PATIENCE_S).retries > 0


def groups(count, elements=1000):
    return {f"group-{number}": {"weight": torch.randn(elements)} for number in range(count)}


@pytest.mark.parametrize("options", [{"workers": 2}, {"engine": "inline"}], ids=["service", "inline"])
def test_a_save_of_many_shards_fails_after_one_deadline_and_close_waits_for_no_removal(proxy, s3_url, options):
    retry = RetryPolicy(deadline_s=1.5, first_wait_s=0.02, max_wait_s=0.1, first_contact_s=0.5)
    saver = Saver(s3_url, store=S3Options(endpoint_url=proxy.url, retry=retry), codec="none", **options)
    saver.save(1, groups(1)).result(PATIENCE_S)
    proxy.down = True
    began_s = time.monotonic()
    with pytest.raises(errors.DeadlineExceededError, match="nothing of this save could be stored"):
        saver.save(2, groups(64)).result(PATIENCE_S)
    failed_s = time.monotonic() - began_s
    saver.close()
    assert time.monotonic() - began_s < retry.deadline_s + 2
    assert failed_s >= retry.deadline_s


def test_the_service_ends_by_itself_when_the_store_is_back_and_has_removed_what_the_failed_save_stored(
    proxy, moto_endpoint, s3_url
):
    retry = RetryPolicy(deadline_s=1.0, first_wait_s=0.02, max_wait_s=0.1, first_contact_s=0.5)
    with asyncckpt.Run(s3_url, store=s3(moto_endpoint)) as beside:
        saver = Saver(s3_url, store=S3Options(endpoint_url=proxy.url, retry=retry), codec="none", keep=[KeepLast(5)])
        saver.save(1, groups(1)).result(PATIENCE_S)
        service = saver._launcher._engine.pid
        proxy.delay_s = 0.05  # so that the outage falls into the middle
        save = saver.save(2, groups(64))
        eventually(lambda: list(beside._store.list("step-0000000002/")), "something of it is stored")
        proxy.down = True
        with pytest.raises(errors.DeadlineExceededError):
            save.result(PATIENCE_S)
        saver.close()
        assert alive(service)
        proxy.delay_s = 0.0
        proxy.down = False
        eventually(lambda: not alive(service), "the service ends")
        assert list(beside._store.list("step-0000000002/")) == []


@pytest.mark.parametrize("engine", ["service", "inline"])
def test_close_with_a_timeout_ends_in_time_and_the_save_goes_on_without_the_saver(proxy, s3_url, engine):
    saver = Saver(s3_url, store=s3(proxy.url), engine=engine)
    saver.save(1, groups(1)).result(PATIENCE_S)
    proxy.down = True
    saver.save(2, groups(3))
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"step 2 is not committed after 0\.3 s; it goes on"):
        saver.close(timeout=0.3)
    assert time.monotonic() - began_s < 2
    with pytest.raises(errors.CheckpointError, match="closed"):
        saver.save(3, groups(1))
    proxy.down = False
    with Run(s3_url, store=s3(proxy.url)) as run:
        eventually(lambda: run.latest().step == 2, "it is committed")


def test_an_outage_is_told_while_save_waits_and_when_it_is_over(proxy, s3_url, caplog):
    seen = []
    saver = TunedSaver(s3_url, store=s3(proxy.url), hooks=[seen.append], engine_options={"away_s": 0.5})
    with caplog.at_level(logging.WARNING, "asyncckpt"), saver:
        saver.save(1, groups(1)).result(PATIENCE_S)
        proxy.down = True
        saver.save(2, groups(1))
        waiting = threading.Thread(target=saver.save, args=(3, groups(1)))  # its arena is taken
        waiting.start()
        eventually(lambda: [event for event in seen if isinstance(event, events.StoreAway)], "the outage is told")
        assert waiting.is_alive()
        proxy.down = False
        waiting.join(PATIENCE_S)
    away, back = (record.getMessage() for record in caplog.records)
    assert away.startswith(f"cannot reach {s3_url}: no answer for 1 s; retrying until ")
    assert "save() waits: 1 of 1 snapshots in flight" in away
    assert back.startswith(f"{s3_url} answers again, after ")
    (told,) = [event for event in seen if isinstance(event, events.StoreAway)]
    assert told.saves_in_flight == 1
    assert 40 < told.left_s <= FAST.deadline_s


def test_at_a_wrong_address_each_save_fails_in_time_and_training_goes_on(s3_url):
    nowhere = replace(s3("http://127.0.0.1:9"), retry=replace(FAST, first_contact_s=0.3))
    saver = Saver(s3_url, store=nowhere)
    began_s = time.monotonic()
    for step in (1, 2):
        with pytest.raises(errors.StoreNotFoundError, match=r"127\.0\.0\.1:9.*check the endpoint"):
            saver.save(step, groups(1)).result(PATIENCE_S)
    saver.close()
    assert time.monotonic() - began_s < 15


def test_a_restarted_service_is_not_at_first_contact(s3_bucket, moto_endpoint):
    """Nobody listens at the address for a while, which would be a wrong address to somebody who never had an answer."""
    with Proxy(moto_endpoint) as proxy:
        port = int(proxy.url.rpartition(":")[2])
        store = replace(s3(proxy.url), retry=replace(FAST, first_contact_s=0.3))
        saver = Saver(f"s3://{s3_bucket}/run", store=store)
        saver.save(1, groups(1)).result(PATIENCE_S)
    os.kill(saver._launcher._engine.pid, signal.SIGKILL)
    save = saver.save(2, groups(1))
    with pytest.raises(TimeoutError):
        save.result(1.5)
    with Proxy(moto_endpoint, port) as proxy:
        assert save.result(PATIENCE_S).skipped is None
        saver.close()
