"""The experiments run from end to end, small: the world, real text, resuming, and what a user gets wrong."""

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

from experiments import adapters, pipeline, ppo, reward_model, setting, sft
from experiments.ablations import kl_coefficient
from experiments.adapters import split
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.models import (
    ModelConfig,
    ScalarModel,
    Transformer,
    from_language_model,
    load_hf,
    load_hf_reward_model,
    merge_lora,
    with_lora,
)
from rlhf_jax.models.weights import flat
from rlhf_jax.sampling import generate
from rlhf_jax.scoring import token_scores, token_values

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

        def train(*args, stage=stage, train=stage.train):
            params, metrics = train(*args)
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
    score = ScalarModel(config).apply({"params": params}, prompt)[0, -1]
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(run / "reward_model")(
            torch.tensor(np.asarray(prompt))
        ).logits
    np.testing.assert_allclose(score, theirs[0, 0].numpy(), atol=1e-5)
    assert "ppo_kl_k1" in (run / "policy" / "README.md").read_text(encoding="utf-8")


def test_pipeline_in_the_world(small_world, trained, tmp_path):
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
    for name in ("config.json", "summary.json", "examples.jsonl", "report.html", "checkpoints/ppo/3"):
        assert (tmp_path / "run" / name).exists()

    the_exported_folders_are_the_models(tmp_path / "run", trained)

    # Resumed after a crash in PPO: SFT and the reward model are read back, and the end is the same.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "ppo")
    again = pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), resume=True, **SMALL))
    timing = {"compilations", "ppo_seconds", "ppo_tokens_per_second", "ppo_compilations"}
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in metrics.items() if k not in timing}
    # The demonstrations' mean score is 0 after the shift.
    np.testing.assert_allclose(metrics["reward_model_demonstrations_score"], 0.0, atol=1e-4)


def test_pipeline_on_real_text(shared_data, tmp_path):
    metrics = pipeline.main(
        pipeline.Config(
            run_dir=str(tmp_path / "run"),
            model=str(shared_data / "model" / "stories260K-hf"),
            demonstrations=str(shared_data / "sft" / "dolly_3k.jsonl.gz"),
            comparisons=str(shared_data / "preference" / "hh_helpful_base.eval.jsonl.gz"),
            on_bad_row="skip",
            max_length=96,
            max_new_tokens=8,
            sft=sft.SFT(steps=4, batch_size=4, learning_rate=1e-3),
            reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=16, learning_rate=1e-3),
            ppo=ppo.PPO(steps=2, responses=8, epochs=1, minibatches=2),
        )
    )
    assert metrics["reward_model_val_accuracy_low"] < metrics["reward_model_val_accuracy_high"]
    assert "reward_model_length_baseline" in metrics and "ppo_kl_k1" in metrics
    assert not any("utility" in name for name in metrics)


def tiny_frozen():
    config = ModelConfig(
        vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, rope_theta=1e4,
        norm_eps=1e-5, tie_embeddings=True, max_length=16,
    )  # fmt: skip
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    reward_params = from_language_model(params, jax.random.key(1), config)
    prompts = setting.pad_prompts([[3, 4], [5, 6, 7]] * 4, length=4, pad_id=0)
    demonstrations = setting.pad_sequences([([3, 4], [5, 2])] * 4, length=8, pad_id=0)
    frozen = ppo.Frozen(params, reward_params, *jax.tree.map(jnp.asarray, (prompts, demonstrations)))
    return config, frozen


def run_iteration(**changes):
    config, frozen = tiny_frozen()
    cfg = ppo.PPO(responses=8, epochs=1, minibatches=1, **changes)
    iteration = ppo.make_iteration(cfg, config, max_new_tokens=4, eos_id=2, pad_id=0)
    state = ppo.init_state(cfg, config, frozen.reference, frozen.reward_model)
    return cfg, config, frozen, iteration, state


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one_and_the_rewards_are_those_of_the_parts(temperature):
    cfg, config, frozen, iteration, state = run_iteration(temperature=temperature)
    prompts, completions = iteration.rollout(state, frozen, jax.random.key(0))
    experience, metrics = iteration.score(state, frozen, prompts, completions)
    _, update_metrics = iteration.update(state, frozen, experience, jax.random.key(1))
    # Scoring and update are two programs, which round differently where XLA fuses them differently: a few units in
    # the last place of a log-probability of about 3. A temperature that one of them forgot would be 0.1 and more.
    np.testing.assert_allclose(update_metrics["ratio"], 1.0, rtol=2e-6)
    assert float(update_metrics["clip_fraction"]) == 0.0
    np.testing.assert_allclose(metrics["kl_k1"], 0.0, atol=1e-6)
    # By hand: the reward model's value at the last token, on that token, or the rule for answers without an end.
    model = ScalarModel(config)
    for row in range(8):
        real = np.asarray(completions.mask[row])
        answer = np.asarray(completions.tokens[row])[real].tolist()
        question = np.asarray(prompts.tokens[row])[np.asarray(prompts.mask[row])].tolist()
        value = model.apply({"params": frozen.reward_model}, jnp.array([question + answer]))[0, -1]
        expected = value if answer[-1] == 2 else cfg.no_end_score
        rewards = np.asarray(experience.rewards[row])
        np.testing.assert_allclose(rewards.sum(), expected, atol=1e-4)
        np.testing.assert_allclose(rewards[3 + len(answer) - 1], expected, atol=1e-4)


def test_ptx_entropy_and_adaptive_beta_reach_the_update():
    key = jax.random.key(0)
    states = {}
    for name, changes in {
        "plain": {}, "ptx": {"ptx_coef": 1.0}, "entropy": {"entropy_coef": 0.5}, "adaptive": {"target_kl": 6.0},
    }.items():  # fmt: skip
        *_, frozen, iteration, state = run_iteration(**changes)
        states[name], metrics, *_ = jax.jit(iteration.whole)(state, frozen, key)
        assert ("ptx_loss" in metrics) == (name == "ptx")

    def same(a, b):
        return all(map(np.array_equal, *(jax.tree.leaves(states[name].policy.params) for name in (a, b))))

    assert not same("plain", "ptx") and not same("plain", "entropy") and same("plain", "adaptive")
    # KL is 0 at first, far below 6 nats: beta falls by 0.2 · 8 / 2000.
    np.testing.assert_allclose(states["adaptive"].beta, 0.1 * (1 - 0.2 * 8 / 2000), rtol=1e-6)
    assert float(states["plain"].beta) == np.float32(0.1)


def test_train_is_pure_and_vmaps_over_beta():
    config, frozen = tiny_frozen()
    tokenizer = setting.make_tokenizer()
    small = setting.Setting(
        config, None, tokenizer, frozen.demonstrations, frozen.demonstrations, frozen.prompts, frozen.prompts, None,
        4, None, None, {},
    )  # fmt: skip
    cfg = ppo.PPO(steps=2, responses=8, epochs=1, minibatches=2)
    train = kl_coefficient.make_train(cfg, small, frozen.reference, frozen.reward_model)
    betas = jnp.array([0.0, 1.0])
    together = jax.jit(jax.vmap(lambda beta: train(jax.random.key(0), beta)[1]["score"]))(betas)
    alone = jax.jit(lambda beta: train(jax.random.key(0), beta)[1]["score"])
    np.testing.assert_allclose(together, [alone(beta) for beta in betas], atol=1e-4)
    np.testing.assert_array_equal(alone(betas[0]), alone(betas[0]))


ADAPTERS = dict(lora_rank=2, lora_alpha=4.0)


def lora_iteration(*, merged):
    """PPO on one trunk with adapters that have been trained, or on the four full models that they make."""
    config, (params, reward_params, prompts, demonstrations, _) = tiny_frozen()
    cfg = ppo.PPO(responses=8, epochs=1, minibatches=2, ptx_coef=1.0, **ADAPTERS)

    def moved(own, seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), own)

    _, own = split(cfg, jax.random.key(2), reward_params)
    reward_model_own, critic = moved(own, 0), moved(own, 1)
    policy = moved(split(cfg, jax.random.key(3), params)[1], 2)
    if merged:
        whole = [merge_lora(with_lora({"trunk": params}, own)) for own in (reward_model_own, critic)]
        frozen = ppo.Frozen(params, whole[0], prompts, demonstrations)
        state = ppo.init_state(cfg, config, merge_lora(with_lora(params, policy)), whole[1])
    else:
        frozen = ppo.Frozen({}, reward_model_own, prompts, demonstrations, params)
        state = ppo.init_state(cfg, config, policy, critic)
    return ppo.make_iteration(cfg, config, max_new_tokens=4, eos_id=2, pad_id=0), state, frozen


def test_ppo_on_one_trunk_samples_and_scores_as_four_full_models_do():
    answers = {}
    for merged in (False, True):
        iteration, state, frozen = lora_iteration(merged=merged)
        prompts, completions = jax.jit(iteration.rollout)(state, frozen, jax.random.key(0))
        answers[merged] = completions, jax.jit(iteration.score)(state, frozen, prompts, completions)
    np.testing.assert_array_equal(answers[False][0].tokens, answers[True][0].tokens)
    experience, metrics = answers[False][1]
    assert abs(float(metrics["kl_k1"])) > 0.01 and float(metrics["sampler_gap_max"]) < 1e-4
    chex.assert_trees_all_close(answers[False], answers[True], atol=1e-4)
    # Each role by itself, from its full model.
    config, _ = tiny_frozen()
    roles = [
        (experience.old_values, token_values(ScalarModel(config), state.critic.params, experience.tokens)),
        (experience.old_logprobs, token_scores(Transformer(config), state.policy.params, experience.tokens)[0]),
        (experience.ref_logprobs, token_scores(Transformer(config), frozen.reference, experience.tokens)[0]),
    ]
    for ours, expected in roles:
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_ppo_on_one_trunk_moves_adapters_and_head_only():
    iteration, state, frozen = lora_iteration(merged=False)
    before = jax.tree.map(np.asarray, state)
    after, metrics, *_ = jax.jit(iteration.whole)(state, frozen, jax.random.key(0))
    trained = {name for role in (after.policy, after.critic) for name in flat(role.params)}
    assert {name.rpartition("/")[2] for name in trained if name.startswith(("layer", "trunk"))} == {
        "lora_a", "lora_b", "lora_scale"
    }  # fmt: skip
    assert len(jax.tree.leaves(after.policy.opt_state)) <= 2 * len(flat(after.policy.params)) + 4
    for role in ("policy", "critic"):
        leaves, old = (flat(getattr(s, role).params) for s in (after, before))
        moved = {name for name in leaves if not np.array_equal(leaves[name], old[name])}
        assert moved == {name for name in leaves if not name.endswith("lora_scale")}
    assert float(metrics["ratio"]) > 0 and np.isfinite(metrics["ptx_loss"])


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


def test_the_pipeline_with_adapters(small_world, trained, tmp_path, monkeypatch):
    lora = ADAPTERS | {"frozen_dtype": "int8"}
    stages = {name: replace(stage, **lora) for name, stage in SMALL.items()}
    dropping = []
    for stage in (sft, reward_model):

        def in_training(cfg, frozen, own, key, step, stage=stage):
            dropping.append((stage, cfg.lora_dropout, isinstance(step, jax.core.Tracer)))
            return adapters.in_training(cfg, frozen, own, key, step)

        name = stage.__name__.rpartition(".")[2]
        stages[name] = replace(stages[name], lora_dropout=0.1)
        monkeypatch.setattr(stage, "in_training", in_training)
    metrics = pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), **stages))
    assert all(np.isfinite(value) for value in metrics.values())
    # One program for all steps, whose keys differ.
    assert dropping == [(stage, 0.1, True) for stage in (sft, reward_model)]
    for trunk in (trained["experiments.reward_model"]["trunk"], trained["experiments.ppo"]):
        assert trunk["layer_0"]["query"]["kernel"].dtype == "int8"
    peft_loads_the_adapters(tmp_path / "run")
    again = pipeline.main(pipeline.Config(run_dir=str(tmp_path / "run"), resume=True, **stages))
    same = ("win_rate", "ppo_score", "ppo_kl_k1", "sft_score", "reward_model_val_accuracy")
    assert {name: again[name] for name in same} == {name: metrics[name] for name in same}


def test_each_step_drops_other_numbers_and_without_a_rate_none():
    own = {"layer_0": {"up": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3)), "lora_scale": jnp.ones(())}}}
    frozen, key = {"layer_0": {"up": {"kernel": jnp.ones((4, 3))}}}, jax.random.key(0)
    model = {
        step: adapters.in_training(sft.SFT(lora_rank=2, lora_dropout=0.25), frozen, own, key, step) for step in (0, 1)
    }
    drops = [model[step]["layer_0"]["up"]["lora_dropout"] for step in (0, 1)]
    assert drops[0].key != drops[1].key and float(drops[0].rate) == 0.25
    plain = adapters.in_training(sft.SFT(lora_rank=2), frozen, own, key, 0)
    chex.assert_trees_all_equal(plain, with_lora(frozen, own))
    assert not hasattr(ppo.PPO(), "lora_dropout")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo": {"lora_rank": 2}}, "set --reward-model.lora-rank too"),
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
        (["--sft.steps", "0"], "steps is 0"),
        (["--sft.lora-rank", "2", "--sft.lora-dropout", "1"], "lora-dropout is 1.0; it must be below 1"),
        (["--reward-model.lora-dropout", "0.1"], "and needs a lora-rank"),
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
    assert "all three" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_choice_of_epoch_is_the_reward_models(small_world, monkeypatch):
    class FakeRun:
        def log(self, *_): ...
        def say(self, _): ...

    monkeypatch.setattr(sft, "make_sampler", lambda s, params, seed: lambda prompts, number: params)
    monkeypatch.setattr(pipeline, "join", lambda prompts, completions, pad_id: completions)
    monkeypatch.setattr(reward_model, "make_scorer", lambda s: lambda rm, params: np.array([rm[params]]))
    monkeypatch.setattr(sft, "make_validation_loss", lambda s: lambda params: float(params))
    world = setting.world_setting(0)
    assert pipeline.choose_epoch(world, [0, 1, 2], [0.1, 0.9, 0.3], FakeRun(), 0) == 1
