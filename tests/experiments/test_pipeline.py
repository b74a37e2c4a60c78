"""The whole pipeline from end to end, small: the world, real text, resuming, adapters, a user's mistakes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from experiments import pipeline, ppo, reward_model, sft, training
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.models import (
    ScalarModel,
    Transformer,
    load_hf,
    load_hf_reward_model,
    with_lora,
)
from rlhf_jax.sampling import generate

ROOT = Path(__file__).parents[2]
SMALL = dict(
    sft=sft.SFT(steps=12, batch_size=8),
    reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    ppo=ppo.PPO(steps=3, responses=16, epochs=2, minibatches=2),
)


@pytest.fixture
def trained(monkeypatch):
    """What the stages of the pipeline return, by name."""
    returned = {}
    for stage in (reward_model, ppo):

        def train(*args, stage=stage, train=stage.train, **given):
            params, metrics = train(*args, **given)
            returned[stage.__name__] = params
            return params, metrics

        monkeypatch.setattr(stage, "train", train)
    return returned


def the_exported_folders_are_the_models(run, trained):
    """transformers continues a prompt greedily as `generate` does, and scores it as our reward model does."""
    torch = pytest.importorskip("torch")
    config, params = load_hf(run / "policy")
    chex.assert_trees_all_equal(params, trained["experiments.ppo"])
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    prompt = jnp.asarray([tokenizer.encode("count cat cat")])
    ours = generate(
        Transformer(config), params, prompt, prompt > -1, jax.random.key(0),
        max_new_tokens=12, temperature=0.0, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(run / "policy").generate(
        torch.tensor(np.asarray(prompt)), max_new_tokens=12, do_sample=False
    )[0, prompt.shape[1] :]
    assert np.asarray(ours.tokens)[np.asarray(ours.mask)].tolist() == theirs.tolist()

    config, params = load_hf_reward_model(run / "reward_model")
    chex.assert_trees_all_equal(params["trunk"], trained["experiments.reward_model"]["trunk"])
    chex.assert_trees_all_equal(params["head"]["kernel"], trained["experiments.reward_model"]["head"]["kernel"])
    # The bias that makes demonstrations score 0 is ours alone: theirs has no place for it.
    score = jax.jit(ScalarModel(config).apply)({"params": params}, prompt)[0, -1] - params["head"]["bias"]
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(run / "reward_model")(
            torch.tensor(np.asarray(prompt))
        ).logits
    np.testing.assert_allclose(score, theirs[0, 0].numpy(), atol=1e-5)
    assert "ppo_kl_k1" in (run / "policy" / "README.md").read_text(encoding="utf-8")


def test_pipeline_in_the_world(small_world, undrawn, trained, tmp_path):
    metrics = pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), **SMALL))
    assert {"sft_utility", "ppo_utility", "win_rate", "reward_model_val_accuracy", "shifted_win_rate"} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    assert {row["stage"] for row in rows} == {"sft", "reward_model", "choice", "ppo"}
    iterations = [row for row in rows if row["stage"] == "ppo"]
    logged = {
        "score", "utility", "kl_k1", "kl_k2", "kl_k3", "clip_fraction", "entropy", "value_loss", "explained_variance",
        "length", "sampler_gap", "sampler_gap_max", "compilations", "tokens_per_second", "beta",
    }  # fmt: skip
    assert logged <= set(iterations[0])
    # The first iteration starts at the reference, and the sampler is the trainer.
    np.testing.assert_allclose(iterations[0]["kl_k1"], 0.0, atol=1e-5)
    assert max(row["sampler_gap_max"] for row in iterations) < 1e-4
    # Nothing is compiled after the first iteration.
    assert iterations[0]["compilations"] == iterations[-1]["compilations"]
    for name in ("config.json", "run.json", "summary.json", "examples.jsonl", "report.html", "checkpoints/ppo/3"):
        assert (tmp_path / "run" / name).exists()

    the_exported_folders_are_the_models(tmp_path / "run", trained)

    # Resumed after a crash in PPO: SFT and the reward model are read back, and the end is the same.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "ppo")
    again = pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), resume=True, **SMALL))
    timing = {"compilations", "ppo_seconds", "ppo_tokens_per_second", "ppo_compilations"}
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in metrics.items() if k not in timing}
    share = (metrics["reward_model_val_accuracy"] - 0.5) / (metrics["reward_model_ceiling"] - 0.5)
    np.testing.assert_allclose(metrics["reward_model_share_above_chance"], share)
    # The demonstrations' mean score is 0 after the shift.
    np.testing.assert_allclose(metrics["reward_model_demonstrations_score"], 0.0, atol=1e-4)


def peft_loads_the_adapters(run):
    """Over base/, which each names, they are policy/ and reward_model/."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    tokens = torch.tensor([[5, 9, 3, 7, 2, 11], [4, 3, 8, 6, 12, 9]])
    for folder, ours, theirs, options in [
        ("policy", AutoModelForCausalLM, peft.AutoPeftModelForCausalLM, {}),
        ("reward_model", AutoModelForSequenceClassification, peft.AutoPeftModelForSequenceClassification,
         {"num_labels": 1}),
    ]:  # fmt: skip
        with torch.no_grad():
            merged = ours.from_pretrained(run / folder).eval()(tokens).logits
            adapted = theirs.from_pretrained(run / f"{folder}_adapter", **options).eval()(tokens).logits
        np.testing.assert_allclose(adapted, merged, atol=1e-4)


def test_pipeline_on_real_text_with_adapters(shared_data, stories, undrawn, trained, tmp_path, monkeypatch):
    lora = {"lora_rank": 2, "lora_alpha": 4.0, "frozen_dtype": "int8", "learning_rate": 1e-3}
    dropping = []
    taken = training.AdapterDropout.model_in_training

    def in_training(cfg, frozen, own, key, step):
        dropping.append((type(cfg).__name__, cfg.lora_dropout, isinstance(step, jax.core.Tracer)))
        return taken(cfg, frozen, own, key, step)

    monkeypatch.setattr(training.AdapterDropout, "model_in_training", in_training)
    cfg = pipeline.Config(
        run_dir=str(tmp_path / "run"),
        model=stories,
        demonstrations=str(shared_data / "sft" / "dolly_3k.jsonl.gz"),
        comparisons=str(shared_data / "preference" / "hh_helpful_base.eval.jsonl.gz"),
        on_bad_row="skip",
        max_length=96,
        max_new_tokens=8,
        limit=160,
        sft=sft.SFT(steps=4, batch_size=4, lora_dropout=0.1, **lora),
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=16, lora_dropout=0.1, **lora),
        ppo=ppo.PPO(steps=2, responses=8, epochs=1, minibatches=2, **lora),
    )
    metrics = pipeline.main(cfg)
    assert metrics["reward_model_val_accuracy_low"] < metrics["reward_model_val_accuracy_high"]
    assert "reward_model_length_baseline" in metrics and "ppo_kl_k1" in metrics
    assert not any("utility" in name for name in metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    # One program for all steps, whose keys differ.
    assert dropping == [(stage, 0.1, True) for stage in ("SFT", "RewardModel")]
    for trunk in (trained["experiments.reward_model"]["trunk"], trained["experiments.ppo"]):
        assert trunk["layer_0"]["query"]["kernel"].dtype == "int8"
    peft_loads_the_adapters(tmp_path / "run")
    again = pipeline.main(replace(cfg, resume=True))
    same = ("ppo_score", "ppo_kl_k1", "ppo_value_loss", "reward_model_val_accuracy")
    assert {name: again[name] for name in same} == {name: metrics[name] for name in same}


def test_each_step_drops_other_numbers_and_without_a_rate_none():
    own = {"layer_0": {"up": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "lora_scale": jnp.ones(())}}}
    frozen, key = {"layer_0": {"up": {"kernel": jnp.ones((4, 3))}}}, jax.random.key(0)
    dropping = sft.SFT(lora_rank=2, lora_dropout=0.25)
    model = {step: dropping.model_in_training(frozen, own, key, step) for step in (0, 1)}
    drops = [model[step]["layer_0"]["up"]["lora_dropout"] for step in (0, 1)]
    assert drops[0].key != drops[1].key and float(drops[0].rate) == 0.25
    plain = sft.SFT(lora_rank=2).model_in_training(frozen, own, key, 0)
    chex.assert_trees_all_equal(plain, with_lora(frozen, own))
    assert not hasattr(ppo.PPO(), "lora_dropout")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"lora_rank": 2, "lora_targets": "q_proj"}}, "lora-targets 'q_proj'"),
        ({"sft": {"lora_rank": 2, "lora_targets": "(q"}}, "lora-targets '(q'"),
    ],
)
def test_adapters_that_cannot_be_are_a_users_mistake(small_world, tmp_path, changes, message):
    stages = {name: replace(stage, **changes.get(name, {})) for name, stage in SMALL.items()}
    with pytest.raises(UserError, match=re.escape(message)):
        pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), **stages))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere", "--demonstrations", "a", "--comparisons", "b"], "/nowhere"),
        (["--resume"], "--run-dir"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--sft.steps", "-1"], "steps is -1"),
        (["--heldout", "0"], "heldout is 0"),
        (["--limit", "10"], "--limit is about files"),
        (["--scan-layers", "True"], "--scan-layers is about a model that is read"),
        (["--demonstrations", "a.jsonl"], "--demonstrations needs --model"),
        (["--sft.max-grad-norm", "0"], "max-grad-norm is 0.0; it must be more than 0"),
        (["--sft.lora-rank", "2", "--sft.lora-dropout", "1"], "lora-dropout is 1.0; it must be below 1"),
        (["--reward-model.lora-rank", "0", "--reward-model.lora-dropout", "0.1"], "and needs a lora-rank"),
        (["--reward-model.learning-rate", "nan"], "learning-rate is nan"),
        (["--ppo.responses", "100", "--ppo.minibatches", "3"], "100 responses do not divide into 3 minibatches"),
    ],
)
def test_a_users_mistake_is_one_line(small_world, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(pipeline.main, pipeline.Config)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert message in shown and len(shown.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_is_one_line_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "pipeline.py"), "--model", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "nowhere" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_choice_of_epoch_is_the_reward_models():
    class FakeRun:
        def log(self, *_): ...
        def say(self, _): ...

    scores, losses = {10: 0.1, 20: 0.9, 30: 0.3}, {10: 3.0, 20: 2.0, 30: 1.0}
    chosen = pipeline.choose_epoch(
        [10, 20, 30], lambda step: step, lambda params, prompts, number: np.array([scores[params]]), losses.get, None,
        FakeRun(),
    )  # fmt: skip
    assert chosen == 20
