"""The flags of optimiser, precision and accumulation reach every stage; what cannot be is one clear line."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo, reward_model, setting, sft, training
from experiments.ablations import precision
from experiments.training import SkippedSteps, make_optimizer
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.models import BFLOAT16, MIXED
from rlhf_jax.optimizers import adafactor, adamw, muon
from rlhf_jax.sampling import generate
from rlhf_jax.train import make_train_step

SIZES = dict(
    DEMONSTRATIONS=128, COMPARED=16, RANKED=4, HELDOUT_PAIRS=16, PROMPTS=64, HELDOUT=16, VALIDATION=64, LAYERS=1
)  # fmt: skip


@pytest.fixture
def small_world(monkeypatch):
    for name, size in SIZES.items():
        monkeypatch.setattr(setting, name, size)


RATES = {
    "cosine": [0.0, 0.05, 0.1, 0.1 * (1 + np.cos(np.pi / 6)) / 2, 0.075],
    "linear": [0.0, 0.05, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6],
    "constant": [0.0, 0.05, 0.1, 0.1, 0.1],
}
"""A learning rate of 0.1 over 8 steps, of which a quarter warm up: at each of the first five."""


@pytest.mark.parametrize("schedule", RATES)
def test_the_optimiser_does_as_it_was_told(schedule):
    """AdamW's step on gradients that do not change is the learning rate; weights decay by that times their own part.

    The gradients grow, and are shortened to the same one: 1 in each of four numbers, a norm of 2.
    """
    told = dict(learning_rate=0.1, schedule=schedule, warmup=0.25, weight_decay=0.5, max_grad_norm=2.0)
    optimizer = make_optimizer(training.Training(**told), 8)
    params = {"kernel": jnp.full((1, 2), 3.0), "bias": jnp.full(2, 3.0)}
    state = optimizer.init(params)
    for step, rate in enumerate(RATES[schedule]):
        grads = jax.tree.map(lambda x, size=10.0**step: jnp.full_like(x, size), params)
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["bias"], [-rate] * 2, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(updates["kernel"], [[-rate * (1 + 0.5 * 3)] * 2], rtol=1e-5, atol=1e-8)


def test_the_optimiser_is_the_one_asked_for():
    params = {"kernel": jnp.asarray([[3.0, 1.0], [2.0, -4.0]])}
    first, second = ({"kernel": jnp.asarray(g)} for g in ([[1.0, 2.0], [-3.0, 0.5]], [[0.1, -2.0], [-1.0, 0.1]]))

    def update(optimizer):
        """The second one: the first of AdamW and of Adafactor are the same."""
        _, state = optimizer.update(first, optimizer.init(params), params)
        return optimizer.update(second, state, params)[0]["kernel"]

    steps = {}
    for name, function in [("adamw", adamw), ("adafactor", adafactor), ("muon", muon)]:
        told = training.Training(optimizer=name, learning_rate=0.1, schedule="constant", warmup=0.0)
        steps[name] = update(make_optimizer(told, 4))
        expected = update(function(0.1, weight_decay=0.1, max_grad_norm=1.0))
        np.testing.assert_allclose(steps[name], expected, rtol=1e-5)
    assert np.abs(steps["muon"] - steps["adamw"]).max() > 1e-3
    assert np.abs(steps["adafactor"] - steps["adamw"]).max() > 1e-3


def test_every_stage_takes_them(small_world, monkeypatch, tmp_path):
    """PPO after SFT and reward model, each with another optimiser, in mixed precision and in two parts a batch."""
    batches, optimizers = {}, []

    def optimizer_of(cfg, steps):
        optimizers.append((cfg.optimizer, cfg.schedule, steps))
        return make_optimizer(cfg, steps)

    def watched(loss_fn, *, counts=None):
        step = make_train_step(loss_fn, counts=counts)

        def train_step(state, batch, *fixed):
            batches[len(batches)] = jax.tree.leaves(batch)[0].shape[0], counts is not None
            return step(state, batch, *fixed)

        return train_step

    for stage in (sft, reward_model, ppo):
        monkeypatch.setattr(stage, "make_train_step", watched)
        monkeypatch.setattr(stage, "make_optimizer", optimizer_of)
    shared = dict(accumulate=2, max_grad_norm=0.5)
    cfg = ppo.Config(
        run_dir=str(tmp_path / "run"), precision="mixed", steps=2, responses=8, minibatches=2, optimizer="adafactor",
        schedule="linear", warmup=0.1, ptx_coef=0.1, **shared,
        sft=sft.SFT(steps=4, batch_size=8, optimizer="muon", **shared),
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8, schedule="constant", **shared),
    )  # fmt: skip
    sampled_in = set()

    def sampled(model, *args, **options):
        sampled_in.add(model.config.precision)
        return generate(model, *args, **options)

    monkeypatch.setattr(ppo, "generate", sampled)
    metrics = ppo.main(cfg)
    assert all(np.isfinite(value) for value in metrics.values())
    assert set(batches.values()) == {(2, True)}
    assert sampled_in == {MIXED}
    # Each with the number of its steps: two iterations of two epochs of two minibatches.
    assert optimizers == [("muon", "cosine", 4), ("adamw", "constant", 2), ("adafactor", "linear", 2 * 2 * 2)]
    with open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8") as file:
        iterations = [row for line in file if (row := json.loads(line))["stage"] == "ppo"]
    np.testing.assert_allclose(iterations[0]["kl_k1"], 0.0, atol=1e-5)


def test_steps_are_skipped_in_a_row_or_not(tmp_path):
    watched = []
    with (
        Run(tmp_path / "run", sft.SFT()) as run,
        pytest.raises(UserError, match="3 steps in a row, the last of them 7"),
    ):
        skipped = SkippedSteps(sft.SFT(max_skipped=3), run, "sft")
        for step, one in enumerate([0, 1, 1, 0, 1, 1, 1, 0, 0], 1):
            skipped.watch(step, np.int32(one), {"rows": np.full(2, step)})
            watched.append(step)
    assert watched[-1] == 7  # one step later, when it is known without waiting
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "skipped-sft-7.npz")["rows"], [7, 7])
    with Run(tmp_path / "any", sft.SFT()) as run:
        skipped = SkippedSteps(sft.SFT(max_skipped=0), run, "sft")
        for step in range(50):
            skipped.watch(step, np.int32(1), {})


def test_data_go_on_in_as_many_shares_only(monkeypatch):
    """Another mesh may change the shares with the same processes: each would go on at another's place."""

    class Batches:
        def get_state(self):
            return {"next": 7}

        def set_state(self, state):
            self.state = state

    def on(number, count, *heard):
        monkeypatch.setattr(training, "host_share", lambda: (number, count))
        monkeypatch.setattr(training, "gather", lambda value: list(heard) or [value])

    on(0, 1)
    assert training.data_state(Batches()) == {"next": 7}
    on(0, 1, [0, {"next": 3}], [0, {"next": 3}])  # two processes that read the same
    alike = training.data_state(Batches())
    assert alike == {"next": 3}
    on(1, 2, [1, {"next": 5}], [0, {"next": 4}])
    shares = training.data_state(Batches())
    batches = Batches()
    training.set_data_state(batches, shares)
    assert batches.state == {"next": 5}
    with pytest.raises(UserError, match=r"in 1 shares, .* it would be 2"):
        training.set_data_state(batches, alike)
    on(0, 1)
    with pytest.raises(UserError, match=r"in 2 shares, .* it would be 1"):
        training.set_data_state(batches, shares)
    training.set_data_state(batches, alike)
    assert batches.state == {"next": 3}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sft.SFT(batch_size=16, accumulate=3), "16 rows a step do not divide into 3 microbatches"),
        (lambda: reward_model.RewardModel(prompts_per_step=4, accumulate=8), "4 prompts a step do not divide into 8"),
        (lambda: ppo.PPO(responses=8, minibatches=4, accumulate=4), "2 responses a step do not divide into 4"),
        (lambda: sft.SFT(accumulate=0), "accumulate is 0; it must be at least 1"),
        (lambda: sft.SFT(max_grad_norm=-1.0), "max-grad-norm is -1.0"),
        (lambda: sft.SFT(warmup=1.5), "warmup is 1.5, and a share of all steps is at most 1"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_ablation_compares_runs_of_the_same_seed(small_world, monkeypatch, tmp_path):
    used = []

    def train(cfg, source, run):
        used.append((source.seed, source.precision))
        run.log("sft", 1, {"val_loss": 1.0 + source.seed + (source.precision == "mixed") / 8, "utility": 0.5})

    monkeypatch.setattr(precision, "train", train)
    monkeypatch.setattr(precision, "crossed", lambda cfg, run_dir: "as sampled")
    cfg = precision.Config(run_dir=str(tmp_path / "run"), seeds=2, stages=("sft",))
    metrics = precision.main(cfg)
    assert used == [(0, "float32"), (1, "float32"), (0, "mixed"), (1, "mixed")]
    assert metrics["float32: SFT: validation loss"] == 1.5 and metrics["mixed: SFT: validation loss"] == 1.625
    table = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert "| SFT: validation loss | 1, 2 | 0.71 | 1.125, 2.125 | +0.12 ± 0 |" in table and table.endswith(
        "as sampled"
    )


def test_the_ablation_samples_each_sft_in_each_precision(small_world, monkeypatch, tmp_path):
    """The two have weights of different types, so that neither is read as the other."""
    cfg = precision.Config(
        precisions=("float32", "bfloat16"),
        seeds=2,
        stages=("sft",),
        sft=sft.SFT(steps=1, batch_size=4),
        run_dir=str(tmp_path),
    )
    asked = []

    def make_sampler(setting, params, seed):
        asked.append((seed, setting.model.precision == BFLOAT16, np.asarray(params["embedding"])[5, 5].item()))
        return lambda prompts, number: prompts

    expected = []
    for trained in cfg.precisions:
        for seed in range(2):
            source = replace(cfg, seed=seed, precision=trained)
            with Run(tmp_path / f"{trained}-{seed}", source) as run:
                params = sft.train(cfg.sft, setting.load_setting(source), run, seed)[-1]
            expected.append((seed, trained == "bfloat16", np.asarray(params["embedding"])[5, 5].item()))
    monkeypatch.setattr(sft, "make_sampler", make_sampler)
    judged = iter(np.arange(8.0))
    load = precision.load_setting
    monkeypatch.setattr(
        precision, "load_setting", lambda source: load(source)._replace(judge=lambda *_: np.full(4, next(judged)))
    )
    table = precision.crossed(cfg, tmp_path)
    # For each seed: trained in float32 and sampled in both, then trained in bfloat16.
    assert [seed for seed, _, _ in asked] == [0] * 4 + [1] * 4
    assert [sampled for _, sampled, _ in asked] == [False, True, False, True] * 2
    params = {(seed, half): one for seed, half, one in expected}
    trained = [params[seed, half] for seed in (0, 1) for half in (False, False, True, True)]
    np.testing.assert_allclose([one for _, _, one in asked], trained, rtol=2**-8)
    assert table.splitlines()[2:] == [
        "| float32 | float32 | 0, 4 | 0 |", "| float32 | bfloat16 | 1, 5 | 0 |",
        "| bfloat16 | float32 | 2, 6 | 0 |", "| bfloat16 | bfloat16 | 3, 7 | 0 |",
    ]  # fmt: skip
