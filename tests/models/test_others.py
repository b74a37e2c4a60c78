"""What we save, used by others as they do it: in batches of unequal lengths, padded on either side, by default."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from numpy.testing import assert_allclose
from parity import RICHEST, torch_model
from test_peft import trained
from tiny import random_tree
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_jax.models import (
    ScalarModel,
    Transformer,
    load_hf,
    load_hf_reward_model,
    save_hf,
    save_hf_reward_model,
    save_peft,
    save_peft_reward_model,
    with_lora,
)
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.tokenizer import with_padding
from rlhf_jax.sampling import generate

TEXTS = ["Once upon a time", "A dog", "The big cat was sad"]
SIDES = ["left", "right"]
NEW = 6


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    """It has no padding token, as many have none."""
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


@cache
def model_of(family, kind=Transformer, vocab_size=512):
    """(config, params) of a small model with random weights."""
    rows = torch_model(RICHEST[family]).config.to_dict() | {"vocab_size": vocab_size}
    config = FAMILIES[family].read(rows)
    shapes = jax.eval_shape(kind(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return config, random_tree(shapes, 0, 0.3)


def alone(module, params, rows):
    """Our outputs for each row, in one pass; what a row is padded with has a segment of its own."""
    width = max(map(len, rows))
    ids = jnp.asarray([[*row, *[0] * (width - len(row))] for row in rows])
    segments = jnp.asarray([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    positions = jnp.broadcast_to(jnp.arange(width)[None], ids.shape)
    found = np.asarray(jax.jit(module.apply)({"params": params}, ids, positions, segments))
    return [out[: len(row)] for out, row in zip(found, rows, strict=True)]


def batch_of(folder, texts, side=None):
    """As the model cards have it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = {} if side is None else {"padding_side": side}
    return tokenizer, tokenizer(texts, padding=True, return_tensors="pt", **given)


def last_of(module, params, tokenizer, texts):
    """Our output at the last token of each text."""
    return [out[-1] for out in alone(module, params, [tokenizer(text)["input_ids"] for text in texts])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policys_logits_in_a_batch(tokenizer, tmp_path, family):
    config, params = model_of(family)
    save_hf(tmp_path, config, params, tokenizer=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = None
    for side in (None, *SIDES):
        _, batch = batch_of(tmp_path, TEXTS, side)
        assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
        if family == "gpt2" and side != "right":  # transformers counts its learned positions from the padding on
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = theirs(**batch).logits.numpy()
        masks = batch["attention_mask"].numpy() > 0
        if ours is None:
            rows = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"].numpy(), masks, strict=True)]
            ours = alone(Transformer(config), params, rows)
        for row, expected, mask in zip(logits, ours, masks, strict=True):
            assert_allclose(row[mask], expected, atol=2e-4, rtol=1e-4, err_msg=str(side))
        assert logits.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_writes_by_default_as_ours_and_ends_where_ours_ends(tokenizer, tmp_path, family):
    config, params = model_of(family)
    save_hf(tmp_path, config, params, tokenizer=tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # transformers has a Qwen2 read any tokenizer as Qwen's
    ours, _ = greedy(config, params, tokenizer, None)
    ends = tuple(sorted({int(row[2]) for row in ours[:2]}))  # so that rows end early, by more tokens than one
    save_hf(tmp_path, config, params, tokenizer=tokenizer, eos_id=ends)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / name).read_text())["eos_token_id"]
        assert told == (list(ends) if len(ends) > 1 else ends[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    reader, batch = batch_of(tmp_path, TEXTS)
    assert reader.padding_side == "left"
    found = theirs.generate(**batch, do_sample=False, max_new_tokens=NEW).numpy()[:, batch["input_ids"].shape[1] :]
    tokens, mask = greedy(config, params, tokenizer, ends)
    assert mask.sum(axis=1).min() < NEW
    for row, ids, real in zip(found, tokens, mask, strict=True):
        assert row[: real.sum()].tolist() == ids[real].tolist()
        assert set(row[real.sum() :].tolist()) <= {reader.pad_token_id}


def greedy(config, params, tokenizer, eos_id):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows))
    prompts = jnp.asarray([[0] * (width - len(ids)) + ids for ids in rows])
    mask = jnp.asarray([[False] * (width - len(ids)) + [True] * len(ids) for ids in rows])
    found = generate(
        Transformer(config), params, prompts, mask, jax.random.key(0), max_new_tokens=NEW, temperature=0.0,
        eos_id=eos_id, pad_id=0,
    )  # fmt: skip
    return np.asarray(found.tokens), np.asarray(found.mask)


def test_a_policy_samples_by_default_from_all_tokens_at_temperature_1(tokenizer, tmp_path):
    config, params = model_of("llama")
    save_hf(tmp_path, config, params, tokenizer=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(0)
    _, batch = batch_of(tmp_path, ["A"])
    found = theirs.generate(**batch, max_new_tokens=1, num_return_sequences=512)[:, -1]
    assert len(set(found.tolist())) > 100  # 50 at most by transformers' own default


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_in_a_batch(tokenizer, tmp_path, family):
    config, params = model_of(family, ScalarModel)
    params = params | {"head": params["head"] | {"bias": jnp.zeros(())}}
    save_hf_reward_model(tmp_path, config, params, tokenizer=tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id not in (None, theirs.config.eos_token_id)
    ended = [*(text + tokenizer.eos_token for text in TEXTS), TEXTS[0]]  # one was cut before its end
    reader, _ = batch_of(tmp_path, ended)
    assert reader.padding_side == "right"
    ours = last_of(ScalarModel(config), params, reader, ended)
    assert np.std(ours) > 0.03
    for side in (None, *SIDES):
        _, batch = batch_of(tmp_path, ended, side)
        if family == "gpt2" and side == "left":  # as for logits
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            rewards = theirs(**batch).logits[:, 0].numpy()
        assert_allclose(rewards, ours, atol=1e-4, err_msg=str(side))


def test_a_bias_shifts_all_rewards_alike_and_the_card_says_so(tokenizer, tmp_path):
    config, params = model_of("llama", ScalarModel)
    params = params | {"head": params["head"] | {"bias": jnp.asarray(0.75)}}
    save_hf_reward_model(tmp_path, config, params, tokenizer=tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    _, batch = batch_of(tmp_path, TEXTS)
    with torch.no_grad():
        rewards = theirs(**batch).logits[:, 0].numpy() + theirs.config.reward_bias
    ours = last_of(ScalarModel(config), params, tokenizer, TEXTS)
    assert_allclose(rewards, ours, atol=1e-4)
    assert "Reward: the model's logit + 0.75" in (tmp_path / "README.md").read_text(encoding="utf-8")


def adapters(folder, tokenizer, family="llama"):
    """A policy's and a reward model's adapter over one base, as `export_adapters` writes them."""
    config, params = model_of(family)
    policy = trained(params)
    trunk = {name: value for name, value in params.items() if name != "head"}
    head = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=config.d_model), jnp.float32)}
    own = {"trunk": trained(trunk, rank=2), "head": head | {"bias": jnp.zeros(())}}
    save_hf(folder / "base", config, params, tokenizer=tokenizer, one_label=True)
    save_peft(folder / "policy", config, policy, base_model=str(folder / "base"))
    save_peft_reward_model(folder / "rewards", config, own, base_model=str(folder / "base"))
    return config, with_lora(params, policy), with_lora({"trunk": trunk}, own)


def test_adapters_in_a_batch_with_pefts_defaults(tokenizer, tmp_path):
    config, policy, rewards = adapters(tmp_path, tokenizer)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    scorer = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rewards").eval()
    ended = [text + tokenizer.eos_token for text in TEXTS]
    reader = AutoTokenizer.from_pretrained(tmp_path / "base")
    logits_alone = alone(Transformer(config), policy, [reader(text)["input_ids"] for text in TEXTS])
    rewards_alone = last_of(ScalarModel(config), rewards, reader, ended)
    for side in (None, *SIDES):
        _, batch = batch_of(tmp_path / "base", TEXTS, side)
        with torch.no_grad():
            logits = model(**batch).logits.numpy()
        for row, expected, mask in zip(logits, logits_alone, batch["attention_mask"].numpy() > 0, strict=True):
            assert_allclose(row[mask], expected, atol=2e-4, rtol=1e-4, err_msg=str(side))
        _, batch = batch_of(tmp_path / "base", ended, side)
        with torch.no_grad():
            found = scorer(**batch).logits[:, 0].numpy()
        assert_allclose(found, rewards_alone, atol=1e-4, err_msg=str(side))


# Which token pads.


def made(tokenizer, **changes):
    """A copy with other special tokens."""
    other = with_padding(tokenizer, 10**9, side="right")
    for name, value in changes.items():
        if name == "add":
            other.add_special_tokens({"extra_special_tokens": value})
        else:
            setattr(other, name, value)
    return other


@pytest.mark.parametrize(
    "changes, vocab_size, for_policy, for_rewards",
    [
        ({"pad_token": None}, 512, "<unk>", "<unk>"),
        ({"pad_token": "</s>"}, 512, "<unk>", "<unk>"),
        ({"pad_token": "<s>"}, 512, "<s>", "<s>"),  # its own choice
        ({"pad_token": None, "unk_token": None}, 513, "<pad>", "<pad>"),
        ({"pad_token": None, "unk_token": None}, 512, "</s>", "<s>"),
        ({"pad_token": None, "unk_token": None, "bos_token": None}, 512, "</s>", "<pad>"),
        ({"pad_token": None, "unk_token": "</s>", "bos_token": "</s>"}, 512, "</s>", "<pad>"),
        ({"pad_token": None, "add": ["<|image_pad|>", "<|reserved_0|>", "<|padding|>"]}, 515, "<|padding|>",
         "<|padding|>"),
        ({"pad_token": None, "add": ["<|image_pad|>", "<|reserved_0|>"]}, 514, "<|reserved_0|>", "<|reserved_0|>"),
    ],
)  # fmt: skip
def test_padding_is_no_end_of_text_where_there_is_another_token(
    tokenizer, changes, vocab_size, for_policy, for_rewards
):
    given = made(tokenizer, **changes)
    before = given.pad_token, given.padding_side, len(given)
    for found, expected in [
        (with_padding(given, vocab_size, side="left"), for_policy),
        (with_padding(given, vocab_size, side="right", may_grow=True), for_rewards),
    ]:
        assert found.pad_token == found.convert_ids_to_tokens(found.pad_token_id) == expected
    assert found.padding_side == "right"
    assert (given.pad_token, given.padding_side, len(given)) == before
    assert found("Once upon a time")["input_ids"] == given("Once upon a time")["input_ids"]


def test_a_reward_model_whose_table_has_to_grow(tokenizer, tmp_path):
    """As GPT-2's: the EOS is the one special token, and the table has no row to spare."""
    tokenizer, size = made(tokenizer, pad_token=None, unk_token=None, bos_token=None), len(tokenizer)
    config, params = model_of("llama", ScalarModel, vocab_size=size)
    params = params | {"head": params["head"] | {"bias": jnp.zeros(())}}
    save_hf_reward_model(tmp_path, config, params, tokenizer=tokenizer)
    again, same = load_hf_reward_model(tmp_path)
    assert again == replace(config, vocab_size=size + 1)
    np.testing.assert_array_equal(same["trunk"]["embedding"][:size], params["trunk"]["embedding"])
    ended = [text + tokenizer.eos_token for text in TEXTS]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for side in SIDES:
        _, batch = batch_of(tmp_path, ended, side)
        with torch.no_grad():
            rewards = theirs(**batch).logits[:, 0].numpy()
        ours = last_of(ScalarModel(config), params, tokenizer, ended)
        assert_allclose(rewards, ours, atol=1e-4)
    save_hf(tmp_path / "policy", *model_of("llama", vocab_size=size), tokenizer=tokenizer)
    assert load_hf(tmp_path / "policy")[0].vocab_size == size
