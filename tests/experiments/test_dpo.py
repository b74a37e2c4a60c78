"""Preference optimisation: its pairs, its five objectives, the reference, and the experiment from end to end."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from experiments import dpo, pairs, setting, sft
from experiments.ablations import preference_losses
from experiments.adapters import split
from rlhf_jax import checkpoint
from rlhf_jax.batches import Completions, Rankings
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import join, pad_prompts, pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.models import ModelConfig, Transformer, load_hf

CONFIG = ModelConfig(
    vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=16,
)  # fmt: skip
MODEL = Transformer(CONFIG)
BETAS = {"dpo": 0.3, "ipo": 0.4, "simpo": 2.0, "orpo": 0.5, "kto": 0.3}


def test_pairs_of_ranked_answers():
    ranks = np.array([[2, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 7]], np.int32)
    mask = np.array([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    assert pairs.best_and_worst(ranks, mask).tolist() == [[1, 0], [3, 4], [8, 6]]
    expected = {(1, 2), (1, 0), (2, 0), (3, 4), (3, 5), (8, 6), (8, 7)}
    found = pairs.all_pairs(ranks, mask).tolist()
    assert set(map(tuple, found)) == expected and len(found) == len(expected)


def test_answers_are_found_again_in_joined_and_in_padded_rows():
    answers = [([3, 4], [5, 2]), ([6], [7, 8, 2])]
    padded = pad_sequences(answers, length=8, pad_id=0)
    prompts = pad_prompts([prompt for prompt, _ in answers], length=4, pad_id=0)
    tokens = np.array([[5, 2, 0], [7, 8, 2]])
    joined = join(prompts, Completions(tokens, tokens > 0, None), pad_id=0)
    for rows in (padded, joined):
        assert pairs.unjoin(rows, np.array([1, 0, 1])) == [answers[1], answers[0], answers[1]]
    # Each answer once, and pairs that say which is which.
    examples = pairs.paired(Rankings(padded, np.array([[1, 0]]), np.ones((1, 2), bool)), "best_worst")
    assert [examples.answers[i] for i in examples.groups[0]] == [answers[1], answers[0]]
    assert examples.good.tolist() == [[True, False]]
    single = pairs.singly(examples)
    assert [(examples.answers[i], good) for (i,), (good,) in zip(single.groups, single.good, strict=True)] == [
        (answers[1], True), (answers[0], False),
    ]  # fmt: skip


def test_a_mismatched_answer_follows_the_prompt_of_another():
    answers = [([n, n], [10, 2]) for n in (3, 4, 5)] + [([3, 3], [11, 2]), ([6] * 7, [2])]
    found = pairs.mismatch(answers, longest=8, seed=0)
    assert [response for _, response in found] == [response for _, response in answers]
    given = {}
    for (prompt, response), (other, _) in zip(answers, found, strict=True):
        assert other[0] != prompt[0] and len(other) + len(response) <= 8
        assert given.setdefault(prompt[0], other[0]) == other[0]
    assert sorted(given.values()) == sorted(given)
    with pytest.raises(UserError, match="at least two prompts"):
        pairs.mismatch(answers[3:4], longest=8, seed=0)


def some_answers(count=24):
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(3, 12, rng.integers(1, most)).tolist()  # noqa: E731
    prompts = [[number % 9 + 3, *draw(5)] for number in range(count // 2)]
    return [(prompts[number // 2], [*draw(7), 2]) for number in range(count)]


def small_setting():
    """Two answers to each prompt, as comparisons to train on and held out; no judge."""
    rows = pad_sequences(some_answers(), length=16, pad_id=0)
    ranks = np.tile(np.array([[0, 1], [1, 0], [0, 1]], np.int32), (4, 1))
    rankings = Rankings(rows, ranks, np.ones(ranks.shape, bool))
    prompts = pad_prompts([prompt for prompt, _ in some_answers()[:8]], length=8, pad_id=0)
    small = setting.Setting(
        CONFIG, None, setting.make_tokenizer(), rows, rows, prompts, prompts, None, 6, None, None, {}
    )  # fmt: skip
    return small, setting.Comparisons(rankings, rankings, {})


def params_of(seed):
    params = MODEL.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(lambda x: 2.0 * x if x.ndim > 1 else x, params)


logits_of = jax.jit(lambda params, ids: MODEL.apply({"params": params}, ids)[0])


def slowly(params, answers):
    """log π of each answer, one at a time, in float64."""
    found = []
    for prompt, response in answers:
        ids = prompt + response
        # What comes after a token changes nothing before it.
        logits = np.asarray(logits_of(params, jnp.array([ids + [0] * (16 - len(ids))])), np.float64)
        steps = range(len(prompt), len(ids))
        found.append(sum(logits[t - 1, ids[t]] - np.log(np.exp(logits[t - 1]).sum()) for t in steps))
    return np.array(found)


def batches(loss, *, packed):
    """The experiment's batches of pairs (KTO: single answers), the reference being params_of(1)."""
    small, comparisons = small_setting()
    cfg = dpo.DPO(loss=loss, batch_size=6, beta=BETAS[loss])
    examples = pairs.paired(comparisons.train, "best_worst")
    if loss == "kto":
        examples = pairs.singly(examples)
    score = jax.jit(partial(dpo.answer_logprobs, MODEL))
    ref_score = lambda tokens: np.asarray(score(params_of(1), tokens))  # noqa: E731
    return cfg, examples, dpo.make_batches(cfg, small, examples, ref_score, packed=packed, seed=0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_is_what_it_would_be_in_the_batch(packed):
    _, examples, batch = batches("kto", packed=packed)
    reference = params_of(1)
    score = jax.jit(partial(dpo.batch_logprobs, MODEL))
    some = batch(1)
    np.testing.assert_allclose(some.ref_logprobs, score(reference, some.answers), atol=1e-4)
    np.testing.assert_allclose(some.ref_mismatched, score(reference, some.mismatched), atol=1e-4)
    assert np.abs(some.ref_mismatched - some.ref_logprobs).min() > 1e-3
    # An epoch draws each answer once, and the next one in another order.
    epochs = [np.concatenate([batch(step).ref_logprobs for step in steps]) for steps in ((0, 1), (2, 3))]
    everything = slowly(reference, examples.answers)
    for epoch in epochs:
        np.testing.assert_allclose(np.sort(epoch), np.sort(everything), atol=1e-4)
    assert not np.allclose(*epochs)


@pytest.mark.parametrize(("loss", "packed"), [*((loss, False) for loss in BETAS), ("kto", True)])
def test_each_objective_is_its_equation_of_every_answer_apart(loss, packed):
    cfg, examples, batch = batches(loss, packed=packed)
    params, reference = params_of(0), params_of(1)
    some = batch(0)
    (value, metrics), grads = jax.jit(
        jax.value_and_grad(partial(dpo.objective, cfg, MODEL), has_aux=True)
    )(params, some)  # fmt: skip
    # Which answers these are, by the reference's log-probabilities: they all differ.
    table = slowly(reference, examples.answers)
    rows = [int(np.abs(table - ref).argmin()) for ref in some.ref_logprobs]
    answers = [examples.answers[row] for row in rows]
    ours, theirs = slowly(params, answers), table[rows]
    chosen = pairs.paired(small_setting()[1].train, "best_worst").groups[:, 0]
    good = np.isin(rows, chosen)
    lengths = np.array([len(response) for _, response in answers])
    if loss == "kto":
        others = pairs.mismatch(examples.answers, longest=16, seed=0)
        kl = np.mean(slowly(params, [others[row] for row in rows]) - slowly(reference, [others[row] for row in rows]))
        expected = oracles.kto_loss(
            ours, theirs, good, kl, beta=0.3, desirable_weight=1.0, undesirable_weight=1.0
        )  # fmt: skip
        np.testing.assert_allclose(metrics["kl"], max(kl, 0.0), rtol=1e-4, atol=1e-5)
    else:
        assert good.tolist() == [True] * 6 + [False] * 6
        assert [prompt for prompt, _ in answers[:6]] == [prompt for prompt, _ in answers[6:]]
        against = (lengths[:6], lengths[6:]) if loss in ("simpo", "orpo") else (theirs[:6], theirs[6:])
        told = {"gamma": 1.0} if loss == "simpo" else {}
        expected = getattr(oracles, f"{loss}_loss")(ours[:6], ours[6:], *against, beta=BETAS[loss], **told)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    moved = ours - theirs
    np.testing.assert_allclose(metrics["chosen_change"], moved[good].mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["rejected_change"], moved[~good].mean(), rtol=1e-3, atol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    if "accuracy" in metrics:
        reward = dpo.implicit_rewards(cfg, ours, theirs, lengths)
        np.testing.assert_allclose(metrics["margin"], np.mean(reward[:6] - reward[6:]), rtol=1e-3, atol=1e-4)


def train(folder, *, resume=False, **changes):
    small, comparisons = small_setting()
    cfg = dpo.DPO(**{"steps": 8, "batch_size": 5, "learning_rate": 1e-2, "beta": 0.3, **changes})
    with Run(folder, cfg, resume=resume) as run:
        params, _, metrics = dpo.train(cfg, small, comparisons, params_of(0), run, 0)
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    last = checkpoint.latest(folder, "dpo")
    return params, metrics, rows, (last, checkpoint.inspect(folder, "dpo", last).sha256)


def test_a_killed_run_goes_on_to_the_very_same_parameters(tmp_path):
    straight = train(tmp_path / "run", loss="kto", keep=8)
    folder = tmp_path / "run" / "checkpoints" / "dpo"
    for step in (4, 5, 6, 7, 8):
        shutil.rmtree(folder / str(step))
    again = train(tmp_path / "run", loss="kto", keep=8, resume=True)
    assert again[3] == straight[3] and again[3][0] == 8
    assert again[1] == straight[1]
    assert [row["step"] for row in again[2]] == list(range(1, 9))


def test_a_run_that_only_skips_stops_and_leaves_the_batch(tmp_path):
    with pytest.raises(UserError, match=r"dpo: .* at 2 steps in a row, the last of them 2, .*skipped-dpo-2.npz"):
        train(tmp_path / "run", steps=30, beta=1e39, max_skipped=2)
    written = np.load(tmp_path / "run" / "skipped-dpo-2.npz")
    assert written["ref_logprobs"].shape == (10,) and {"answers.inputs", "good"} <= set(written)


def test_it_learns_what_it_is_shown(tmp_path):
    _, metrics, rows, _ = train(tmp_path / "run", steps=30)
    np.testing.assert_allclose(rows[0]["loss"], np.log(2), atol=1e-5)
    assert metrics["dpo_val_accuracy"] > 0.9 > rows[0]["accuracy"]  # held out: the same pairs
    assert metrics["dpo_val_chosen_change"] > metrics["dpo_val_rejected_change"]
    assert metrics["dpo_kl_k1"] > 0.01 and "dpo_utility" not in metrics


def test_accumulated_microbatches_of_pairs_are_the_whole_batch(tmp_path):
    # "all" pairs of two are the same pairs.
    whole, _, rows, _ = train(tmp_path / "whole", steps=2, batch_size=6, pairs="all", optimizer="adafactor")
    parts, _, more, _ = train(tmp_path / "parts", steps=2, batch_size=6, accumulate=3, optimizer="adafactor")
    for name in ("loss", "margin", "chosen_change", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in more], [row[name] for row in rows], rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(parts, whole, atol=1e-4)


@pytest.mark.parametrize("frozen_dtype", ["bfloat16", "int8"])
def test_with_adapters_the_reference_is_the_trunk(tmp_path, frozen_dtype):
    lora = dict(lora_rank=2, lora_alpha=4.0, frozen_dtype=frozen_dtype)
    params, metrics, rows, _ = train(tmp_path / "run", **lora)
    # The very trunk, as it was rounded: the policy begins there, at a loss of log 2.
    np.testing.assert_allclose(rows[0]["loss"], np.log(2), atol=1e-6)
    np.testing.assert_allclose(rows[0]["chosen_change"], 0.0, atol=1e-6)
    trunk, _ = split(dpo.DPO(**lora), jax.random.key(0), params_of(0))
    kernel = params["layer_0"]["query"]
    assert kernel["kernel"].dtype == frozen_dtype
    np.testing.assert_array_equal(kernel["kernel"], trunk["layer_0"]["query"]["kernel"])
    assert np.abs(kernel["lora_b"]).max() > 0 and abs(metrics["dpo_val_chosen_change"]) > 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "-1"], "beta is -1.0; it must be more than 0"),
        (["--beta", "0"], "beta is 0.0; it must be more than 0"),
        (["--label-smoothing", "1.5"], "label-smoothing is 1.5; it must be below 0.5"),
        (["--loss", "ipo", "--label-smoothing", "0.1"], "label-smoothing is a number of --loss dpo"),
        (["--gamma", "2"], "gamma is a number of --loss simpo"),
        (["--learning-rate", "nan"], "learning-rate is nan"),
        (["--loss", "kto", "--accumulate", "2"], "KTO's KL estimate needs its whole batch"),
        (["--accumulate", "3"], "64 pairs a step do not divide into 3 microbatches"),
        (["--loss", "kto", "--unpaired", "a.jsonl"], "unpaired answers need --loss kto and real text"),
    ],
)
def test_a_users_mistake_is_one_line(small_world, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(dpo.main, dpo.Config)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and len(shown.strip().splitlines()) == 1


def test_an_unknown_loss_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--loss", "ppo"])
    with pytest.raises(SystemExit) as end:
        run_main(dpo.main, dpo.Config)
    assert end.value.code == 2 and re.search("invalid choice|Expected", "".join(capsys.readouterr()))


def test_dpo_in_the_world(small_world, tmp_path):
    folder = tmp_path / "run"
    cfg = dpo.Config(run_dir=str(folder), steps=3, batch_size=8, sft=sft.SFT(steps=12, batch_size=8))
    metrics = dpo.main(cfg)
    assert all(np.isfinite(value) for value in metrics.values())
    assert {
        "sft_utility", "dpo_utility", "win_rate", "shifted_win_rate", "dpo_kl_k1", "dpo_length", "dpo_duplicates",
        "dpo_val_accuracy", "dpo_val_accuracy_low", "dpo_length_baseline", "dpo_ceiling", "dpo_val_chosen_change",
    } <= set(metrics)  # fmt: skip
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    assert {"loss", "margin", "accuracy", "chosen_change", "utility", "kl_k1"} <= set(rows[-1])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Preference optimisation" in page and "<b>DPO</b>" in page and "How good the answers truly are" in page
    assert load_hf(folder / "policy")[0].d_model == 64
    assert "dpo_kl_k1" in (folder / "policy" / "README.md").read_text(encoding="utf-8")


def test_kto_on_real_text_from_unpaired_answers(shared_data, tmp_path, monkeypatch):
    learned = {}

    def make_batches(cfg, setting, examples, *args, make=dpo.make_batches, **kwargs):
        learned.update(examples=examples, **kwargs)
        return make(cfg, setting, examples, *args, **kwargs)

    monkeypatch.setattr(dpo, "make_batches", make_batches)

    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    demonstrations = [{"prompt": f"is it {n}?", "completion": f"yes {n}"} for n in range(20)]
    compared = [{"prompt": f"what of {n}?", "chosen": f"good {n}", "rejected": "bad"} for n in range(20)]
    unpaired = [{"prompt": f"why {n}?", "completion": "so " * (n + 1), "label": n % 3 == 0} for n in range(12)]
    unpaired.append({"prompt": "why?", "completion": "so", "label": "no"})
    metrics = dpo.main(
        dpo.Config(
            run_dir=str(tmp_path / "run"), model=str(shared_data / "model" / "stories260K-hf"),
            demonstrations=lines("demonstrations.jsonl", demonstrations),
            comparisons=lines("comparisons.jsonl", compared), unpaired=lines("unpaired.jsonl", unpaired),
            on_bad_row="skip", max_length=64, max_new_tokens=8, loss="kto", steps=2, batch_size=4,
            sft=sft.SFT(steps=2, batch_size=2, learning_rate=1e-3),
        )
    )  # fmt: skip
    assert 0 <= metrics["dpo_val_accuracy_low"] <= metrics["dpo_val_accuracy"] <= 1
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [13]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    # At the reference every answer's loss is σ(0).
    first = next(row for row in rows if row["stage"] == "dpo")
    np.testing.assert_allclose(first["loss"], 0.5, atol=1e-5)
    assert len(learned["examples"].answers) == 12 and learned["examples"].good.sum() == 4 and learned["packed"]


def test_variants_and_their_table():
    cfg = preference_losses.Config(losses=("dpo", "ipo"), betas=(0.2, 1.0), learning_rates=(1e-3,))
    names = [preference_losses.name(variant) for variant in preference_losses.variants(cfg)]
    assert names == ["dpo-0.2-0.001", "dpo-1-0.001", "ipo-0.2-0.001", "ipo-1-0.001"]
    defaults = preference_losses.variants(replace(cfg, betas=(), learning_rates=()))
    assert [(v.beta_used, v.learning_rate) for v in defaults] == [(0.1, 5e-4), (0.03, 5e-4)]
    # Two seeds: the mean, the least and the most.
    results = [[dict.fromkeys((k for k, _ in preference_losses.COLUMNS.values()), x) for x in seed]
               for seed in ([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 3.0, 4.0])]  # fmt: skip
    table = preference_losses.markdown(cfg, results).splitlines()
    assert len(table) == 6 and table[2].startswith("| dpo | 0.2 | 0.001 | 1.5 (1.0, 2.0) | 1.50 (1.00, 2.00) |")
