"""Every stage alone, from folders and files: it asks only for what it uses, and leaves what the next one reads."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo, reward_model, sft
from rlhf_jax.cli import run_main
from rlhf_jax.models import ModelConfig, Transformer, from_language_model, load_hf, save_hf_reward_model
from rlhf_jax.pretrained import load_policy, load_reward_model

pytestmark = pytest.mark.usefixtures("undrawn")

SHORT = dict(max_length=64, max_new_tokens=8, scan_layers=True)
"""Layers scanned, as those of a deep model are: a small one has few, and test_pipeline.py has those one by one."""


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics_of(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]


def transformers_loads(folder, kind):
    """The class of the folder, its logits beside ours for a few ids."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = [[5, 9, 3, 7]]
    with torch.no_grad():
        theirs = getattr(transformers, kind).from_pretrained(folder).eval()(torch.tensor(ids)).logits.numpy()
    transformers.AutoTokenizer.from_pretrained(folder)
    return ids, theirs


@pytest.fixture(scope="module")
def data(tmp_path_factory, stories):
    """A model and one file of each kind."""
    folder = tmp_path_factory.mktemp("data")
    said = ["yes", "no, never", "perhaps", "so it is"]
    return {
        "model": stories,
        "demonstrations": lines(
            folder / "demonstrations.jsonl", [{"prompt": f"is it {n}?", "completion": said[n % 4]} for n in range(40)]
        ),
        "comparisons": lines(
            folder / "comparisons.jsonl",
            [{"prompt": f"what of {n}?", "chosen": f"good {n}", "rejected": "bad"} for n in range(40)],
        ),
        "prompts": lines(folder / "prompts.jsonl", [{"prompt": f"why {n}?", "answer": n} for n in range(40)]),
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """SFT alone, then a reward model alone from its folder."""
    folder = tmp_path_factory.mktemp("trained")
    sft.main(
        sft.Config(
            run_dir=str(folder / "sft"), model=data["model"], demonstrations=data["demonstrations"], steps=2,
            batch_size=4, **SHORT,
        )
    )  # fmt: skip
    metrics = reward_model.main(
        reward_model.Config(
            run_dir=str(folder / "rm"), model=str(folder / "sft" / "policy"), comparisons=data["comparisons"],
            demonstrations=data["demonstrations"], prompts_per_step=8, **SHORT,
        )
    )  # fmt: skip
    np.testing.assert_allclose(metrics["reward_model_demonstrations_score"], 0.0, atol=1e-3)
    return folder


def test_sft_alone_leaves_a_policy(trained):
    ids, theirs = transformers_loads(trained / "sft" / "policy", "AutoModelForCausalLM")
    config, params = load_hf(trained / "sft" / "policy")
    ours = jax.jit(Transformer(config).apply)({"params": params}, jnp.array(ids))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    rows = metrics_of(trained / "sft")
    assert {row["stage"] for row in rows} == {"sft"} and "val_loss" in rows[-1]
    assert not (trained / "sft" / "checkpoints" / "sft_epochs").exists()
    config = json.loads((trained / "sft" / "config.json").read_text())
    assert config["experiment"] == "sft" and config["version"]
    facts = json.loads((trained / "sft" / "run.json").read_text())
    assert {"model", "demonstrations"} <= set(facts["inputs"])
    assert "is it" in (trained / "sft" / "report.html").read_text(encoding="utf-8")
    assert "sft" in json.loads((trained / "sft" / "examples.jsonl").read_text().splitlines()[0])


def test_a_reward_model_alone_leaves_a_reward_model_with_its_bias(trained):
    _, theirs = transformers_loads(trained / "rm" / "reward_model", "AutoModelForSequenceClassification")
    assert theirs.shape == (1, 1)
    assert float(load_reward_model(str(trained / "rm" / "reward_model")).params["head"]["bias"]) != 0
    assert {row["stage"] for row in metrics_of(trained / "rm")} == {"reward_model"}
    for line in (trained / "rm" / "examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        number = re.search(r"what of (\d+)", example["prompt"])[1]
        assert example["chosen"].strip() == f"good {number}" and example["rejected"].strip() == "bad"
        assert example["chosen_score"] != example["rejected_score"]


def test_rows_of_a_models_folder_that_nobody_reads_are_said(data, tmp_path, capsys):
    shutil.copytree(data["model"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"warp_factor": 9}))
    sft.main(
        sft.Config(
            run_dir=str(tmp_path / "run"), model=str(tmp_path / "model"), demonstrations=data["demonstrations"],
            steps=0, batch_size=4, **SHORT,
        )
    )  # fmt: skip
    assert "warp_factor" in capsys.readouterr().out


REWARD = """
def brevity(prompts, completions, answer, **columns):
    assert len(answer) == len(prompts) == len(completions)
    return [None if n % 2 else -float(len(text)) for n, text in zip(answer, completions)]
"""


def test_ppo_from_the_two_folders_with_a_python_reward_beside_the_model(data, trained, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    metrics = ppo.main(
        ppo.Config(
            run_dir=str(tmp_path / "run"), model=str(trained / "sft" / "policy"),
            reward_model=str(trained / "rm" / "reward_model"), reward=f"{tmp_path / 'rewards.py'}:brevity",
            reward_weights=(1.0, 0.1), prompts=data["prompts"], watch=f"{tmp_path / 'rewards.py'}:brevity",
            steps=2, responses=8, minibatches=2, epochs=1, reward_jobs=1, **SHORT,
        )
    )  # fmt: skip
    rows = metrics_of(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["ppo", "ppo"]
    applies = rows[0]["reward/brevity/applies"]
    assert 0 < applies < 1 and rows[0]["reward/reward_model/applies"] == 1
    assert rows[0]["reward/brevity/errors"] == 0 and "watch/brevity" in rows[-1]
    assert {"distinct", "copies", "repetition", "length", "ended", "entropy", "kl_k1"} <= set(rows[0])
    assert "start_length" in metrics and "start_score" in metrics and "ppo_length" in metrics
    transformers_loads(tmp_path / "run" / "policy", "AutoModelForCausalLM")
    assert json.loads((tmp_path / "run" / "examples.jsonl").read_text().splitlines()[0])["prompt"]


def test_ppo_with_a_reward_model_of_another_tokenizer(data, small_reward_model, tmp_path):
    """It reads text, and the critic is the policy's own with a new head."""
    ppo.main(
        ppo.Config(
            run_dir=str(tmp_path / "run"), model=data["model"], reward_model=small_reward_model,
            prompts=data["prompts"], steps=1, responses=8, minibatches=2, epochs=1, reward_max_failed=1.0, **SHORT,
        )
    )  # fmt: skip
    (row,) = metrics_of(tmp_path / "run")
    assert {f"reward/{Path(small_reward_model).name}/{name}" for name in ("mean", "errors", "shortened")} <= set(row)


def test_ppo_with_a_reward_model_of_another_size(data, tmp_path):
    base = load_policy(data["model"])
    small = ModelConfig(**{**vars(base.config), "n_layers": 1, "d_ff": 16})
    params = jax.jit(Transformer(small).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    rewards = from_language_model(params, jax.random.key(1), small)
    save_hf_reward_model(tmp_path / "rm", small, rewards, tokenizer=base.tokenizer)
    ppo.main(
        ppo.Config(
            run_dir=str(tmp_path / "run"), model=data["model"], reward_model=str(tmp_path / "rm"),
            prompts=data["prompts"], steps=1, responses=8, minibatches=2, epochs=1, lora_rank=2, **SHORT,
        )
    )  # fmt: skip
    (row,) = metrics_of(tmp_path / "run")
    assert "reward/rm/mean" in row and "reward/rm/errors" not in row


def test_ppo_in_the_world_makes_what_it_needs_first(small_world, tmp_path, monkeypatch):
    defaults = sft.with_defaults
    monkeypatch.setattr(sft, "with_defaults", lambda cfg, base, rows: replace(defaults(cfg, base, rows), steps=4))
    metrics = ppo.main(
        ppo.Config(run_dir=str(tmp_path / "run"), steps=1, responses=8, minibatches=2, epochs=1, mesh=None)
    )
    assert (tmp_path / "run" / "sft" / "policy").is_dir()
    assert (tmp_path / "run" / "reward_model" / "reward_model").is_dir()
    assert {"start_utility", "ppo_utility", "win_rate", "shifted_win_rate"} <= set(metrics)
    assert {row["stage"] for row in metrics_of(tmp_path / "run")} == {"ppo"}
    # What was made is not made again.
    monkeypatch.setattr(sft, "main", None)
    again = ppo.main(
        ppo.Config(run_dir=str(tmp_path / "run"), steps=1, responses=8, minibatches=2, epochs=1, resume=True)
    )
    same = {"start_utility", "ppo_utility", "win_rate", "ppo_kl_k1"}
    assert {name: again[name] for name in same} == {name: metrics[name] for name in same}


def test_a_stage_can_be_told_to_train_nothing(data, tmp_path):
    sft.main(
        sft.Config(
            run_dir=str(tmp_path / "run"), model=data["model"], demonstrations=data["demonstrations"], steps=0, **SHORT
        )
    )  # fmt: skip
    ours, theirs = (load_hf(folder)[1] for folder in (tmp_path / "run" / "policy", data["model"]))
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_a_stage_can_run_twice_in_one_run_under_two_names(small_world, tmp_path):
    from rlhf_jax.log import Run
    from rlhf_jax.tasks.simulated import World

    world = World(0)
    cfg = sft.SFT(steps=2, batch_size=8)
    with Run(tmp_path / "run", cfg, name="rounds") as run:
        for number in (1, 2):
            trained = sft.train(
                cfg, world.base, world.demonstrations(), run, 0, eval_batch_size=64, stage=f"round-{number}-sft"
            )
            world.base = world.base._replace(params=trained.params)
    assert [row["stage"] for row in metrics_of(tmp_path / "run")] == ["round-1-sft"] * 2 + ["round-2-sft"] * 2


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (sft, ["--model", "MODEL"], "does not have the vocabulary of the controlled world"),
        (sft, ["--demonstrations", "F"], "--demonstrations needs --model"),
        (reward_model, ["--model", "nowhere", "--comparisons", "F"], "nowhere"),
        (ppo, ["--model", "MODEL", "--prompts", "PROMPTS"], "there is no reward"),
        (ppo, ["--model", "MODEL", "--prompts", "PROMPTS", "--reward", "no.py:f"], "no.py: No such file"),
        (ppo, ["--model", "MODEL", "--prompts", "PROMPTS", "--reward", "length"], "FILE.py:NAME"),
        (ppo, ["--reward-weights", "1", "2"], "2 reward-weights for 0 rewards"),
        (ppo, ["--prompts-columns", "prompt=question"], "--prompts-columns is about the files of --prompts"),
        (sft, ["--demonstrations-format", "alpaca"], "--demonstrations-format is about the files of --demonstrations"),
        (ppo, ["--model", "MODEL", "--prompts", "PROMPTS", "--reward-model", "MODEL"], "MODEL"),
    ],
)
def test_a_users_mistake_is_one_line(data, module, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": data["model"], "PROMPTS": data["prompts"]}
    monkeypatch.setattr(sys, "argv", ["x.py", *(given.get(flag, flag) for flag in flags)])
    with pytest.raises(SystemExit) as end:
        run_main(module.main, module.Config)
    shown = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(shown.splitlines()) == 1
    assert given.get(message, message) in shown
    assert not list(tmp_path.glob("runs/*"))
