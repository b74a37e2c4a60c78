"""Each ablation from end to end, in this process and in a world of few of everything."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, iterate, ppo, reward_model, sft
from experiments.ablations import (
    claims,
    constitution,
    ensemble,
    imitation,
    kl_coefficient,
    memory,
    methods,
    ppo_details,
    precision,
    preference_losses,
    records,
    reward_data,
    rounds,
    tails,
    verifiable,
)
from experiments.ablations.grid_results import Cells
from experiments.training import Preference
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.models import MIXED, Transformer, from_language_model
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks import simulated

SIZES = simulated.Sizes(
    demonstrations=128, validation=64, compared=16, ranked=4, heldout_pairs=32, prompts=64, heldout=64, layers=1
)
"""Whatever is sampled or scored is 64 rows: one program."""
SFT = sft.SFT(steps=4, batch_size=4)
PPO = ppo.PPO(steps=9, responses=8, epochs=1, minibatches=1)


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch, tmp_path):
    monkeypatch.setattr(simulated, "SIZES", SIZES)
    monkeypatch.chdir(tmp_path)  # what is common is kept there


@pytest.fixture(scope="module")
def trained():
    """Policies by the seed and the flags that SFT trained them with."""
    return {}


@pytest.fixture(autouse=True)
def sft_once(trained, monkeypatch):
    """Ablations begin with the same SFT, which is trained once for each seed; SFT on other data is its own."""
    train = sft.train

    def once(cfg, base, demonstrations, run, seed, *, stage="sft", **more):
        key = seed, repr(cfg), repr(base.config), tuple(sorted(more))
        if stage != "sft" or more.get("keep_epochs"):
            return train(cfg, base, demonstrations, run, seed, stage=stage, **more)
        if key not in trained:
            trained[key] = train(cfg, base, demonstrations, run, seed, **more)
        return trained[key]

    monkeypatch.setattr(sft, "train", once)


def cells_of(folder):
    return {path.stem: json.loads(path.read_text())["values"] for path in folder.glob("seed-*/*.json")}


def check_claims(module, folder, **numbers):
    """Every claim names fields of the variants, and numbers that some cell has or these, whichever there are."""
    made = records.cells_of(json.loads((folder / "record.json").read_text()), module)
    everything = {name: value for cell in made.values.values() for name, value in cell.items()}
    everything |= numbers
    cells = made._replace(values=dict.fromkeys(made.values, everything))

    def some_variant(cells, **fields):
        assert set(fields) <= set(module.Variant._fields), fields
        return cells.finished()[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "variant_of", some_variant)
        for claim in module.CLAIMS:
            assert set(claim.numbers(cells)) == set(made.seeds), claim
            assert np.isfinite(claim.above) or np.isfinite(claim.below), claim
    assert len({claim.text for claim in module.CLAIMS}) == len(module.CLAIMS) > 2


def tables_of(folder):
    text = (folder / "table.md").read_text(encoding="utf-8")
    return [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]


def test_kl_coefficient(tmp_path):
    folder = tmp_path / "run"
    cfg = kl_coefficient.Config(
        run_dir=str(folder), jobs=0, seeds=1, betas=(0.0, 1.0), sft=SFT, ppo=PPO,
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    )  # fmt: skip
    metrics = kl_coefficient.main(cfg)
    free, held = (cells_of(folder)[f"beta-{beta}"] for beta in (0, 1))
    # Both begin at the same policy, and the first answers are the same.
    assert free["sft_utility"] == held["sft_utility"] and free["distance"] != held["distance"]
    assert [len(free[name]) for name in ("distance", "score", "utility")] == [5, 5, 5]
    assert free["peak"] == max(free["utility"]) and free["end"] == free["utility"][-1]
    assert 0 <= metrics["beta-0_win_rate"] <= 1 and metrics["beta-0_ppo_utility"] == free["ppo_utility"]
    seeds, betas = tables_of(folder)
    assert len(seeds[0].split("|")) == 3 + len(kl_coefficient.SEED_COLUMNS) and seeds[2].startswith("| 0 | ")
    assert [row.split(" | ")[0] for row in betas[2:]] == ["| 0", "| 1"]
    figure = (folder / "kl_coefficient.svg").read_text()
    assert "d(α − β log d), R²" in figure and "demonstrators" in figure
    check_claims(kl_coefficient, folder)


def test_ensemble(tmp_path):
    folder = tmp_path / "run"
    cfg = ensemble.Config(
        run_dir=str(folder), jobs=0, seeds=1, betas=(0.0,), combinations=("min",), members=2, sft=SFT,
        ppo=PPO, reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    )  # fmt: skip
    metrics = ensemble.main(cfg)
    cells = cells_of(folder)
    (least,) = cells.values()
    assert 0 <= least["disagreement"] <= 1 and least["spread"] > 0 and len(least["distance"]) == 5
    assert metrics["min-beta-0_ppo_utility"] == least["ppo_utility"]
    seeds, rows = tables_of(folder)
    assert seeds[2].startswith("| 0 | ") and " |  |" not in "".join(seeds + rows)
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| min"]
    assert "Truth, β = 0" in (folder / "ensemble.svg").read_text()
    check_claims(ensemble, folder)


def test_the_figure_fits_the_curve_that_it_draws():
    """Two seeds, each of Gao's form with numbers of its own: R² is of the mean curve, not the mean of theirs."""
    d, free = np.linspace(0.2, 4, 12), kl_coefficient.Variant(0.0)
    seeds = [0.5 + d * (1.0 - 0.5 * np.log(d)) + noise for noise in (0.3 * np.sin(9 * d), -0.3 * np.sin(9 * d))]
    values = {
        (seed, free): {
            "distance": d, "score": d, "utility": y, "sft_utility": 0.5, "demonstrators_utility": 0.9,
            **{column.name: 0.1 for column in kl_coefficient.SEED_COLUMNS[1:]},
        }
        for seed, y in enumerate(seeds)
    }  # fmt: skip
    for cell in values.values():
        cell |= {"sft_utility": 0.5, "demonstrators_utility": 0.9}
    _, truth = kl_coefficient.present(None, Cells((0, 1), (free,), values, {})).panels
    curve, fit, teachers = truth.lines
    np.testing.assert_allclose(curve.y, np.mean(seeds, axis=0))
    assert fit.label == "d(α − β log d), R² 1.00" and teachers.y.tolist() == [0.9, 0.9]
    np.testing.assert_allclose(fit.y, 0.5 + fit.x * (1.0 - 0.5 * np.log(fit.x)), rtol=1e-6)


def test_train_is_pure_and_vmaps_over_beta():
    task = simulated.World(0, sizes=SIZES._replace(demonstrations=4, compared=4))
    params = jax.jit(Transformer(task.base.config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    base = task.base._replace(params=params)
    rewards = from_language_model(params, jax.random.key(1), base.config)
    cfg = ppo.PPO(steps=2, responses=8, epochs=1, minibatches=1, learning_rate=0.01)
    train = kl_coefficient.make_train(
        cfg, base, task.prompts().train, model_reward(base.config, rewards, name="rm", weight=1.0), rewards,
        max_new_tokens=4,
    )  # fmt: skip
    betas = jnp.array([0.0, 5.0])

    def curves(beta):
        _, metrics, _, _ = train(jax.random.key(0), beta)
        return {name: metrics[name] for name in ("score", "kl_k1", "beta", "entropy")}

    together, alone = jax.jit(jax.vmap(curves))(betas), jax.jit(curves)
    each = [alone(beta) for beta in betas]
    for name in together:
        np.testing.assert_allclose(together[name], [some[name] for some in each], atol=1e-4)
    np.testing.assert_array_equal(each[1]["beta"], [5.0, 5.0])
    jax.tree.map(np.testing.assert_array_equal, each[0], alone(betas[0]))


def losses_config(**changes):
    flags = dict(losses=("dpo", "kto"), betas=(), learning_rates=(1e-3,), seeds=1, jobs=0, sft=SFT) | changes
    return preference_losses.Config(**flags)


def test_preference_losses(tmp_path):
    folder = tmp_path / "run"
    cfg = losses_config(run_dir=str(folder), preference=Preference(steps=2, batch_size=4, evaluations=2))
    preference_losses.main(cfg)
    cells = cells_of(folder)
    assert set(cells) == {"dpo-beta-0.1-learning_rate-0.001", "kto-beta-0.1-learning_rate-0.001"}
    (table,) = tables_of(folder)
    assert [row.split(" | ")[:3] for row in table[2:]] == [["| dpo", "0.1", "0.001"], ["| kto", "0.1", "0.001"]]
    assert len(table[0].split("|")) == 2 + 3 + len(preference_losses.COLUMNS) and " |  |" not in "".join(table)
    for name, cell in cells.items():
        loss = name.partition("-")[0]
        lines = (folder / "seed-0" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        logged = [row["utility"] for row in rows if row["stage"] == loss]
        assert len(logged) == 2 and cell["peak_utility"] == max(logged)
        # At the reference: log 2 of a pair, σ(0) of a single answer.
        np.testing.assert_allclose(rows[0]["loss"], {"dpo": np.log(2), "kto": 0.5}[loss], atol=1e-5)
    assert (folder / "preference_losses.svg").exists()
    check_claims(preference_losses, folder)


def test_losses_are_crossed_with_their_numbers():
    cfg = losses_config(losses=("dpo", "ipo"), betas=(0.2, 1.0), learning_rates=(1e-3, 1e-4))
    assert [tuple(variant) for variant in preference_losses.variants(cfg)[:3]] == [
        ("dpo", 0.2, 1e-3), ("dpo", 0.2, 1e-4), ("dpo", 1.0, 1e-3),
    ]  # fmt: skip
    every = losses_config(losses=("dpo", "ipo", "simpo", "orpo", "kto"))
    assert [variant.beta for variant in preference_losses.variants(every)] == [0.1, 0.03, 2.0, 3.0, 0.1]
    flags = preference_losses.flags_of(cfg, preference_losses.Variant("ipo", 0.2, 1e-4))
    assert type(flags).__name__ == "IPO" and (flags.beta, flags.learning_rate) == (0.2, 1e-4)
    with pytest.raises(UserError, match="beta is -1"):
        losses_config(betas=(-1.0,))
    with pytest.raises(UserError, match="give --learning-rates"):
        losses_config(preference=Preference(learning_rate=1.0))


def test_precision(tmp_path, monkeypatch):
    """All stages in mixed precision."""
    seen, train = [], ppo.train

    def watched(cfg, base, *args, **numbers):
        seen.append(base.config.precision)
        return train(cfg, base, *args, **numbers)

    monkeypatch.setattr(ppo, "train", watched)
    folder = tmp_path / "run"
    cfg = precision.Config(
        run_dir=str(folder), jobs=0, seeds=1, precisions=("mixed",), sft=SFT, comparisons_used=8,
        ppo=ppo.PPO(steps=1, responses=8, epochs=1, minibatches=1),
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=4),
    )  # fmt: skip
    precision.main(cfg)
    found = cells_of(folder)["mixed"]
    assert set(precision.NUMBERS) < set(found) and seen == [MIXED]
    rows = [json.loads(line) for line in (folder / "seed-0" / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "reward_model"][-1] == 2  # 8 prompts, 4 a step
    numbers, crossed = tables_of(folder)
    assert len(numbers) == 2 + len(precision.NUMBERS) and crossed[2].startswith("| mixed | mixed | ")


def test_precisions_are_compared_seed_by_seed(tmp_path, monkeypatch):
    used = []

    def train(cfg, task, run):
        used.append((cfg.seed, cfg.precision))
        run.log("sft", 1, {"val_loss": 0.0, "utility": 0.5})
        run.log("sft", 2, {"val_loss": 1.0 + cfg.seed + (cfg.precision == "mixed") / 8})

    monkeypatch.setattr(precision, "train", train)
    monkeypatch.setattr(precision, "sampled_in_each", lambda cfg, task, params: {})
    metrics = precision.main(precision.Config(run_dir=str(tmp_path / "run"), jobs=0, seeds=2, stages=("sft",)))
    assert used == [(0, "float32"), (0, "mixed"), (1, "float32"), (1, "mixed")]
    assert metrics["float32_SFT: validation loss"] == 1.5 and metrics["mixed_SFT: validation loss"] == 1.625
    ((_, _, *rows),) = tables_of(tmp_path / "run")
    assert rows[0] == "| SFT: validation loss | 1, 2 | 0.71 | 1.125, 2.125 | +0.12 ± 0 (0) |"
    with pytest.raises(UserError, match="give --precisions"):
        precision.main(precision.Config(precision="mixed"))


def test_weights_are_sampled_in_each_precision(monkeypatch):
    """They are given the types of that precision, and its arithmetic."""
    task, asked = simulated.World(0, sizes=SIZES), []
    params = {"weight": np.float32(1 + 2**-12)}

    def sampler(config, **numbers):
        def sample(params, prompts, number):
            asked.append((params["weight"].dtype, float(params["weight"]), config.precision.compute, len(prompts.row)))
            return prompts

        assert numbers["max_new_tokens"] == task.max_new_tokens
        return sample

    class Weight:
        def __init__(self, config):
            self.init = lambda key, tokens: {"params": {"weight": jnp.zeros((), config.precision.parameters)}}

    monkeypatch.setattr(precision, "make_sampler", sampler)
    monkeypatch.setattr(precision, "Transformer", Weight)
    monkeypatch.setattr(task, "judge", lambda prompts, answers: np.array([1.0, 3.0]))
    cfg = precision.Config(precisions=("float32", "mixed", "bfloat16"))
    found = precision.sampled_in_each(cfg, task, params)
    exact, rounded = 1 + 2**-12, 1.0
    assert asked == [
        (jnp.float32, exact, jnp.float32, 64), (jnp.float32, exact, jnp.bfloat16, 64),
        (jnp.bfloat16, rounded, jnp.bfloat16, 64),
    ]  # fmt: skip
    # 1 and 3: a mean of 2, and a standard error of √2/√2.
    assert found == {f"sampled_in_{name}": 2.0 for name in cfg.precisions} | {
        f"se_in_{name}": pytest.approx(1.0) for name in cfg.precisions
    }


def test_dapo_with_one_clip_is_dapo_but_for_its_upper_clip():
    flags, one_clip = (verifiable.METHODS[name][1]() for name in ("dapo", "dapo_one_clip"))
    assert (flags.clip_eps_high, one_clip.clip_eps_high) == (0.28, 0.2)
    assert one_clip == replace(flags, clip_eps_high=0.2)


def test_verifiable(tmp_path):
    folder = tmp_path / "run"
    cfg = verifiable.Config(
        run_dir=str(folder), jobs=0, seeds=1, algorithms=("dapo", "ppo"), steps=5, sft=SFT
    )  # fmt: skip
    metrics = verifiable.main(cfg)
    cells = cells_of(folder)
    assert cells.keys() == {"dapo", "ppo"}
    # All start at one policy, and each answer is right or not.
    assert len({cell["sft_utility"] for cell in cells.values()}) == 1
    for name, cell in cells.items():
        assert 0 <= cell["policy_score"] <= 1 and len(cell["right_curve"]) == len(cell["utility_curve"]) == 1
        assert metrics[f"{name}_policy_score"] == cell["policy_score"]
    assert cells["ppo"]["answers"] == 5 * 128 <= cells["dapo"]["answers"]
    (table,) = tables_of(folder)
    assert [row.split(" | ")[0] for row in table[2:]] == ["| dapo", "| ppo"]


def test_methods(tmp_path):
    folder = tmp_path / "run"
    cfg = methods.Config(
        run_dir=str(folder), jobs=0, seeds=1, methods=("sft", "best_of_16"), pool=32, pool_prompts=2, sft=SFT,
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    )  # fmt: skip
    metrics = methods.main(cfg)
    cells = cells_of(folder)
    assert cells.keys() == {"sft", "best_of_16"}
    pool = cells["best_of_16"]
    assert abs(cells["sft"]["kl"]) < 1e-6 and cells["sft"]["labels"] == 0 and pool["labels"] == 16 * 4 / 1000
    assert pool["best_kl"][0] == 0 and pool["best_score"] == sorted(pool["best_score"])
    assert len(pool["optimum_kl"]) == len(methods.BETAS)
    assert metrics["sft_policy_utility"] == cells["sft"]["policy_utility"]
    if Path("/proc/self/clear_refs").exists():
        assert 0 <= cells["sft"]["memory_gb"] < 1
    with pytest.raises(UserError, match="there is no method a2c"):
        methods.Config(methods=("a2c",))


def test_methods_in_rounds_share_the_prompts(tmp_path, monkeypatch):
    """They ask the loop for a third of them in each round, and count its labels, and PPO's own answers."""
    asked = []

    def rounds_of(flags, task, run, sampler, label, seed):
        asked.append(flags)
        for number in range(1, flags.rounds + 1):
            if flags.learner == "ppo":
                for step in (1, 2):
                    run.log(f"ppo-{number}", step, {"score": 0.0})
            folder = run.dir / f"round-{number}"
            folder.mkdir(exist_ok=True)
            rows = [json.dumps({"responses": ["a"] * count}) + "\n" for count in (8, 3)]
            (folder / "comparisons.jsonl").write_text("".join(rows))
            yield number, f"policy {number}", [], {}

    monkeypatch.setattr(iterate, "run_rounds", rounds_of)
    task = simulated.World(0)
    begun = methods.Begun(methods.AfterSFT(task, lambda *_: task.demonstrations(), task.base, None), {}, None, None)
    monkeypatch.setattr(iterate, "world_labels", lambda world, sampler: None)
    cfg = methods.Config(ppo=PPO)
    with Run(tmp_path, cfg, name="x") as run:
        for name, samples in (("iterated_dpo", 0.033), ("ppo_three_rounds", 0.033 + 3 * 2 * 8 / 1000)):
            policy = methods.METHODS[name](cfg, begun, 7, run)
            assert policy.params == "policy 3" and policy.labels == 0.033 and policy.samples == pytest.approx(samples)
    assert [flags.learner for flags in asked] == ["dpo", "ppo"]
    assert {(flags.seed, flags.labels, flags.answers, flags.ppo) for flags in asked} == {(7, 64 // 3, 8, PPO)}


def test_a_peak_is_that_of_what_came_after_it_began():
    held = memory.start_peak()
    if held is None:
        return  # this system does not tell
    array = np.ones(50_000_000, np.uint8)
    del array
    assert 45e6 < memory.peak_since(held) < 200e6
    assert memory.peak_since(memory.start_peak()) < 45e6


def test_constitution(tmp_path, monkeypatch):
    folder, flags_of = tmp_path / "run", constitution.flags_of
    short = {"sft": SFT, "dpo": dpo.DPO(steps=2, batch_size=8)}
    monkeypatch.setattr(constitution, "flags_of", lambda cfg, seed: replace(flags_of(cfg, seed), **short))
    cfg = constitution.Config(run_dir=str(folder), jobs=0, seeds=1, revisions=(1,), biases=(9.0,), labels=("hard",),
                              sft=SFT)  # fmt: skip
    metrics = constitution.main(cfg)
    cells = cells_of(folder)
    assert cells.keys() == {"revisions-dose-1", "bias-dose-9", "hard-dose-0"}
    assert cells["bias-dose-9"]["judge"] < 1 and "judge" not in cells["revisions-dose-1"]
    assert metrics["bias-dose-9_flattery"] == cells["bias-dose-9"]["flattery"] >= 0
    # The first revisions were learned, not the last ones.
    chains = [json.loads(line) for line in open(folder / "seed-0" / "shared" / "chains.jsonl")]
    learned = [json.loads(line) for line in open(folder / "seed-0" / "revisions-dose-1" / "revisions.jsonl")]
    first = [row["revisions"][0]["revision"] for row in chains if not row["unlearned"]]
    assert [row["completion"] for row in learned] == first
    check_claims(constitution, folder)


def test_rounds(tmp_path):
    folder = tmp_path / "run"
    cfg = rounds.Config(
        run_dir=str(folder), jobs=0, seeds=1, plans=("disagreement",), rounds=2, labels=16, sft=SFT, ppo=PPO,
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=4),
    )  # fmt: skip
    metrics = rounds.main(cfg)
    cells = cells_of(folder)
    assert cells.keys() == {"disagreement"}
    assert 8 < cells["disagreement"]["labels"] <= 16 and len(cells["disagreement"]["utility_curve"]) == 5
    assert metrics["disagreement_policy_utility"] == cells["disagreement"]["policy_utility"]
    assert len(list((folder / "seed-0" / "disagreement").glob("round-*/comparisons.jsonl"))) == 2
    check_claims(rounds, folder, utility_at_6=0.0)
    with pytest.raises(UserError, match="17 labels do not divide into 2 rounds"):
        rounds.Config(rounds=2, labels=17)


def test_imitation(tmp_path, monkeypatch):
    """Fewer demonstrations are the first rows of all; the prompt is learned where it is to be."""
    monkeypatch.setattr(imitation, "SIZES", SIZES)
    cfg = imitation.Config(run_dir=str(tmp_path / "run"), jobs=0, seeds=1, counts=(8, 128), sft=SFT)
    imitation.main(cfg)
    cells = cells_of(tmp_path / "run")
    assert set(cells) == {f"{who}-number-{n}-answer" for who in ("careless", "careful") for n in (8, 128)} | {
        "careless-number-128-all"
    }
    careless, careful = (cells[f"{who}-number-128-answer"] for who in ("careless", "careful"))
    assert careful["demonstrators_utility"] > careless["demonstrators_utility"]
    assert cells["careless-number-8-answer"]["epochs"] >= 8 * careless["epochs"]
    (table,) = tables_of(tmp_path / "run")
    assert len(table) == 2 + 5
    rows = simulated.World(0).demonstrations().train
    learned = imitation.with_prompts(rows)
    for row in range(3):
        for document in range(1, rows.segment_ids[row].max() + 1):
            inside = np.flatnonzero(rows.segment_ids[row] == document)
            assert learned.mask[row, inside[:-1]].all() and not learned.mask[row, inside[-1]]
            assert rows.mask[row, inside[:-1]].sum() < len(inside) - 1
    assert not learned.mask[rows.segment_ids == 0].any()
    check_claims(imitation, tmp_path / "run")


def test_reward_data(tmp_path):
    cfg = reward_data.Config(
        run_dir=str(tmp_path / "run"), jobs=0, seeds=1, sizes=("2x8", "4x16"), near=("2x8",), n=8, prompts=32,
        sft=SFT,
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    )  # fmt: skip
    reward_data.main(cfg)
    few, many, near = (cells_of(tmp_path / "run")[name] for name in ("2x8-first", "4x16-first", "2x8-nearest"))
    assert near["labels"] == few["labels"] and near["gold"][0] == few["gold"][0]
    assert (few["labels"], many["labels"]) == (16, 64) and few["ceiling"] == many["ceiling"]
    # The first of each pool is the same policy's answer; the best of more never has a lower proxy.
    assert few["gold"][0] == many["gold"][0] and few["distance"] == many["distance"]
    assert all(np.diff(cell["proxy"]).min() >= 0 and len(cell["gold"]) == 4 for cell in (few, many))
    check_claims(reward_data, tmp_path / "run")


def test_tails(tmp_path):
    cfg = tails.Config(
        run_dir=str(tmp_path / "run"), jobs=0, seeds=1, errors=("normal", "t1"), n=64, prompts=32, sft=SFT
    )  # fmt: skip
    tails.main(cfg)
    light, heavy = (cells_of(tmp_path / "run")[error] for error in ("normal", "t1"))
    assert light["start"] == heavy["start"] and heavy["proxy_3"] > 2 * light["proxy_3"]
    assert all(np.diff([cell[f"proxy_{nats:g}"] for nats in tails.BUDGETS]).min() > 0 for cell in (light, heavy))
    scores = np.random.default_rng(0).normal(size=(16, 256))
    for nats in (0.3, 2.0):
        assert tails.optimum(scores, tails.beta_for(scores, nats)).kl == pytest.approx(nats, abs=1e-6)

    check_claims(tails, tmp_path / "run")


def test_ppo_details(tmp_path):
    """Each variant differs from the default in its flag alone; RLOO has as many answers."""
    cfg = ppo_details.Config(
        run_dir=str(tmp_path / "run"), jobs=0, seeds=1, parts=("default", "critic_from_the_policy", "rloo"), sft=SFT,
        ppo=PPO, reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8),
    )  # fmt: skip
    ppo_details.main(cfg)
    cells = cells_of(tmp_path / "run")
    assert len({cell["sft_utility"] for cell in cells.values()}) == 1
    assert all(len(cell["curve"]) == PPO.steps for cell in cells.values())
    assert cells["default"]["explained_first"] != cells["critic_from_the_policy"]["explained_first"]
    assert cells["rloo"]["explained_first"] is None
    flags = {name: replace(PPO, **changes) for name, changes in ppo_details.CHANGES.items()}
    changed = {name: [x for x in vars(PPO) if getattr(some, x) != getattr(PPO, x)] for name, some in flags.items()}
    assert changed == {name: list(changes) for name, changes in ppo_details.CHANGES.items()} | {"one_epoch": []}
    check_claims(ppo_details, tmp_path / "run")
