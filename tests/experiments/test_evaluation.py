"""Evaluation from the command: every number against a computation of its own, and what a user gets wrong."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import evaluate
from rlhf_jax.cli import run_main
from rlhf_jax.data import suites
from rlhf_jax.data.encode import encode
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import wilson_interval
from rlhf_jax.models import (
    ModelConfig,
    Transformer,
    from_language_model,
    load_hf,
    save_hf,
    save_hf_reward_model,
)
from rlhf_jax.simulation import make_tokenizer

pytestmark = pytest.mark.usefixtures("undrawn")


class Quiet:
    """A run that is not listened to."""

    def say(self, _): ...


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def reward_model(stories, tmp_path_factory):
    """A reward model that was never trained."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    config, params = load_hf(stories)
    params = from_language_model(params, jax.random.key(0), config)
    save_hf_reward_model(folder, config, params, tokenizer=AutoTokenizer.from_pretrained(stories))
    return str(folder)


PAIRS = [
    {"prompt": f"Tell me about the {animal}.", "chosen": good, "rejected": bad}
    for animal in ("cat", "big dog", "old red fox")
    for good, bad in [("It was happy.", "No."), ("Yes.", "It was a very sad day and then it rained.")]
]


def test_everything_at_once(stories, reward_model, tmp_path):
    wanted = {
        "prompt": "Say it.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    }
    metrics = evaluate.main(
        evaluate.Config(
            run_dir=str(tmp_path / "run"),
            model=stories,
            against=stories,
            reward_model=reward_model,
            judge=stories,
            preferences=(write(tmp_path / "pairs.jsonl", *[row | {"subset": row["chosen"][0]} for row in PAIRS]),),
            prompts=write(tmp_path / "prompts.jsonl", {"prompt": "Who?"}, {"prompt": "Once upon a time"}),
            world=3,
            ifeval=write(tmp_path / "ifeval.jsonl", *[wanted] * 3),
            gsm8k=write(tmp_path / "gsm8k.jsonl", *[{"question": "1 + 1?", "answer": "#### 2"}] * 2),
            text=write(tmp_path / "text.jsonl", {"text": "Once upon a time."}, {"text": "Lily was happy."}),
            max_new_tokens=12,
        )
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == metrics
    rates = [name.removesuffix("_n") for name in metrics if name.endswith("_n")]
    assert {
        "pairs_accuracy", "pairs/Y_accuracy", "pairs/I_length_baseline", "win_rate_reward_model", "win_rate_judge",
        "judge_consistent", "judge_takes_first", "win_rate_utility", "world_utility", "ifeval_prompt_strict",
        "ifeval_instruction_loose", "gsm8k_strict", "gsm8k_lenient", "perplexity",
    } <= set(rates)  # fmt: skip
    for name in rates:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
    assert metrics["pairs_accuracy_n"] == 6 and metrics["pairs/Y_accuracy_n"] == 3
    assert metrics["pairs_length_baseline"] == 0.5 and metrics["pairs/I_length_baseline"] == 1.0
    # A model against itself, greedily.
    for name in ("win_rate_reward_model", "win_rate_judge", "win_rate_utility"):
        assert metrics[name] == 0.5
    # No comma but no title either.
    assert metrics["ifeval_prompt_strict"] == 0.0 and metrics["ifeval_instruction_strict_n"] == 6
    lines = [json.loads(line) for line in open(tmp_path / "run" / "answers.jsonl", encoding="utf-8")]
    assert [line["suite"] for line in lines] == ["prompts"] * 2 + ["world"] * 3 + ["ifeval"] * 3 + ["gsm8k"] * 2
    assert lines[5]["strict"][1] is False and lines[0]["answer"] == lines[0]["against"]


def torch_logprob(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    scores = torch.log_softmax(logits, -1)
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(float(scores[t, token]) for t, token in zip(at, response, strict=True))


def test_perplexity_is_torchs(stories, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    texts = ["Once upon a time, there was a little girl named Lily. " * 3, "The dog ran.", ""]
    path = write(tmp_path / "text.jsonl", *({"text": text} for text in texts))
    metrics = evaluate.main(evaluate.Config(run_dir=str(tmp_path / "run"), model=stories, text=path, max_length=24))
    tokenizer, nats, tokens = AutoTokenizer.from_pretrained(stories), 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), 23):  # each window begins with BOS
            nats -= torch_logprob(model, [1], ids[start : start + 23])
            tokens += len(ids[start : start + 23])
    assert metrics["perplexity_n"] == tokens
    np.testing.assert_allclose(metrics["perplexity"], np.exp(nats / tokens), rtol=1e-4)


def test_implicit_rewards_and_their_absence(stories, tmp_path):
    # Another model with the same tokens: the same one, its output norm scaled.
    config, params = load_hf(stories)
    params["final_norm"]["scale"] *= 0.5
    save_hf(tmp_path / "other", config, params, tokenizer=AutoTokenizer.from_pretrained(stories))
    cfg = evaluate.Config(model=stories, against=str(tmp_path / "other"), beta=0.5)
    pairs = suites.read_preferences(write(tmp_path / "pairs.jsonl", *PAIRS), None).pairs
    models = evaluate.load_models(cfg)
    found = evaluate.score(cfg, models, "pairs", pairs, Quiet())
    alone = evaluate.score(cfg, models._replace(against=None), "pairs", pairs, Quiet())
    reference = evaluate.score(cfg, models._replace(model=models.against, against=None), "pairs", pairs, Quiet())
    np.testing.assert_allclose(found.chosen, 0.5 * (alone.chosen - reference.chosen), rtol=1e-5)
    np.testing.assert_allclose(found.rejected, 0.5 * (alone.rejected - reference.rejected), rtol=1e-5)
    lm = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    ids, _ = encode(pairs[0], models.model.tokenizer, 512)
    np.testing.assert_allclose(alone.chosen[0], torch_logprob(lm, ids.prompt, ids.responses[0]), rtol=1e-4)
    metrics = evaluate.evaluate_preferences(
        cfg, models._replace(against=None), "pairs", suites.PreferenceSet(pairs, [""] * 6, []), Quiet()
    )
    assert "pairs_calibration_error" not in metrics


def test_true_utility_decides_in_the_world(tmp_path):
    tokenizer = make_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16,
        rope_theta=1e4, norm_eps=1e-5, tie_embeddings=False, max_length=48,
    )  # fmt: skip
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    # One ends at once and says nothing, utility 0; the other says one word again and again, to its harm.
    for name, token in (("silent", tokenizer.eos_token_id), ("endless", tokenizer.convert_tokens_to_ids("answer"))):
        assert token is not None
        # A residual stream of ones throughout, and a head that reads it for one token.
        params = jax.tree.map(jnp.zeros_like, params) | {"embedding": jnp.ones_like(params["embedding"])}
        params["final_norm"] = {"scale": jnp.ones(config.d_model)}
        params["head"] = params["head"].at[:, token].set(1.0)
        save_hf(tmp_path / name, config, params, tokenizer=tokenizer)
    metrics = evaluate.main(
        evaluate.Config(
            run_dir=str(tmp_path / "run"), model=str(tmp_path / "silent"), against=str(tmp_path / "endless"), world=20
        )
    )
    assert metrics["world_utility"] == 0.0 and metrics["world_against_utility"] < -1.0
    assert metrics["win_rate_utility"] == 1.0 and metrics["win_rate_utility_low"] == wilson_interval(20, 20).low


PROBLEM, ROW = {"question": "1 + 1?", "answer": "2"}, {"prompt": "a", "chosen": "b", "rejected": "c"}
LLMBAR = {"input": "a", "output_1": "b", "output_2": "c", "label": 1}
PANDALM = {"instruction": "a", "response1": "b", "response2": "c", "annotator1": 1, "annotator2": 1, "annotator3": 1}


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        ([], [], "nothing to evaluate: give one or more of --ifeval"),
        (["--gsm8k", "FILE"], [PROBLEM], "--gsm8k needs --model"),
        (["--preferences", "FILE"], [ROW], "--preferences needs --model or --reward-model"),
        (["--preferences", "FILE", "FILE"], [ROW], "two files of the same name"),
        (["--prompts", "FILE"], [{"prompt": "a"}], "--prompts needs --against, and"),
        (["--gsm8k", "FILE"], [PROBLEM, {"question": "a"}], "FILE:2: field 'answer' is missing"),
        (["--gsm8k", "FILE"], [{"question": "a", "answer": "b"}], "FILE:1: the answer 'b' has no number"),
        (["--gsm8k", "FILE"], [{"question": 1, "answer": "b"}], "FILE:1: field 'question' is int, not text"),
        (["--gsm8k", "nowhere.jsonl"], [], "nowhere.jsonl: No such file"),
        (["--text", "nowhere.txt"], [], "nowhere.txt: No such file"),
        (["--text", "FILE"], [{"text": " "}], "FILE: there is no text in it"),
        (["--ifeval", "FILE"], [{"prompt": "a", "instruction_id_list": ["b"], "kwargs": [{}]}], "FILE:1: 'b' is no"),
        (["--ifeval", "FILE"], [{"prompt": "a", "instruction_id_list": "b", "kwargs": []}], "is str, not a list"),
        (
            ["--ifeval", "FILE"],
            [{"prompt": "a", "instruction_id_list": [["b"]], "kwargs": [{}]}],
            "FILE:1: instruction_id_list is",
        ),
        (
            ["--ifeval", "FILE"],
            [{"prompt": "a", "instruction_id_list": ["b"], "kwargs": ["c"]}],
            "FILE:1: instruction_id_list is",
        ),
        (["--preferences", "FILE"], [LLMBAR, LLMBAR | {"label": 3}], "FILE:2: label is 3"),
        (["--preferences", "FILE"], [PANDALM | {"annotator2": 2, "annotator1": 0}], "no row can be used: a tie"),
        (["--preferences", "FILE"], [{"a": "b"}], "FILE:1: fields a; known are"),
        (["--preferences", "FILE"], [ROW | {"chosen": "word " * 900}], "no pair fits: response too long"),
        (["--gsm8k", "FILE", "--max-new-tokens", "600"], [PROBLEM], "leaves no room for prompts"),
        (["--gsm8k", "FILE", "--model", "nowhere"], [PROBLEM], "there is no folder nowhere"),
        (["--preferences", "FILE", "--reward-model", "MODEL"], [ROW], "holds a LlamaForCausalLM"),
        (["--gsm8k", "FILE", "--limit", "0"], [PROBLEM], "limit is 0"),
        (["--gsm8k", "FILE", "--temperature", "-1"], [PROBLEM], "temperature is -1"),
    ],
)
def test_a_users_mistake_is_one_line(flags, rows, message, stories, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    path = write(tmp_path / "FILE", *rows)
    flags = [{"FILE": path, "MODEL": stories}.get(flag, flag) for flag in flags]
    if "--model" not in flags and not message.endswith(("--model", "--reward-model", "--ifeval")):
        flags += ["--model", stories]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(evaluate.main, evaluate.Config)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert message in shown and len(shown.strip().splitlines()) == 1


def test_a_prompt_that_does_not_fit_is_left_out_and_counted(stories, tmp_path, capsys):
    long = {"question": "What is 1 + 1? " * 40, "answer": "#### 2"}
    file = write(tmp_path / "gsm8k.jsonl", {"question": "1 + 1?", "answer": "#### 2"}, long, long)
    cfg = evaluate.Config(run_dir=str(tmp_path / "run"), model=stories, gsm8k=file, max_length=80, max_new_tokens=8)
    assert evaluate.main(cfg)["gsm8k_lenient_n"] == 1
    assert "not asked: prompt too long for 72 tokens: 2 rows (lines 2, 3)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no prompt can be asked: .*2 rows"):
        evaluate.main(
            evaluate.Config(
                run_dir=str(tmp_path / "none"), model=stories, gsm8k=write(tmp_path / "long.jsonl", long, long),
                max_length=80, max_new_tokens=8,
            )
        )  # fmt: skip
