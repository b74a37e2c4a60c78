"""Folders whose files say more, or other, than their config.json: read as transformers reads them, or an error."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose
from parity import LANGUAGE, REWARD, RICHEST, torch_model, torch_outputs
from safetensors.numpy import load_file, save_file
from test_peft import outputs

from rlhf_jax.models import load_hf, load_hf_config, load_hf_reward_model, save_hf
from rlhf_jax.models.weights import DTYPES, Stored, find_tensors, same_values

TIED = "llama: linear rope, tied"
NORMAL = np.random.default_rng(0).normal


def written(folder, name=TIED, kind=LANGUAGE, change=None, **rows):
    """A model of torch's in a folder, its tensors and its config.json changed."""
    torch_model(name, kind).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | rows))
    return folder


def more(**tensors):
    """A change: these tensors are there too."""
    return lambda found: found.update({name.replace("__", "."): x.astype(np.float32) for name, x in tensors.items()})


@pytest.mark.parametrize("name", [TIED, "gpt2: learned positions, layer norms, biases", RICHEST["gemma2"]])
def test_a_head_that_is_not_the_embedding_is_the_head_whatever_config_json_says(tmp_path, name):
    whole = torch_model(name)
    shape = whole.lm_head.weight.shape
    folder = written(tmp_path, name, change=more(lm_head__weight=NORMAL(0, 0.3, shape)))
    theirs = type(whole).from_pretrained(folder, attn_implementation="eager").eval()
    config, params = load_hf(folder)
    assert not config.tie_embeddings and not load_hf_config(folder).tie_embeddings
    expected = torch_outputs(theirs, LANGUAGE)
    assert np.abs(expected - torch_outputs(whole, LANGUAGE)).max() > 0.1
    assert_allclose(outputs(config, params), expected, atol=1e-4)
    save_hf(tmp_path / "again", config, params)
    assert load_hf(tmp_path / "again")[0] == config


def test_a_copy_of_the_embedding_is_tied_in_whichever_type_it_is_kept(tmp_path):
    def copied(tensors):
        table = tensors["model.embed_tokens.weight"].astype(np.float16)
        tensors["model.embed_tokens.weight"] = table.astype(np.float32)
        tensors["lm_head.weight"] = table

    config, params = load_hf(written(tmp_path, change=copied))
    assert config.tie_embeddings and "head" not in params


def test_values_are_compared_in_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.weights.BLOCK", 64)
    first = NORMAL(size=(37, 8)).astype(np.float32)
    other = first.copy()
    other[36, 7] += 1
    save_file({"a": first, "b": first.copy(), "c": other, "d": first[:36].copy()}, tmp_path / "x.safetensors")
    found = find_tensors([tmp_path / "x.safetensors"])
    assert same_values(found["a"], found["b"])
    assert not same_values(found["a"], found["c"]) and not same_values(found["a"], found["d"])
    assert isinstance(found["a"], Stored) and set(DTYPES) >= {found["a"].dtype}


TABLE = "model.embed_tokens.weight"


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def copy(old, new):
    return lambda tensors: tensors.update({new: tensors[old].copy()})


@pytest.mark.parametrize(
    "change, rows, words",
    [
        (rename(TABLE, "lm_head.weight"), {}, "embed_tokens.weight is missing"),
        (lambda tensors: None, {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        (lambda tensors: None, {"num_hidden_layers": 1}, "layers.1.* has no place"),
        (copy("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"), {}, "layers.2.* no place"),
        (more(model__layers__0__self_attn__q_proj__bias=np.zeros(32)), {}, "q_proj.bias has no place"),
        (more(model__norm__bias=np.zeros(32)), {}, "model.norm.bias has no place"),
        (more(lm_head__bias=np.zeros(64)), {}, "lm_head.bias has no place"),
        (more(score__weight=np.zeros((1, 32))), {}, "score.weight has no place"),
        (more(v_head__summary__weight=np.zeros((1, 32))), {}, "v_head.summary.weight has no place"),
        (more(model__layers__0__self_attn__q_norm__weight=np.ones(8)), {}, "q_norm.weight has no place"),
        (copy("model.norm.weight", "norm.weight"), {}, "model.norm.weight is there twice"),
        (more(lm_head__weight=np.zeros((65, 32))), {}, r"lm_head.weight has shape \(65, 32\)"),
        (lambda t: t.update({TABLE: t[TABLE].astype(np.int8)}), {}, "is I8, of weights that are quantised"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": np.zeros(3, np.int32)}), {}, "qweight is I32"),
        (more(model__layers__0__mlp__up_proj__weight_scale=np.ones(1)), {}, "weight_scale is F32, of weights"),
    ],
)  # fmt: skip
def test_tensors_that_are_more_or_other_than_config_json_says(tmp_path, change, rows, words):
    with pytest.raises(ValueError, match=words) as error:
        load_hf(written(tmp_path, change=change, **rows))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_name_of_today_and_an_older_one_are_not_both_read(tmp_path):
    change = copy("embed_out.weight", "lm_head.weight")
    with pytest.raises(ValueError, match=r"lm_head.weight is there twice"):
        load_hf(written(tmp_path, RICHEST["gpt_neox"], change=change))


def test_a_tensor_in_two_shards(tmp_path):
    folder = written(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-1.safetensors")
    save_file({TABLE: tensors[TABLE]}, folder / "model-2.safetensors")
    places = dict.fromkeys(tensors, "model-1.safetensors") | {TABLE: "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=f"tensor {TABLE} is in model-1.safetensors and in model-2.safetensors"):
        load_hf(folder)


def test_a_shard_outside_of_the_folder(tmp_path):
    folder = written(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    for shard in ("../other.safetensors", 3, "", None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {TABLE: shard}}))
        with pytest.raises(ValueError, match="no weight_map from tensors to files of the folder"):
            load_hf(folder)


def test_adapters_beside_a_model_or_alone(tmp_path):
    folder = written(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter .* beside a model"):
        load_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="and no model: merge it into its model"):
        load_hf(folder)


@pytest.mark.parametrize(
    "change, rows, words",
    [
        (more(score__weight=np.zeros((2, 32))), {}, r"score.weight has shape \(2, 32\)"),
        (more(score__bias=np.zeros(1)), {}, "score.bias has no place"),
        (more(v_head__weight=np.zeros((1, 32))), {}, "v_head.weight has no place"),
        (lambda tensors: tensors.pop("score.weight"), {}, "score.weight is missing"),
        (lambda tensors: None, {"id2label": {"0": "bad", "1": "good"}, "num_labels": 1}, "2 labels"),
        (lambda tensors: None, {"id2label": None}, "2 labels"),
        (lambda tensors: None, {"id2label": None, "num_labels": 5}, "5 labels"),
        (lambda tensors: None, {"architectures": "LlamaForCausalLM"}, "holds a LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_reward_models_whose_files_say_other(tmp_path, change, rows, words):
    with pytest.raises(ValueError, match=words):
        load_hf_reward_model(written(tmp_path, kind=REWARD, change=change, **rows))


def test_a_classifier_does_without_a_language_head_as_in_transformers(tmp_path):
    folder = written(tmp_path, kind=REWARD, change=more(lm_head__weight=NORMAL(size=(64, 32))))
    config, params = load_hf_reward_model(folder)
    theirs = type(torch_model(TIED, REWARD)).from_pretrained(folder, attn_implementation="eager").eval()
    assert_allclose(outputs(config, params, REWARD), torch_outputs(theirs, REWARD), atol=1e-5)
