import pytest
import torch

from asyncckpt import S3Options, errors, load
from asyncckpt.run import Run
from asyncckpt.store.opening import open_store
from tests.writer import tensor_bytes, write_checkpoint


@pytest.mark.parametrize("codec", ["planes", "none"])
def test_a_checkpoint_on_s3_is_loaded_verified_and_named(codec, moto_endpoint, s3_bucket):
    url, options = f"s3://{s3_bucket}/run", S3Options(endpoint_url=moto_endpoint, single_writer=True)
    state = {"model": {f"w{n}": torch.randn(400_000) for n in range(12)}, "n": 3}
    with open_store(url, options) as store:
        for step in (1, 2):
            write_checkpoint(store, step, state, codec=codec)
    loaded = load(url, store=options)
    assert {name: tensor_bytes(one) for name, one in loaded["model"].items()} == {
        name: tensor_bytes(one) for name, one in state["model"].items()
    }
    with Run(url, store=options) as run:
        assert [checkpoint.step for checkpoint in run.checkpoints()] == [1, 2]
        run.latest().verify()
        assert run.rewind(1) == [2]
        assert run.latest().step == 1


def test_a_missing_bucket_is_no_empty_run(moto_endpoint):
    with pytest.raises(errors.StoreNotFoundError):
        load("s3://no-such-bucket-here/run", store=S3Options(endpoint_url=moto_endpoint))
