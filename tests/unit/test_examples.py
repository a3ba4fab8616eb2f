"""The parts of the examples that the proof of the demo rests on."""

import argparse
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return load_script("demo")


@pytest.fixture(scope="module")
def train_gpt():
    return load_script("train_gpt")


def take(loader, count):
    return [torch.cat(loader.next_batch(), dim=1).tolist() for _ in range(count)]


def test_a_loader_that_takes_the_state_of_another_reads_on_where_that_one_stood(train_gpt):
    settings = {"batch": 4, "window": 128, "max_bytes": 4096}  # 7 batches an epoch
    first, second = train_gpt.Loader(**settings, seed=0), train_gpt.Loader(**settings, seed=9)
    take(first, 10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.epoch == 1
    assert take(second, 10) == take(first, 10)


def test_a_loader_shows_every_window_once_an_epoch_in_another_order_each_time(train_gpt):
    loader = train_gpt.Loader(batch=4, window=128, seed=0, max_bytes=4 * 128 * 3 + 1)
    epochs = [[tuple(row) for rows in take(loader, 3) for row in rows] for _ in range(2)]
    assert len(set(epochs[0])) == 12
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_the_model_shares_one_weight_between_input_and_output(train_gpt):
    model = train_gpt.GPT(width=32, layers=1, heads=2, window=8)
    assert model.head.weight is model.bytes.weight
    assert model(torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, 256)


def test_a_position_of_the_model_sees_nothing_of_what_comes_after_it(train_gpt):
    model = train_gpt.GPT(width=32, layers=2, heads=2, window=8).eval()
    one, other = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    other[0, 5:] = 7
    assert torch.equal(model(one)[0, :5], model(other)[0, :5])
    assert not torch.equal(model(one)[0, 5], model(other)[0, 5])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.zeros(2), torch.zeros(2, 1), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (torch.empty(0), torch.empty(0), True),
        (1, 1.0, False),
        ("cos", "cos", True),
    ],
)
def test_the_demo_compares_bits_not_values(demo, one, other, same):
    assert demo.same_bits(one, other) is same


def test_the_demo_fails_on_a_loss_that_differs_in_its_last_bit(demo):
    reference = {1: (3.0).hex(), 2: (2.0).hex()}
    demo.compare_losses("after the kill", reference, {2: (2.0).hex()})
    with pytest.raises(demo.DemoError, match="after the kill: the loss at step 2"):
        demo.compare_losses("after the kill", reference, {2: float.fromhex("0x1.0000000000001p+1").hex()})


def test_the_demo_reads_a_log_whose_last_line_was_cut_by_the_kill(demo, tmp_path):
    log = tmp_path / "killed.log"
    log.write_text('{"step": 1, "loss": 3.0, "hex": "0x1.8p+1"}\n{"saved": {"step": 1}}\n{"step": 2, "lo')
    assert demo.read_log(log) == ({1: "0x1.8p+1"}, [{"step": 1}])


def test_the_demo_shows_one_aligned_row_a_save(demo, capsys):
    times = {f"{name}_s": 0.25 for name in ("call", "hook_wait", "staged", "encode", "upload", "commit", "total")}
    demo.print_reports("Saves", [{"step": 5, **times, "raw_bytes": 10**6, "stored_bytes": 850_000}])
    title, header, row = capsys.readouterr().out.strip().splitlines()
    assert title == "Saves"
    assert len(header) == len(row)
    assert row.split() == ["5", "250.00", "250.00", "250", "250", "250", "250", "0.850", "4"]


def test_the_demo_lets_no_real_credential_reach_its_runs(demo):
    environ = {"AWS_SESSION_TOKEN": "real", "AWS_PROFILE": "real", "AWS_ACCESS_KEY_ID": "real", "HOME": "/home/me"}
    demo.use_credentials_for_moto(environ)
    assert "real" not in environ.values()
    assert environ["HOME"] == "/home/me"
    assert environ["AWS_ACCESS_KEY_ID"]


def test_the_server_of_the_demo_answers_on_loopback_and_ends_with_its_block(demo, tmp_path):
    with demo.moto_server(tmp_path) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        listening = (tmp_path / "moto.log").read_text()
    assert url in listening


def test_a_server_that_ends_at_once_is_an_error_with_its_own_words(demo, tmp_path):
    output = tmp_path / "moto.log"
    output.write_text("no module named moto")
    ended = argparse.Namespace(poll=lambda: 1)
    with pytest.raises(demo.DemoError, match="no module named moto"):
        demo.wait_for_url(ended, output)
