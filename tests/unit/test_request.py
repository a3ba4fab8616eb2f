"""What a record cannot hold is refused by `save()` at once, and nothing is stored."""

import numpy as np
import pytest
import torch

import asyncckpt

STATE = {"model": {"weight": torch.arange(3)}}


@pytest.mark.parametrize(
    "said",
    [
        *({"epoch": epoch} for epoch in (1.5, "a", True, -1, np.int64(2), 2**60)),
        *({"tags": tags} for tags in ("one", [1], [None])),
        *({"pin": pin} for pin in ("yes", 1, None)),
        *({"metrics": metrics} for metrics in (5, {"loss": "low"}, {1: 2.0}, [("loss", 1)])),
    ],
    ids=str,
)
def test_save_refuses_what_a_record_cannot_hold(tmp_path, said):
    with asyncckpt.Saver(tmp_path) as saver:
        with pytest.raises((TypeError, ValueError)):
            saver.save(1, STATE, **said)
        saver.save(2, STATE, epoch=3, tags=["a"], pin=True, metrics={"loss": torch.tensor(0.5), "n": np.float32(2)})
    assert [checkpoint.step for checkpoint in asyncckpt.Run(tmp_path).checkpoints()] == [2]
    assert asyncckpt.Run(tmp_path).latest().metrics == {"loss": 0.5, "n": 2.0}


@pytest.mark.parametrize("step", [1.0, True, -1, 2**53 + 1, 10**4000, np.int64(3), "3"])
def test_a_step_is_an_int(tmp_path, step):
    with asyncckpt.Saver(tmp_path) as saver, pytest.raises(ValueError, match="optimizer steps completed"):
        saver.save(step, STATE)


@pytest.mark.parametrize("step", ["lates", 1.0, None, True])
def test_a_misspelt_choice_of_a_checkpoint_raises(tmp_path, step):
    with asyncckpt.Saver(tmp_path) as saver:
        saver.save(1, STATE)
    with pytest.raises(ValueError, match="whole number"):
        asyncckpt.load(tmp_path, step=step)


@pytest.mark.parametrize(
    "keywords",
    [{"store": {"endpoint_url": "http://localhost"}}, {"keep": [3]}, {"keep": asyncckpt.KeepLast(3)}],
    ids=str,
)
def test_a_saver_refuses_keywords_of_the_wrong_kind(tmp_path, keywords):
    with pytest.raises(TypeError):
        asyncckpt.Saver(tmp_path, **keywords)


def test_a_url_without_its_colon_is_no_folder():
    with pytest.raises(ValueError, match="colon"):
        asyncckpt.Saver("s3//bucket/run")


def test_restore_of_a_bare_module_says_what_to_pass(tmp_path):
    with pytest.raises(asyncckpt.errors.StateMismatchError, match="dict"):
        asyncckpt.restore(tmp_path, torch.nn.Linear(1, 1))


def test_a_folder_that_cannot_be_made_is_a_local_io_error():
    with asyncckpt.Saver("/proc/asyncckpt") as saver, pytest.raises(asyncckpt.errors.LocalIOError):
        saver.save(1, STATE).result()


def test_metrics_and_tags_are_those_of_the_call(tmp_path):
    loss, tags = torch.tensor(0.5), ["a"]
    with asyncckpt.Saver(tmp_path, when_full="wait") as saver:
        save = saver.save(1, {"model": torch.nn.Linear(2, 2)}, metrics={"loss": loss}, tags=tags)
        loss.fill_(9)
        tags.append("b")
        save.result()
    latest = asyncckpt.Run(tmp_path).latest()
    assert latest.metrics == {"loss": 0.5}
    assert list(latest.tags) == ["a"]


class Mute:
    """A value whose text nobody can have."""

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "said",
    [
        *({"metrics": {"loss": value}} for value in (10**400, -(10**400), 10**5000, Mute(), [10**5000])),
        *({name: 10**5000} for name in ("epoch", "tags", "pin", "metrics", "step")),
        *({name: Mute()} for name in ("epoch", "tags", "pin", "metrics", "step")),
        {"tags": [10**5000]},
    ],
)
def test_a_value_of_any_size_is_refused_by_its_name(tmp_path, said):
    """An int of more than 4300 digits has no text in Python, so a message that holds it would fail itself."""
    with asyncckpt.Saver(tmp_path, engine="inline") as saver:
        with pytest.raises((TypeError, ValueError)) as caught:
            saver.save(**{"step": 1, "state": {"n": 1}, **said})
        assert "int_max_str" not in str(caught.value)
        assert ("loss" if isinstance(said.get("metrics"), dict) else next(iter(said))) in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_relative_path_from_a_deleted_folder_is_told(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    asyncckpt.Saver(tmp_path / "run", engine="inline").close()
    with asyncckpt.Saver(tmp_path / "run", engine="inline") as saver:
        saver.save(1, {"model": {"w": torch.ones(3)}}).result(30)
    monkeypatch.chdir(gone)
    gone.rmdir()
    for use in (
        lambda: asyncckpt.Saver("run"),
        lambda: asyncckpt.load("run"),
        lambda: asyncckpt.Run("run"),
        lambda: asyncckpt.Run(tmp_path / "run").latest().export("out.safetensors"),
    ):
        with pytest.raises(asyncckpt.errors.StoreNotFoundError, match="working directory of this process was deleted"):
            use()


def test_a_home_of_nobody_is_no_place():
    with pytest.raises(ValueError, match="~no-such-user"):
        asyncckpt.Saver("~no-such-user/run")
