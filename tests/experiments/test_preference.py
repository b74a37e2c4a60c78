"""Preference optimisation: its pairs, its five objectives, the reference, and the experiment from end to end."""

import json
import shutil
import sys
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from experiments import dpo, ipo, kto, orpo, simpo
from experiments.stages import train_preference
from rlhf_jax import checkpoint, preference
from rlhf_jax.batches import RankedAnswers
from rlhf_jax.cli import run_main
from rlhf_jax.data import pairs
from rlhf_jax.data.preferences import pad_rankings
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.models import ModelConfig, Transformer, load_hf
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import answer_logprobs
from rlhf_jax.simulation.world import make_tokenizer
from rlhf_jax.tasks.task import Comparisons

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIG = ModelConfig(
    vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=16,
)  # fmt: skip
MODEL = Transformer(CONFIG)
BETAS = {"dpo": 0.3, "ipo": 0.4, "simpo": 2.0, "orpo": 0.5, "kto": 0.3}


def some_answers(count=24):
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(3, 12, rng.integers(1, most)).tolist()  # noqa: E731
    prompts = [[number % 9 + 3, *draw(5)] for number in range(count // 2)]
    return [(prompts[number // 2], [*draw(7), 2]) for number in range(count)]


def small_comparisons():
    """Two answers to each prompt, as comparisons to train on and held out."""
    answers = some_answers()
    ranks = [(0, 1), (1, 0), (0, 1)] * 4
    rankings = [
        RankedAnswers(answers[2 * p][0], [answers[2 * p][1], answers[2 * p + 1][1]], ranks[p], doubt=p / 24)
        for p in range(12)
    ]
    lay = partial(pad_rankings, length=16, pad_id=0)
    return Comparisons(rankings, lay(rankings), {}, lay, packed=False)


def base_of(params):
    tokenizer = make_tokenizer()
    return Pretrained(CONFIG, params, tokenizer)


@cache
def params_of(seed):
    params = jax.jit(MODEL.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
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


LOSSES = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo, "kto": kto}
CONFIGS = {"dpo": dpo.DPO, "ipo": ipo.IPO, "simpo": simpo.SimPO, "orpo": orpo.ORPO, "kto": kto.KTO}


def batches(loss, *, packed):
    """The loss, its implicit reward, and batches of pairs (KTO: single answers), the reference being params_of(1)."""
    cfg = CONFIGS[loss](batch_size=6, beta=BETAS[loss])
    examples = pairs.paired(small_comparisons().train, "best_worst")
    if loss == "kto":
        examples = pairs.singly(examples)
    score = jax.jit(partial(answer_logprobs, MODEL))

    def ref_score(answers):
        return np.asarray(score(params_of(1), pad_sequences(answers, length=16, pad_id=0)))

    batch = preference.make_batches(
        examples, ref_score, CONFIG, groups_a_step=12 if loss == "kto" else 6, accumulate=1, packed=packed, pad_id=0,
        mismatched=loss == "kto", seed=0,
    )  # fmt: skip
    own_loss, reward = (partial(getattr(LOSSES[loss], name), cfg) for name in ("loss", "reward"))
    return own_loss, reward, examples, batch


@pytest.mark.parametrize("packed", [False, True])
def test_the_reference_is_what_it_would_be_in_the_batch(packed):
    _, _, examples, batch = batches("kto", packed=packed)
    reference = params_of(1)
    score = jax.jit(partial(preference.batch_logprobs, MODEL))
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
    own_loss, reward, examples, batch = batches(loss, packed=packed)
    params, reference = params_of(0), params_of(1)
    some = batch(0)
    (value, metrics), grads = jax.jit(
        jax.value_and_grad(partial(preference.objective, own_loss, MODEL), has_aux=True)
    )(params, some)  # fmt: skip
    # Which answers these are, by the reference's log-probabilities: they all differ.
    table = slowly(reference, examples.answers)
    rows = [int(np.abs(table - ref).argmin()) for ref in some.ref_logprobs]
    answers = [examples.answers[row] for row in rows]
    ours, theirs = slowly(params, answers), table[rows]
    chosen = pairs.paired(small_comparisons().train, "best_worst").groups[:, 0]
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
        if loss in ("dpo", "ipo"):  # the others have no soft labels
            doubts = {tuple(ranking.prompt): ranking.doubt for ranking in small_comparisons().train}
            told["label_smoothing"] = np.array([doubts[tuple(prompt)] for prompt, _ in answers[:6]])
            np.testing.assert_allclose(some.doubt, np.tile(told["label_smoothing"], 2))
        expected = getattr(oracles, f"{loss}_loss")(ours[:6], ours[6:], *against, beta=BETAS[loss], **told)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    moved = ours - theirs
    np.testing.assert_allclose(metrics["chosen_change"], moved[good].mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["rejected_change"], moved[~good].mean(), rtol=1e-3, atol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    if "accuracy" in metrics:
        implied = reward(ours, theirs, lengths)
        np.testing.assert_allclose(metrics["margin"], np.mean(implied[:6] - implied[6:]), rtol=1e-3, atol=1e-4)


def train(folder, *, loss="dpo", resume=False, **changes):
    comparisons = small_comparisons()
    given = {"steps": 8, "batch_size": 5, "learning_rate": 1e-2, "lora_rank": 0, "beta": 0.3, **changes}
    cfg, module = CONFIGS[loss](**given), LOSSES[loss]
    examples = pairs.paired(comparisons.train, cfg.pairs)
    with Run(folder, cfg, name=loss, resume=resume) as run:
        trained = train_preference(
            cfg, partial(module.loss, cfg), partial(module.reward, cfg), base_of(params_of(0)),
            pairs.singly(examples) if loss == "kto" else examples, comparisons, run, 0, stage=loss,
            eval_batch_size=64, mismatched=loss == "kto",
        )  # fmt: skip
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    last = checkpoint.latest(folder, loss)
    return trained.params, trained.metrics, rows, (last, checkpoint.inspect(folder, loss, last).sha256)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_to_the_very_same_parameters(tmp_path, monkeypatch, damaged):
    """The reference is not asked again, but where its answers are damaged."""
    straight = train(tmp_path / "run", loss="kto", keep=8)
    folder = tmp_path / "run" / "checkpoints" / "kto"
    for step in (4, 5, 6, 7, 8):
        shutil.rmtree(folder / str(step))
    kept = tmp_path / "run" / "kto_reference_2.npz"
    if damaged:
        kept.write_bytes(kept.read_bytes()[:90])
    asked = []
    score = preference.score_documents
    monkeypatch.setattr(
        preference, "score_documents", lambda *args, **kwargs: asked.append(1) or score(*args, **kwargs)
    )
    again = train(tmp_path / "run", loss="kto", keep=8, resume=True)
    assert len(asked) == damaged
    assert again[3] == straight[3] and again[3][0] == 8
    assert again[1] == straight[1]
    assert [row["step"] for row in again[2]] == list(range(1, 9))


def test_kept_scores_are_those_of_the_same_answers_reference_and_files(tmp_path):
    answers, params = [([1, 2], [3]), ([4], [5, 6])], {"kernel": jnp.ones((2, 3))}
    key = preference.content_key(answers, params, {"model": "a"})
    np.savez(tmp_path / "kept.npz", scores=np.float32([1, 2]), key=key)
    assert preference.kept_scores(tmp_path / "kept.npz", key) == [1.0, 2.0]
    assert preference.kept_scores(tmp_path / "none.npz", key) is None
    others = [
        ([([1], [2, 3]), ([4], [5, 6])], params, {"model": "a"}),
        (answers, {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, {"model": "a"}),
        (answers, params, {"model": "b"}),
    ]
    for other in others:
        assert preference.kept_scores(tmp_path / "kept.npz", preference.content_key(*other)) is None


def test_a_run_that_only_skips_stops_and_leaves_the_batch(tmp_path):
    with pytest.raises(UserError, match=r"dpo: .* in 2 steps in a row\. The last one is step 2; .*skipped-dpo-2.npz"):
        train(tmp_path / "run", steps=30, beta=1e39, max_skipped=2)
    written = np.load(tmp_path / "run" / "skipped-dpo-2.npz")
    assert written["ref_logprobs"].shape == (10,) and {"answers.inputs", "good"} <= set(written)


def test_it_learns_what_it_is_shown(tmp_path):
    _, metrics, rows, _ = train(tmp_path / "run", steps=30)
    np.testing.assert_allclose(rows[0]["loss"], np.log(2), atol=1e-5)
    assert metrics["val_accuracy"] > 0.9 > rows[0]["accuracy"]  # held out: the same pairs
    assert metrics["val_chosen_change"] > metrics["val_rejected_change"]


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
    trunk, _ = dpo.DPO(**lora).split_trainable(params_of(0), jax.random.key(0))
    kernel = params["layer_0"]["query"]
    assert kernel["kernel"].dtype == frozen_dtype
    np.testing.assert_array_equal(kernel["kernel"], trunk["layer_0"]["query"]["kernel"])
    assert np.abs(kernel["lora_b"]).max() > 0 and abs(metrics["val_chosen_change"]) > 1e-3


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (dpo, ["--beta", "-1"], "beta is -1.0; it must be more than 0"),
        (dpo, ["--beta", "0"], "beta is 0.0; it must be more than 0"),
        (dpo, ["--label-smoothing", "1.5"], "label-smoothing is 1.5; it must be below 0.5"),
        (simpo, ["--gamma", "-1"], "gamma is -1.0; it must be at least 0"),
        (dpo, ["--learning-rate", "nan"], "learning-rate is nan"),
        (kto, ["--accumulate", "2"], "KTO estimates its KL from the whole batch"),
        (ipo, ["--batch-size", "64", "--accumulate", "3"], "64 pairs a step do not divide into 3 microbatches"),
        (orpo, ["--comparisons", "a.jsonl"], "--comparisons needs --model"),
        (kto, ["--unpaired", "a.jsonl"], "--unpaired needs --model"),
    ],
)
def test_a_users_mistake_is_one_line(small_world, module, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(module.main, module.Config)
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and len(shown.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/*"))


def test_a_flag_of_another_loss_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipo.py", "--label-smoothing", "0.1"])
    with pytest.raises(SystemExit) as end:
        run_main(ipo.main, ipo.Config)
    assert end.value.code == 2 and "label-smoothing" in "".join(capsys.readouterr())


def test_dpo_in_the_world_from_a_policy(small_world, small_policy, tmp_path):
    folder = tmp_path / "run"
    metrics = dpo.main(dpo.Config(run_dir=str(folder), model=small_policy, steps=3, batch_size=8))
    assert all(np.isfinite(value) for value in metrics.values())
    assert {
        "start_utility", "dpo_utility", "win_rate", "shifted_win_rate", "dpo_kl_k1", "dpo_length", "dpo_duplicates",
        "dpo_val_accuracy", "dpo_val_accuracy_low", "dpo_length_baseline", "ceiling", "dpo_val_chosen_change",
    } <= set(metrics)  # fmt: skip
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    assert {"loss", "margin", "accuracy", "chosen_change", "utility", "kl_k1"} <= set(rows[-1])
    assert {row["stage"] for row in rows} == {"dpo"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Preference optimisation" in page and "<b>DPO</b>" in page and "How good the answers truly are" in page
    assert load_hf(folder / "policy")[0].d_model == 64
    assert "dpo_kl_k1" in (folder / "policy" / "README.md").read_text(encoding="utf-8")


def test_kto_on_real_text_from_unpaired_answers_alone(stories, tmp_path):
    """Neither demonstrations nor comparisons are asked for."""
    rows = [{"prompt": f"is it {n}?", "completion": f"it is {n % 5}", "label": n % 3 == 0} for n in range(30)]
    path = tmp_path / "unpaired.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:12], {"prompt": "p"}, *rows[12:]]))
    metrics = kto.main(
        kto.Config(
            run_dir=str(tmp_path / "run"), model=stories, unpaired=str(path),
            on_bad_row="skip", max_length=64, max_new_tokens=8, steps=2, batch_size=4,
        )
    )  # fmt: skip
    assert "kto_kl_k1" in metrics and not any("val_accuracy" in name for name in metrics)
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejected] == [13]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8")]
    # At the reference every answer's loss is σ(0).
    np.testing.assert_allclose(rows[0]["loss"], 0.5, atol=1e-5)


def test_a_doubt_and_label_smoothing_go_wrong_independently():
    smoothed = partial(dpo.loss, dpo.DPO(beta=0.3, label_smoothing=0.1))
    logprobs, good, zero = jnp.asarray([-1.0, -4.0, -2.0, -1.0]), jnp.arange(4) < 2, jnp.zeros(4)
    batch = pairs.AnswerBatch(pad_sequences([([3], [4, 2])] * 4, length=16, pad_id=0), good, good + 2, zero, zero)
    doubts = {0.0: 0.1, 0.25: 0.25 * 0.9 + 0.75 * 0.1, 0.5: 0.5}
    for doubt, wrong in doubts.items():
        found, _ = smoothed(logprobs, batch._replace(doubt=jnp.full(4, doubt)), None)
        expected = oracles.dpo_loss(*np.split(np.asarray(logprobs), 2), np.zeros(2), np.zeros(2), beta=0.3,
                                    label_smoothing=wrong)  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_column_that_a_loss_does_not_use_is_said(stories, tmp_path, capsys):
    rows = [
        {"prompt": f"is it {n}?", "chosen": f"yes {n}", "rejected": "no", "probability": 0.7, "margin": n % 3}
        for n in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warning = "has no soft labels: the column 'probability' only says which answer is better"
    given = dict(
        model=stories, comparisons=str(path), comparisons_clamp=0.6, max_length=64, max_new_tokens=8, steps=1,
        batch_size=4, beta=0.5, learning_rate=0.0,
    )  # fmt: skip
    for name, warned in (("dpo", False), ("orpo", True)):
        metrics = LOSSES[name].main(LOSSES[name].Config(run_dir=str(tmp_path / name), **given))
        assert f"{name}_val_accuracy" in metrics
        shown = capsys.readouterr().out
        assert (warning in shown) == warned
        assert f"{name} has no margin between answers: the column 'margin' is not used" in shown
        assert "comparisons: 20 of 20 have a probability; it is 0.60 on average" in shown
