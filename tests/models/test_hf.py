import json
import tracemalloc
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_jax.models import (
    ModelCard,
    ModelConfig,
    Transformer,
    load_hf,
    load_hf_reward_model,
    save,
    save_hf,
    save_hf_reward_model,
)
from rlhf_jax.sampling import generate
from rlhf_jax.sharding import to_host

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9))

SHAPES = {
    "plain, tied": {"tie_word_embeddings": True},
    "grouped queries, wide heads, untied": {"num_key_value_heads": 1, "head_dim": 10},
    "other theta and epsilon": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-3,
    },
}


def torch_model(**changes):
    """A small Llama whose every weight matters: norms are not 1, logits are of order 1."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.3 * torch.randn_like(weight))
    return model


def torch_logits(model):
    with torch.no_grad():
        return model.float()(torch.tensor(TOKENS)).logits.numpy()


@cache
def forward(config):
    return jax.jit(Transformer(config).apply)


def jax_logits(config, params, tokens=TOKENS):
    return forward(config)({"params": params}, jnp.asarray(tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_torch_checkpoint_loads_with_the_same_logits_and_goes_back(shape, tmp_path):
    theirs = torch_model(**SHAPES[shape])
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    expected = torch_logits(theirs)
    assert expected.std() > 0.3
    assert_allclose(jax_logits(config, params), expected, atol=1e-4)

    save_hf(tmp_path / "out", config, params)
    back, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_allclose(torch_logits(back), expected, atol=1e-4)
    again, same = load_hf(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_read_exactly(dtype, tmp_path):
    theirs = torch_model().to(dtype)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    config, params = load_hf(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert_array_equal(params["embedding"], theirs.model.embed_tokens.weight.detach().float().numpy())
    # Loaded anew: casting the model itself would leave its rotary frequencies rounded.
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_allclose(jax_logits(config, params), torch_logits(again), atol=1e-4)


def test_shards_are_read_by_their_index(tmp_path):
    theirs = torch_model()
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config, params = load_hf(str(tmp_path))
    assert_allclose(jax_logits(config, params), torch_logits(theirs), atol=1e-4)


def test_saving_over_shards_replaces_them(tmp_path):
    torch_model().save_pretrained(tmp_path, max_shard_size="4KB")
    config, params = load_hf(tmp_path)
    params["embedding"] += 1.0
    save_hf(tmp_path, config, params)
    chex.assert_trees_all_equal(load_hf(tmp_path)[1], params)
    back = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_array_equal(back.model.embed_tokens.weight.detach().numpy(), params["embedding"])


CONFIG = ModelConfig(
    vocab_size=32, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=12,
    rope_theta=5_000.0, norm_eps=1e-5, tie_embeddings=False, max_length=64,
)  # fmt: skip


def new_params(config):
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.asarray(TOKENS))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def test_scanned_layers_are_saved_as_layers(tmp_path):
    scanned = replace(CONFIG, scan_layers=True)
    params = new_params(scanned)
    save_hf(tmp_path, scanned, params)
    config, loaded = load_hf(tmp_path)
    assert config == CONFIG
    assert_array_equal(loaded["layer_1"]["gate"]["kernel"], params["layers"]["gate"]["kernel"][1])
    expected = jax_logits(scanned, params)
    assert_allclose(jax_logits(config, loaded), expected, atol=1e-5)
    assert_allclose(torch_logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4)


def test_a_card_names_data_algorithm_and_metrics(tmp_path):
    card = ModelCard(algorithm="DPO, β = 0.1", data="pairs.jsonl", base_model="some/base", metrics={"accuracy": 0.71})
    save_hf(tmp_path, CONFIG, new_params(CONFIG), card=card)
    found = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert found.data.to_dict() == {"library_name": "transformers", "base_model": "some/base"}
    for words in ("LlamaForCausalLM", "Algorithm: DPO, β = 0.1", "Data: pairs.jsonl", "| accuracy | 0.71 |"):
        assert words in found.text
    save_hf(tmp_path, CONFIG, new_params(CONFIG))
    assert "Algorithm" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_config_that_no_model_of_its_family_has_is_not_saved(tmp_path):
    for changes, words in [
        ({"final_softcap": 30.0}, "final_softcap 30.0 cannot be saved as llama"),
        ({"windows": (4, None)}, r"windows \(4, None\) cannot be saved as llama"),
        ({"family": "bert"}, "family 'bert' is not supported, only gemma2"),
    ]:
        config = replace(CONFIG, **changes)
        with pytest.raises(ValueError, match=words):
            save_hf(tmp_path / "out", config, new_params(config))
        assert not (tmp_path / "out").exists()


def test_params_of_another_shape_are_not_saved(tmp_path):
    params = new_params(CONFIG)
    params["layer_1"]["key"]["kernel"] = params["layer_1"]["key"]["kernel"][:, :-1]
    with pytest.raises(ValueError, match=r"layer_1/key/kernel is \(8, 5\), and should be \(8, 6\)"):
        save_hf(tmp_path / "out", CONFIG, params)


def test_reward_models_that_have_no_place(tmp_path):
    trunk = {name: leaf for name, leaf in new_params(CONFIG).items() if name != "head"}
    params = {"trunk": trunk, "head": {"kernel": jnp.ones(8), "bias": jnp.asarray(0.5)}}
    with pytest.raises(ValueError, match="not those of a ScalarModel"):
        save_hf_reward_model(tmp_path, CONFIG, trunk)
    save_hf_reward_model(tmp_path, CONFIG, params)
    assert float(load_hf_reward_model(tmp_path)[1]["head"]["bias"]) == 0.5
    change_config(tmp_path, reward_bias="much")
    with pytest.raises(ValueError, match="reward_bias is 'much', not a number"):
        load_hf_reward_model(tmp_path)
    fails(tmp_path, ValueError, str(tmp_path), "LlamaForSequenceClassification", "load_hf_reward_model")
    change_config(tmp_path, id2label={"0": "bad", "1": "good"})
    with pytest.raises(ValueError, match="2 labels, and a reward model has one"):
        load_hf_reward_model(tmp_path)


@pytest.mark.parametrize("wrong", [{"n_layers": 3}, {"tie_embeddings": True}, {"scan_layers": True}])
def test_params_of_another_config_are_not_saved(wrong, tmp_path):
    with pytest.raises(ValueError, match="are not those of this config"):
        save_hf(tmp_path / "out", replace(CONFIG, **wrong), new_params(CONFIG))
    assert not list(tmp_path.glob("**/*.*"))


def test_the_tokenizer_is_saved_with_its_special_tokens(shared_data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    save_hf(tmp_path, CONFIG, new_params(CONFIG), tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("Once upon a time")["input_ids"] == tokenizer("Once upon a time")["input_ids"]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("scanned", [False, True])
def test_a_large_model_is_written_in_shards_one_tensor_at_a_time(scanned, tmp_path, monkeypatch):
    """An index that transformers reads, and never more than a tensor or two of it in memory."""
    config = replace(CONFIG, vocab_size=2000, d_model=64, d_ff=192, n_layers=4, scan_layers=scanned)
    params = to_host(new_params(config))
    save_hf(tmp_path / "whole", config, params)
    monkeypatch.setattr(save, "SHARD", 200_000)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(new_params(replace(config, scan_layers=False)))]
    tracemalloc.start()
    save_hf(tmp_path / "parts", config, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * max(sizes) + 300_000 < sum(sizes), (peak, max(sizes), sum(sizes))
    save_hf(tmp_path / "whole-before", config, jax.tree.map(np.zeros_like, params))  # shards over one file
    monkeypatch.setattr(save, "SHARD", 10**9)
    save_hf(tmp_path / "parts-before", config, jax.tree.map(np.zeros_like, params))
    save_hf(tmp_path / "whole-before", config, params)
    monkeypatch.setattr(save, "SHARD", 200_000)
    save_hf(tmp_path / "parts-before", config, params)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = {name: x for file in files for name, x in load_file(tmp_path / "parts" / file).items()}
    assert parts.keys() == whole.keys() and all(np.array_equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(np.array_equal(theirs[name].numpy(), x) for name, x in whole.items())
    for name in ("whole-before", "parts-before"):  # nothing that was there before is read
        chex.assert_trees_all_equal(load_hf(tmp_path / name)[1], load_hf(tmp_path / "whole")[1])
    for again, leaf in zip(
        *(jax.tree.leaves(load_hf(tmp_path / name)[1]) for name in ("parts", "whole")), strict=True
    ):
        assert_array_equal(again, leaf)


def test_a_published_model_writes_the_same_200_tokens(shared_data):
    reference = np.load(shared_data / "model" / "stories260K_reference.npz")
    ids, logits = reference["greedy_ids"], reference["logits"]
    config, params = load_hf(shared_data / "model" / "stories260K-hf")
    read = len(logits)
    assert_allclose(jax_logits(config, params, ids[None, :read])[0], logits, atol=1e-4)
    completions = generate(
        Transformer(config), params, jnp.asarray(ids[None, :1]), jnp.ones((1, 1), bool), jax.random.key(0),
        max_new_tokens=200, temperature=0.0, eos_id=None, pad_id=0,
    )  # fmt: skip
    assert_array_equal(completions.tokens[0], ids[1:])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.fixture
def folder(tmp_path, no_network):
    save_hf(tmp_path / "model", CONFIG, new_params(CONFIG))
    return tmp_path / "model"


def fails(path, error, *words):
    with pytest.raises(error) as caught:
        load_hf(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_folder(folder):
    missing = folder.parent / "nothing"
    fails(missing, FileNotFoundError, f"no folder {missing}")
    fails("nothing", FileNotFoundError, "no folder nothing")
    fails("./some/where", FileNotFoundError, "no folder")
    fails("a/b/c", FileNotFoundError, "no folder a/b/c")


def test_a_folder_is_never_taken_for_a_hub_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    config, _ = load_hf(f"{folder.parent.name}/model")
    assert config == CONFIG


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    def refuse(name, **kwargs):
        raise OSError(f"no way to {name}\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    fails("some/model", FileNotFoundError, "some/model", "hub", "no way")


def test_a_hub_name_brings_safetensors_and_nothing_that_runs(folder, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    chex.assert_trees_all_equal(load_hf("some/model")[1], load_hf(folder)[1])
    [(name, patterns)] = asked
    assert name == "some/model"
    had = ["config.json", "tokenizer.json", "tokenizer.model", "model.safetensors", "model-00001-of-00002.safetensors"]
    left = ["pytorch_model.bin", "modeling_some.py", "model.pt", "training_args.bin", "adapter_model.safetensors"]
    for file, wanted in [*((file, True) for file in had), *((file, False) for file in left)]:
        assert any(fnmatch(file, pattern) for pattern in patterns) == wanted, file


def test_a_file_instead_of_a_folder(folder):
    fails(folder / "model.safetensors", ValueError, "model.safetensors is a file")


def test_a_missing_config(folder):
    (folder / "config.json").unlink()
    fails(folder, FileNotFoundError, f"{folder} has no config.json")


@pytest.mark.parametrize("text, word", [("{", "not JSON"), ("[]", "not a JSON object"), ("", "not JSON")])
def test_a_broken_config(folder, text, word):
    (folder / "config.json").write_text(text)
    fails(folder, ValueError, "config.json", word)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "bert"}, ["model_type 'bert'", "llama", "gpt2"]),
        ({"model_type": "gpt2"}, ["n_embd is missing"]),
        ({"model_type": None}, ["model_type None"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["rope scaling 'llama3'"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["rope scaling 'linear' lacks factor"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope scaling 'yarn'"]),
        ({"rope_parameters": 3}, ["rope"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu'"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "wide"}, ["hidden_size", "'wide'"]),
        ({"head_dim": 5}, ["head_dim must be even"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["num_attention_heads", "not 0"]),
        ({"num_key_value_heads": 3}, ["not a multiple"]),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, ["power"]),
        ({"model_type": "mistral", "sliding_window": -1}, ["a window must be at least 1"]),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"]}, ["1 windows"]),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"] * 2}, ["layer_types"]),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported(folder, changes, words):
    change_config(folder, **changes)
    fails(folder, ValueError, "config.json", *words)


def test_older_configs_are_read(folder):
    change_config(folder, rope_parameters=None, rope_theta=5_000.0, rope_scaling=None)
    assert load_hf(folder)[0] == CONFIG


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(folder, FileNotFoundError, f"{folder} has no model.safetensors", "pickled weights are not read")


def test_a_missing_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(folder, ValueError, str(folder), "model.layers.1.mlp.up_proj.weight is missing")


def test_a_missing_bias(folder):
    change_config(folder, attention_bias=True)
    fails(folder, ValueError, str(folder), "model.layers.0.self_attn.q_proj.bias is missing")


def test_a_misshapen_tensor(folder):
    name = "model.layers.0.self_attn.k_proj.weight"

    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])

    change_tensors(folder, cut)
    fails(folder, ValueError, str(folder), name, "(5, 8)", "(6, 8)")


def test_an_unexpected_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.extra": np.zeros(2, np.float32)}))
    fails(folder, ValueError, str(folder), "model.extra")


def test_buffers_and_copies_of_a_tied_embedding_are_passed_over(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(
        folder,
        lambda t: t.update({name: np.zeros(3, np.float32), "lm_head.weight": t["model.embed_tokens.weight"].copy()}),
    )
    change_config(folder, tie_word_embeddings=True)
    config, params = load_hf(folder)
    assert config.tie_embeddings and "head" not in params


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(folder, ValueError, str(path))


def test_a_missing_shard_and_a_broken_index(folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    fails(folder, FileNotFoundError, str(folder), "model-00001-of-00002.safetensors")
    for text in ("{", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        fails(folder, ValueError, index.name)
