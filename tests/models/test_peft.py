"""Adapters written for PEFT and read from it give the same logits as its torch models."""

import json
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from parity import LANGUAGE, MASK, PAD, POSITIONS, REWARD, RICHEST, TOKENS, torch_model, torch_outputs
from safetensors.numpy import load_file, save_file

from rlhf_jax.models import (
    init_lora,
    load_peft,
    load_peft_reward_model,
    save_hf,
    save_peft,
    save_peft_reward_model,
    with_lora,
)
from rlhf_jax.models.weights import flat, nested

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3"]
EVERYTHING = "(query|key|value|output|gate|up|down)/kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family) -> (torch's model, our config, our params), of a language model or a classifier."""
    made = {}

    def make(family, kind=LANGUAGE):
        theirs = torch_model(RICHEST[family], kind)
        if (family, kind.ours) not in made:
            folder = tmp_path_factory.mktemp(family)
            theirs.save_pretrained(folder)
            made[family, kind.ours] = kind.load(folder)
        return theirs, *made[family, kind.ours]

    return make


@cache
def forward(model):
    return jax.jit(model.apply)


def outputs(config, params, kind=LANGUAGE):
    arguments = map(jnp.asarray, (TOKENS, POSITIONS, MASK.astype(np.int32)))
    return np.asarray(forward(kind.ours(config))({"params": params}, *arguments))[kind.chosen]


def trained(params, **options):
    """An adapter whose B is not zero."""
    options = dict(rank=3, alpha=5.0, targets=EVERYTHING) | options
    adapter = flat(init_lora(jax.random.key(0), params, **options))
    rng = np.random.default_rng(0)
    b = {name: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for name, x in adapter.items() if "lora_b" in name}
    return nested(adapter | b)


def same(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert set(ours) == set(theirs)
    for name in ours:
        assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_we_save(base, tmp_path, family):
    theirs, config, params = base(family)
    adapter = trained(params)
    save_peft(tmp_path, config, adapter, base_model="owner/model")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    expected = torch_outputs(model, LANGUAGE)
    assert_allclose(outputs(config, with_lora(params, adapter)), expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - outputs(config, params)).max() > 0.01
    same(load_peft(tmp_path, config), adapter)
    card = json.loads((tmp_path / "adapter_config.json").read_text())
    assert card["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_we_load_what_peft_saves(base, tmp_path, family, use_rslora):
    theirs, config, params = base(family)
    torch.manual_seed(1)
    options = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=["q_proj", "o_proj", "up_proj"],
        init_lora_weights=False, rank_pattern={"up_proj": 2}, task_type="CAUSAL_LM",
        # The first that fits counts; "proj" fits none, being no whole name.
        alpha_pattern={"proj": 90, "1.mlp.up_proj": 7, "up_proj": 3, "layers.*.q_proj": 9},
    )  # fmt: skip
    model = peft.get_peft_model(theirs, options).eval()
    model.save_pretrained(tmp_path)
    adapter = load_peft(tmp_path, config)
    assert len(flat(adapter)) == 3 * 3 * config.n_layers
    expected = torch_outputs(model, LANGUAGE)
    assert_allclose(outputs(config, with_lora(params, adapter)), expected, atol=1e-4, rtol=1e-4)


def test_scanned_layers_and_some_modules_only(base, tmp_path):
    theirs, config, params = base("llama")
    adapter = trained(params, targets="layer_1/(query|down)", rank_stabilized=True)
    save_peft(tmp_path / "some", config, adapter)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "some").eval()
    expected = torch_outputs(model, LANGUAGE)
    assert_allclose(outputs(config, with_lora(params, adapter)), expected, atol=1e-4, rtol=1e-4)
    scanned = replace(config, scan_layers=True)
    with pytest.raises(ValueError, match="query/lora_a is not alike in all 2 layers, which scan_layers needs"):
        load_peft(tmp_path / "some", scanned)

    save_peft(tmp_path / "all", config, trained(params))
    stacked = load_peft(tmp_path / "all", scanned)
    assert set(stacked) == {"layers"}
    save_peft(tmp_path / "again", scanned, stacked)
    same(load_peft(tmp_path / "again", config), trained(params))


@pytest.mark.parametrize(
    "family, targets, message",
    [
        ("phi3", "query", "layer_0/query cannot be saved for phi3: it is one tensor with others there"),
        ("gpt_neox", "value", "layer_0/value cannot be saved for gpt_neox: it is one tensor with others there"),
    ],
)
def test_a_part_of_a_fused_tensor_is_refused(base, tmp_path, family, targets, message):
    _, config, params = base(family)
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path, config, trained(params, targets=targets))
    save_peft(tmp_path, config, trained(params, targets="output|down"))
    same(load_peft(tmp_path, config), trained(params, targets="output|down"))


def test_modules_that_differ_in_rank_and_scale(base, tmp_path):
    theirs, config, params = base("llama")
    mixed = with_lora(trained(params), trained(params, targets="layer_1/(query|up)", rank=2, alpha=9.0))
    save_peft(tmp_path, config, mixed)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    expected = torch_outputs(model, LANGUAGE)
    assert_allclose(outputs(config, with_lora(params, mixed)), expected, atol=1e-4, rtol=1e-4)
    same(load_peft(tmp_path, config), mixed)


def reward_model(params):
    """An adapter and a head of one's own over a ScalarModel's trunk."""
    width = params["head"]["kernel"].shape[0]
    head = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=width), jnp.float32), "bias": jnp.zeros(())}
    return {"trunk": trained(params["trunk"]), "head": head}


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_peft_loads_a_reward_model_that_we_save(base, tmp_path, family):
    theirs, config, params = base(family, REWARD)
    own = reward_model(params)
    save_peft_reward_model(tmp_path, config, own)
    expected = torch_outputs(peft.PeftModel.from_pretrained(theirs, tmp_path).eval(), REWARD)
    ours = outputs(config, with_lora({"trunk": params["trunk"]}, own), REWARD)
    assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
    assert np.abs(expected - outputs(config, params, REWARD)).min() > 0.01
    same(load_peft_reward_model(tmp_path, config), own)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_we_load_a_reward_model_that_peft_saves(base, tmp_path, family):
    theirs, config, params = base(family, REWARD)
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS")
    model = peft.get_peft_model(theirs, options).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    own = load_peft_reward_model(tmp_path, config)
    ours = outputs(config, with_lora({"trunk": params["trunk"]}, own), REWARD)
    assert_allclose(ours, torch_outputs(model, REWARD), atol=1e-5, rtol=1e-5)


def test_a_reward_model_over_a_language_model(base, tmp_path):
    """What peft has for a policy and a reward model on one trunk."""
    _, config, params = base("llama")
    trunk = {name: x for name, x in params.items() if name != "head"}
    own = reward_model({"trunk": trunk, "head": {"kernel": np.zeros(config.d_model)}})
    save_hf(tmp_path / "base", config, params)
    save_peft_reward_model(tmp_path / "adapter", config, own, base_model=str(tmp_path / "base"))
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=1, pad_token_id=PAD
    ).eval()
    ours = outputs(config, with_lora({"trunk": trunk}, own), REWARD)
    assert_allclose(ours, torch_outputs(model, REWARD), atol=1e-5, rtol=1e-5)


def test_reward_models_that_are_none(base, tmp_path):
    _, config, params = base("llama", REWARD)
    own = reward_model(params)
    biased = own | {"head": own["head"] | {"bias": jnp.float32(2.0)}}
    for wrong, message in [(own["trunk"], "own part is"), (biased, "bias 2 has no place")]:
        with pytest.raises(ValueError, match=message):
            save_peft_reward_model(tmp_path / "out", config, wrong)
    assert not (tmp_path / "out").exists()
    save_peft_reward_model(tmp_path, config, own)
    with pytest.raises(ValueError, match="a reward model's adapter: load_peft_reward_model reads it"):
        load_peft(tmp_path, config)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    score = "base_model.model.score.weight"
    for change, message in [({}, "no such tensor"), ({score: np.zeros((2, 32), np.float32)}, r"there is \(2, 32\)")]:
        save_file({name: x for name, x in tensors.items() if name != score} | change, path)
        with pytest.raises(ValueError, match=rf"{score} should be \(1, 32\), and {message}|{message}"):
            load_peft_reward_model(tmp_path, config)


def test_an_adapter_that_cannot_be_saved(base, tmp_path):
    _, config, params = base("llama")
    for adapter, message in [
        ({}, "init_lora makes one"),
        (params, "init_lora makes one"),
        ({"layer_7": trained(params)["layer_0"]}, "layer_7/down cannot be saved for llama: it is none of its modules"),
        ({"layer_0": {"up": trained(params)["layer_0"]["down"]}}, re.escape("layer_0/up is adapted (40, 32)")),
    ]:
        with pytest.raises(ValueError, match=message):
            save_peft(tmp_path / "out", config, adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type 'IA3' is not supported, only 'LORA'"),
        ({"use_dora": True}, "adapter_config.json: use_dora True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication .* is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices .* is not supported"),
        ({"next_years_lora": {"k": 1}}, "next_years_lora {'k': 1} is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save .'embed_tokens'. is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' .* changes the weights beneath"),
        ({"alpha_pattern": {"q_proj": "3"}}, "q_proj is '3', and should be a number"),
        ({"lora_alpha": None}, "lora_alpha is None, and should be a number"),
    ],
)
def test_more_than_lora_is_refused(base, tmp_path, change, message):
    _, config, params = base("llama")
    save_peft(tmp_path, config, trained(params))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (load_peft, load_peft_reward_model):
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path, config)
        assert "\n" not in str(error.value)


def test_broken_tensors_are_named(base, tmp_path):
    _, config, params = base("llama")
    save_peft(tmp_path, config, trained(params))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    for change, message in [
        ({f"{query}.lora_A.weight": None}, "layers.0.self_attn.q_proj has only one of lora_A and lora_B"),
        ({f"{query}.lora_A.weight": np.zeros((3, 5), np.float32)}, "q_proj has lora_A .3, 5. .* not fit its weight"),
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": tensors[f"{query}.lora_A.weight"]},
         "layers.9.mlp.up_proj.lora_A.weight has no place"),
    ]:  # fmt: skip
        save_file({name: x for name, x in (tensors | change).items() if x is not None}, path)
        with pytest.raises(ValueError, match=message):
            load_peft(tmp_path, config)
    save_file({}, path)
    with pytest.raises(ValueError, match="holds no adapter"):
        load_peft(tmp_path, config)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_peft(tmp_path, config)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors; pickled adapters are not read"):
        load_peft(tmp_path, config)


LEFT_OUT = [
    {"target_modules": ["q_proj"]},
    {"target_modules": r".*\.(q|k|v|o)_proj"},
    {"target_modules": ["model.layers.0.mlp.up_proj"]},
    {"exclude_modules": ["down_proj"]},
    {"exclude_modules": r".*layers\.1\..*"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
]


@pytest.mark.parametrize("change", LEFT_OUT)
def test_modules_that_the_card_leaves_out_are_not_adapted_as_in_peft(base, tmp_path, change):
    """PEFT passes over their tensors; here they are an error."""
    theirs, config, params = base("llama")
    adapter = trained(params)
    save_peft(tmp_path, config, adapter)
    path = tmp_path / "adapter_config.json"
    whole = torch_outputs(peft.PeftModel.from_pretrained(theirs, tmp_path).eval(), LANGUAGE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    again, _, _ = base("llama")
    part = torch_outputs(peft.PeftModel.from_pretrained(again, tmp_path).eval(), LANGUAGE)
    assert np.abs(whole - part).max() > 1e-3
    with pytest.raises(ValueError, match=r"has an adapter, which adapter_config.json leaves out"):
        load_peft(tmp_path, config)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(self_attn|mlp)\..*_proj"},
        {"exclude_modules": ["lm_head"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": []},
    ],
)
def test_cards_that_leave_nothing_out(base, tmp_path, change):
    _, config, params = base("llama")
    save_peft(tmp_path, config, trained(params))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    same(load_peft(tmp_path, config), trained(params))


def test_a_rank_that_the_card_does_not_say(base, tmp_path):
    _, config, params = base("llama")
    save_peft(tmp_path, config, trained(params))
    path = tmp_path / "adapter_config.json"
    for change, words in [({"r": 8}, "has rank 3, and .* says 8"), ({"rank_pattern": {"v_proj": 2}}, "says 2")]:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3, "rank_pattern": {}} | change))
        with pytest.raises(ValueError, match=words):
            load_peft(tmp_path, config)


def test_a_library_that_an_adapter_names_is_not_imported(base, tmp_path, monkeypatch):
    _, config, params = base("llama")
    save_peft(tmp_path, config, trained(params))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "adapter_config.json"
    named = {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    same(load_peft(tmp_path, config), trained(params))
