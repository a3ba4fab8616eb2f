import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from asyncckpt import errors
from asyncckpt.export import Names, export_huggingface
from asyncckpt.run import Checkpoint, Run
from asyncckpt.store.memory import MemoryStore
from tests.writer import tensor_bytes, write_checkpoint

transformers = pytest.importorskip("transformers")


def checkpoint_of(state, **options) -> Checkpoint:
    store = MemoryStore()
    write_checkpoint(store, 1, state, **options)
    return Run("memory://unused", store=store).get(1)


def bits(tensors) -> dict[str, tuple]:
    return {name: (one.dtype, tuple(one.shape), tensor_bytes(one)) for name, one in tensors.items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 300), nn.BatchNorm1d(300), nn.Linear(300, 2)).to(torch.bfloat16)


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
def test_one_file_holds_the_model_under_its_own_names(codec, tmp_path):
    module = model()
    path = tmp_path / "m.safetensors"
    checkpoint_of({"model": module, "other": {"x": torch.ones(3)}}, codec=codec).export(path)
    assert bits(load_file(path)) == bits(module.state_dict())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert names_in(tmp_path) == ["m.safetensors"]


def test_an_export_replaces_the_file_that_was_there(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    checkpoint_of({"model": {"w": torch.ones(3)}}).export(path)
    assert load_file(path)["w"].tolist() == [1, 1, 1]


def test_a_prefix_chooses_what_is_written(tmp_path):
    state = {"model": {"w": torch.ones(3)}, "ema": {"shadow": {"w": torch.zeros(3)}}}
    checkpoint_of(state).export(tmp_path / "a", prefix="ema/shadow")
    assert load_file(tmp_path / "a")["w"].tolist() == [0, 0, 0]
    with pytest.raises(errors.StateMismatchError, match="nothing"):
        checkpoint_of(state).export(tmp_path / "b", prefix="nothing")


def test_without_a_model_everything_is_written(tmp_path):
    checkpoint_of({"w": torch.ones(3), "b": {"c": torch.zeros(2)}}).export(tmp_path / "a")
    assert set(load_file(tmp_path / "a")) == {"w", "b/c"}


def test_a_common_beginning_is_stripped(tmp_path):
    checkpoint = checkpoint_of({"model": {"module.w": torch.ones(3), "module.b": torch.ones(3)}})
    checkpoint.export(tmp_path / "a", strip="module.")
    assert set(load_file(tmp_path / "a")) == {"w", "b"}
    with pytest.raises(errors.StateMismatchError, match="begins with"):
        checkpoint.export(tmp_path / "b", strip="modul3.")
    clash = checkpoint_of({"model": {"x.w": torch.ones(3), "w": torch.ones(3)}})
    with pytest.raises(ValueError, match="both"):
        clash.export(tmp_path / "b", strip="x.")


def test_keys_are_written_as_the_module_knows_them(tmp_path):
    names = ["a%b", "c@d", "#e", "plain"]
    checkpoint_of({"model": {name: torch.ones(1) for name in names}}).export(tmp_path / "a")
    assert set(load_file(tmp_path / "a")) == set(names)


def test_floating_tensors_are_cast_and_others_are_not(tmp_path):
    state = {"w": torch.randn(50), "n": torch.arange(3), "h": torch.ones(2, dtype=torch.float64)}
    checkpoint_of({"model": state}).export(tmp_path / "a", dtype="bfloat16")
    found = load_file(tmp_path / "a")
    assert bits(found) == bits({"w": state["w"].bfloat16(), "n": state["n"], "h": state["h"].bfloat16()})
    with pytest.raises(ValueError, match="floating"):
        checkpoint_of({"model": state}).export(tmp_path / "b", dtype="int8")


def test_tied_tensors_are_written_once(tmp_path):
    shared = torch.randn(50)
    checkpoint_of({"a": {"w": shared}, "model": {"w": shared, "head": shared}}).export(tmp_path / "m")
    assert bits(load_file(tmp_path / "m")) == bits({"w": shared})


def test_a_failed_export_leaves_nothing(tmp_path):
    store = MemoryStore()
    write_checkpoint(store, 1, {"model": {"w": torch.randn(100_000)}})
    checkpoint = Run("memory://unused", store=store).get(1)
    shard = next(entry.key for entry in store.list() if "model-" in entry.key)
    data = bytearray(store.get(shard, max_bytes=2**30))
    data[len(data) // 2] ^= 1
    store.put(shard, [data])
    for form in ("safetensors", "huggingface"):
        with pytest.raises(errors.CorruptCheckpointError) as caught:
            checkpoint.export(tmp_path / "m", format=form)
        assert (caught.value.step, caught.value.key) == (1, shard)
    assert names_in(tmp_path) == []


def test_a_type_that_safetensors_lacks_is_named(tmp_path):
    with pytest.raises(errors.UnsupportedTensorError, match="complex128"):
        checkpoint_of({"model": {"c": torch.ones(3, dtype=torch.complex128)}}).export(tmp_path / "m")
    assert names_in(tmp_path) == []


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="huggingface"):
        checkpoint_of({"model": {"w": torch.ones(3)}}).export(tmp_path / "m", format="onnx")


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError):
        checkpoint_of({"model": {"w": torch.ones(3)}}).export(tmp_path / "file" / "m")


# -- Hugging Face


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=16)
    return transformers.GPT2LMHeadModel, config


def llama(*, tied=False):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=100, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM, config


@pytest.mark.parametrize("made", [gpt2(), llama(), llama(tied=True)], ids=["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_transformers_loads_the_folder_bit_exact(made, as_dict, tmp_path):
    kind, config = made
    torch.manual_seed(1)
    original = kind(config)
    given = json.loads(json.dumps(config.to_dict())) if as_dict else config
    checkpoint_of({"model": original}).export(tmp_path / "hf", format="huggingface", config=given)
    loaded, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True, local_files_only=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert bits(loaded.state_dict()) == bits(original.state_dict())
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded.eval()(tokens).logits, original.eval()(tokens).logits)


def test_a_cast_folder_says_its_dtype(tmp_path):
    kind, config = llama()
    original = kind(config)
    checkpoint_of({"model": original}).export(
        tmp_path / "hf", format="huggingface", config=config, dtype=torch.bfloat16
    )
    loaded = kind.from_pretrained(tmp_path / "hf", dtype="auto", local_files_only=True)
    assert loaded.dtype is torch.bfloat16
    assert bits(loaded.state_dict()) == bits(original.to(torch.bfloat16).state_dict())
    assert config.to_dict().get("dtype") != "bfloat16", "the caller's own config is not changed"


def test_a_large_model_is_cut_into_files_that_transformers_joins(tmp_path):
    kind, config = llama()
    original = kind(config)
    checkpoint = checkpoint_of({"model": original})
    names = Names.of(checkpoint._index, checkpoint.names(), prefix="model", strip="", step=1)
    export_huggingface(checkpoint._tensors, names, tmp_path / "hf", config=config, shard_bytes=30_000)
    files = names_in(tmp_path / "hf")
    assert files[0] == "config.json"
    assert files[1] == f"model-00001-of-{len(files) - 2:05d}.safetensors"
    assert len(files) > 4
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in original.state_dict().values())
    loaded = kind.from_pretrained(tmp_path / "hf", local_files_only=True)
    assert bits(loaded.state_dict()) == bits(original.state_dict())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    with pytest.raises(errors.LocalIOError, match="not empty"):
        checkpoint_of({"model": {"w": torch.ones(3)}}).export(tmp_path / "hf", format="huggingface")
    assert names_in(tmp_path / "hf") == ["mine"]
    (tmp_path / "hf" / "mine").unlink()
    checkpoint_of({"model": {"w": torch.ones(3)}}).export(tmp_path / "hf", format="huggingface")
    assert names_in(tmp_path / "hf") == ["model.safetensors"]
