"""Constitutional AI from the command: in the world, on real text, and after a kill."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from experiments import constitutional, judging
from experiments.dpo import DPO
from experiments.sft import SFT
from rlhf_jax import revision
from rlhf_jax.constitution import read_constitution
from rlhf_jax.data.conversations import message
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import from_language_model, load_hf, save_hf_reward_model
from rlhf_jax.pretrained import load_policy
from rlhf_jax.sampling.sampler import make_sampler

FLAGS = {"eval_batch_size": 64, "sft": SFT(steps=2, batch_size=8), "dpo": DPO(steps=2, batch_size=8)}


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(small_world_for_all, small_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, constitutional.main(constitutional.Config(run_dir=str(folder), model=small_policy, **FLAGS))


def test_in_the_world(done):
    folder, metrics = done
    stages = read_metrics(folder)
    assert list(stages) == ["chains", "revised", "dpo"] and [row["step"] for row in stages["chains"]] == [0, 1, 2]
    assert {"start_utility", "revised_utility", "constitutional_utility", "constitutional_kl"} <= set(metrics)
    chains, learned = rows(folder, "chains"), rows(folder, "revisions")
    whole = [chain for chain in chains if not chain["unlearned"]]
    assert [chain["row"] for chain in chains] == list(range(len(chains))) and len(whole) == len(learned) > 0
    for chain, row in zip(whole, learned, strict=True):
        assert row == {"prompt": chain["prompt"], "completion": chain["revisions"][1]["revision"], "row": chain["row"]}
    compared = rows(folder, "comparisons")
    assert compared and all(0.5 <= row["probability"] <= 1 and row["chosen"] != row["rejected"] for row in compared)
    for name in ("revised", "policy"):
        assert np.isfinite(load_hf(str(folder / name))[1]["final_norm"]["scale"]).all()
    assert "critique 2" in rows(folder, "examples")[0] and "constitutional" in rows(folder, "examples")[-1]


def test_a_killed_run_goes_on_to_the_same_files(done, small_policy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    whole = {name: (folder / f"{name}.jsonl").read_bytes() for name in ("chains", "revisions", "comparisons")}
    (folder / "chains.jsonl").write_bytes(whole["chains"][: len(whole["chains"]) // 2])
    (folder / "comparisons.jsonl").unlink()
    for name in ("revised", "policy"):
        shutil.rmtree(folder / name)
    (folder / "summary.json").unlink()
    found = constitutional.main(
        constitutional.Config(run_dir=str(folder), model=small_policy, resume=True, **FLAGS)
    )  # fmt: skip
    assert {name: (folder / f"{name}.jsonl").read_bytes() for name in whole} == whole and found == done[1]


def test_on_real_text_with_demonstrations_and_comparisons(stories, tmp_path, monkeypatch):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("prompts", "demonstrations", "comparisons")}
    prompts = [f"Tell a story about number {n}." for n in range(8)]
    contents = {
        "prompts": [{"prompt": text} for text in prompts],
        "demonstrations": [{"prompt": text, "completion": "Once there was a dog."} for text in prompts],
        "comparisons": [{"prompt": text, "chosen": "A dog ran.", "rejected": "No."} for text in prompts],
    }
    for name, some in contents.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    cfg = constitutional.Config(
        run_dir=str(tmp_path / "run"), model=stories, **{name: str(file) for name, file in files.items()},
        constitution=str(constitutional.SHIPPED), examples=0, revisions=1, max_new_tokens=8, heldout=2,
        max_length=256, eval_batch_size=8, sft=SFT(steps=1, batch_size=2, lora_rank=0),
        dpo=DPO(steps=1, batch_size=2, lora_rank=0), comparisons_clamp=0.6,
    )  # fmt: skip
    # Stories go on for long: here each text counts as ended.
    said = revision.read
    for module in (revision, constitutional):
        monkeypatch.setattr(module, "read", lambda *some: [one._replace(ended=True) for one in said(*some)])
    config, params = load_hf(stories)
    rewards = from_language_model(params, jax.random.key(1), config)
    save_hf_reward_model(tmp_path / "watching", config, rewards, tokenizer=AutoTokenizer.from_pretrained(stories))
    # Its taste is known here: it likes the longer one.
    monkeypatch.setattr(judging, "document_rewards", lambda model, documents, batch_size: np.array(
        [float(len(response)) for _, response in documents]))  # fmt: skip
    metrics = constitutional.main(replace(cfg, watch=str(tmp_path / "watching")))
    folder = tmp_path / "run"
    chains = rows(folder, "chains")
    assert all(chain["revisions"][0]["critique"] for chain in chains) and len(rows(folder, "revisions")) == len(chains)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    lengths = [[len(tokenizer(text)["input_ids"]) for text in revision.texts_of(chain)] for chain in chains]
    pairs = [
        (a, b) for (a, b), texts in zip(lengths, map(revision.texts_of, chains), strict=True) if len(set(texts)) == 2
    ]
    assert metrics["watching_prefers_revision_1_n"] == len(pairs) > 0
    assert metrics["watching_prefers_revision_1"] == np.mean([0.5 * (b > a) + 0.5 * (b >= a) for a, b in pairs])
    questions = read_constitution(constitutional.SHIPPED).questions
    assert {row["question"] for row in rows(folder, "comparisons")} <= set(questions)
    data = json.loads((folder / "run.json").read_text())["data"]
    assert {name.rpartition("/")[2] for name in data} >= {
        "revisions.jsonl",
        "comparisons.jsonl",
        "demonstrations.jsonl",
    }
    assert np.isfinite(metrics["constitutional_kl"])


def test_replies_are_those_of_their_rows_whatever_is_asked_beside_them(stories):
    model = load_policy(stories)
    sample = make_sampler(
        model.config, seed=0, max_new_tokens=12, temperature=1.0, eos_id=model.eos_id, pad_id=model.pad_id,
        batch_size=4,
    )  # fmt: skip
    reply = revision.make_reply(model, lambda prompts, number: sample(model.params, prompts, number), max_length=64)
    asked = [
        (message("user", f"Tell a story about {thing}."),) for thing in ("a dog", "a cat", "a king", "a long " * 40)
    ]
    together = reply([*asked, asked[0]], [7, 8, 9, 10, 11], 3)
    assert together[3].missing == revision.LONG and together[0] != together[4]
    assert [reply([asked[place]], [7 + place], 3)[0] for place in (2, 0, 1)] == [
        together[place] for place in (2, 0, 1)
    ]
    assert reply(asked[:1], [7], 4) != together[:1]


def test_watched_models_are_read_before_anything_is_sampled(stories, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"why {n}?"}) + "\n" for n in range(8)))
    cfg = constitutional.Config(
        run_dir=str(tmp_path / "run"), model=stories, prompts=str(prompts), max_length=256, max_new_tokens=8
    )
    config, params = load_hf(stories)
    rewards = from_language_model(params, jax.random.key(1), config)
    for name in ("a", "b"):
        tokenizer = AutoTokenizer.from_pretrained(stories)
        save_hf_reward_model(tmp_path / name / "reward_model", config, rewards, tokenizer=tokenizer)
    for folders, words in ((("a", "b"), "two models are called 'reward_model'"), (("no",), "no/reward_model")):
        watch = tuple(str(tmp_path / name / "reward_model") for name in folders)
        with pytest.raises(UserError, match=words):
            constitutional.main(replace(cfg, watch=watch, run_dir=str(tmp_path / f"run-{folders[0]}")))
        assert not (tmp_path / f"run-{folders[0]}" / "chains.jsonl").exists()


def test_a_watched_model_that_cannot_be_asked_ends_nothing(stories, tmp_path, capsys):
    """Where every revision repeats the answer there is no pair."""
    row = {"row": 0, "prompt": "p", "answer": "a", "revisions": [{"revision": "a"}], "unlearned": ""}
    cfg = constitutional.Config(model=stories, revisions=1, prompts="f")
    with Run(tmp_path / "run", cfg, name="constitutional") as run:
        (run.dir / "chains.jsonl").write_text(json.dumps(row) + "\n")
        watched = {"rm": load_policy(stories)}
        assert judging.watch_revisions(cfg, run, watched, 8) == {}
    assert "rm cannot be asked about revision 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"constitution": "x.json"}, "--constitution is not used without files"),
        ({"watch": "x"}, "--watch is not used without files"),
        ({"judge": "x"}, "--judge is not used without files"),
        ({"comparisons": "f", "comparisons_columns": ("a=b",)}, "--comparisons-columns cannot be given here"),
        ({"streaming": True}, "--streaming is not used here"),
        ({"revisions": -1}, "revisions is -1"),
    ],
)
def test_a_users_mistake_is_one_line(small_world_for_all, small_policy, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        constitutional.main(constitutional.Config(run_dir=str(tmp_path / "run"), **{"model": small_policy, **flags}))
