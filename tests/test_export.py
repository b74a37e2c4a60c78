"""A run's folders: what they hold for those who load them."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.export import export_adapters, export_policy, export_reward_model
from rlhf_jax.log import Run
from rlhf_jax.models import init_lora, with_lora
from rlhf_jax.pretrained import load_policy, load_reward_model


@pytest.fixture(scope="module")
def base(shared_data):
    """A model whose answers end by two tokens."""
    return load_policy(str(shared_data / "model" / "stories260K-hf"))._replace(ends=(2, 426))


@dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path, monkeypatch, said):
    with Run(tmp_path / "run", Config(), name="test") as run:
        monkeypatch.setattr(run, "say", said.append)
        yield run


def told(folder):
    """eos_token_id, pad_token_id and the number of labels of both configs, and the side on which rows are padded."""
    config, generation = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert (
        config["eos_token_id"] == generation["eos_token_id"] and config["pad_token_id"] == generation["pad_token_id"]
    )
    side = AutoTokenizer.from_pretrained(folder).padding_side
    return config["eos_token_id"], config["pad_token_id"], len(config.get("id2label", {})), side


def scalar(base):
    width = base.config.d_model
    trunk = {name: value for name, value in base.params.items() if name != "head"}
    return {"trunk": trunk, "head": {"kernel": jnp.ones(width) / width, "bias": jnp.asarray(0.5)}}


def test_every_end_of_an_answer_leaves_with_the_model(base, run):
    export_policy(run, base, base.params, algorithm="SFT", metrics={})
    export_reward_model(run, base, scalar(base), algorithm="reward model", metrics={})
    assert told(run.dir / "policy") == ([2, 426], 0, 0, "left")
    assert told(run.dir / "reward_model") == ([2, 426], 0, 1, "right")
    assert load_policy(str(run.dir / "policy")).eos_id == (2, 426)
    rewards = load_reward_model(str(run.dir / "reward_model"))
    assert rewards.eos_id == (2, 426) and float(rewards.params["head"]["bias"]) == 0.5
    assert base.tokenizer.pad_token is None and base.tokenizer.padding_side == "right"


def test_one_end_is_a_number(base, run):
    export_policy(run, base._replace(ends=()), base.params, algorithm="SFT", metrics={})
    assert told(run.dir / "policy")[0] == 2


@pytest.mark.parametrize("only_eos", [False, True])
def test_adapters_come_with_tokenizers_and_a_base_for_both(base, run, said, only_eos):
    if only_eos:
        tokenizer = AutoTokenizer.from_pretrained(base.name)
        tokenizer.unk_token = tokenizer.bos_token = None
        base = base._replace(tokenizer=tokenizer)
    policy, rewards = (init_lora(jax.random.key(n), base.params, rank=2, alpha=4.0, targets="query") for n in (0, 1))
    own = {"trunk": with_lora(base.params, rewards), "head": scalar(base)["head"]}
    export_adapters(run, base, base.params, with_lora(base.params, policy), own)
    pad = 2 if only_eos else 0
    assert told(run.dir / "base") == ([2, 426], pad, 1, "left")
    for name, side in [("policy_adapter", "left"), ("reward_model_adapter", "right")]:
        tokenizer = AutoTokenizer.from_pretrained(run.dir / name)
        assert (tokenizer.padding_side, tokenizer.pad_token_id) == (side, pad)
        np.testing.assert_array_equal(tokenizer("A dog")["input_ids"], base.tokenizer("A dog")["input_ids"])
    assert any("no token for padding but the EOS" in line for line in said) == only_eos
