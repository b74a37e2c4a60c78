"""The loop around a stage's steps; the optimiser's flags reach every stage; numbers that cannot be are one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from experiments import pipeline, ppo, reward_model, sft
from experiments.training import Training
from rlhf_jax import checkpoint
from rlhf_jax import loop as loop_module
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.loop import Loop
from rlhf_jax.models import MIXED
from rlhf_jax.optimizers import adafactor, adamw, muon
from rlhf_jax.sampling import generate
from rlhf_jax.tasks import simulated
from rlhf_jax.train import make_train_step

RATES = {
    "cosine": [0.05, 0.1, 0.1, 0.1 * (1 + np.cos(np.pi / 6)) / 2, 0.075],
    "linear": [0.05, 0.1, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6],
    "constant": [0.05, 0.1, 0.1, 0.1, 0.1],
}
"""A learning rate of 0.1 over 8 steps, of which a quarter warm up: at each of the first five."""


@pytest.mark.parametrize("schedule", RATES)
def test_the_optimiser_does_as_it_was_told(schedule):
    """AdamW's step on gradients that do not change is the learning rate; weights decay by that times their own part.

    The gradients grow, and are shortened to the same one: 1 in each of four numbers, a norm of 2.
    """
    told = dict(learning_rate=0.1, schedule=schedule, warmup=0.25, weight_decay=0.5, max_grad_norm=2.0)
    optimizer = Training(**told).make_optimizer(8)
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
        told = Training(optimizer=name, learning_rate=0.1, schedule="constant", warmup=0.0)
        steps[name] = update(told.make_optimizer(4))
        expected = update(function(0.1, weight_decay=0.1, max_grad_norm=1.0))
        np.testing.assert_allclose(steps[name], expected, rtol=1e-5)
    assert np.abs(steps["muon"] - steps["adamw"]).max() > 1e-3
    assert np.abs(steps["adafactor"] - steps["adamw"]).max() > 1e-3


def test_every_stage_takes_them(undrawn, monkeypatch, tmp_path):
    """The pipeline's stages, each with another optimiser, in mixed precision and in two parts a batch."""
    small = simulated.Sizes(
        demonstrations=128, validation=64, compared=16, ranked=4, heldout_pairs=32, prompts=64, heldout=64, layers=1
    )
    monkeypatch.setattr(simulated, "SIZES", small)
    batches, optimizers = {}, []
    make_optimizer = Training.make_optimizer

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
    monkeypatch.setattr(Training, "make_optimizer", optimizer_of)
    shared = dict(accumulate=2, max_grad_norm=0.5)
    cfg = pipeline.Config(
        run_dir=str(tmp_path / "run"), precision="mixed",
        sft=sft.SFT(steps=4, batch_size=8, optimizer="muon", **shared),
        reward_model=reward_model.RewardModel(epochs=1, prompts_per_step=8, schedule="constant", **shared),
        ppo=ppo.PPO(
            steps=2, responses=8, minibatches=2, optimizer="adafactor", schedule="linear", warmup=0.1, ptx_coef=0.1,
            **shared,
        ),
    )  # fmt: skip
    sampled_in = set()

    def sampled(model, *args, **options):
        sampled_in.add(model.config.precision)
        return generate(model, *args, **options)

    monkeypatch.setattr(ppo, "generate", sampled)
    for name in ("compare_policies", "export"):  # test_pipeline.py has them
        monkeypatch.setattr(pipeline, name, lambda *args: {})
    metrics = pipeline.main(cfg)
    assert all(np.isfinite(value) for value in metrics.values())
    assert set(batches.values()) == {(2, True)}
    assert sampled_in == {MIXED}
    # Each with the number of its steps: two iterations of two epochs of two minibatches.
    assert optimizers == [("muon", "cosine", 4), ("adamw", "constant", 2), ("adafactor", "linear", 2 * 2 * 2)]
    with open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8") as file:
        iterations = [row for line in file if (row := json.loads(line))["stage"] == "ppo"]
    np.testing.assert_allclose(iterations[0]["kl_k1"], 0.0, atol=1e-5)
    # One update of warm-up, which has the whole rate, then a line down to zero over 8 updates.
    assert iterations[0]["learning_rate"] == pytest.approx(5e-4) and 0 < iterations[1]["learning_rate"] < 5e-4


def loop_of(run, *, max_skipped):
    return Loop(run, "sft", steps=50, save_every=0, keep=1, max_skipped=max_skipped, show=())


def test_steps_are_skipped_in_a_row_or_not(tmp_path):
    watched = []
    with (
        Run(tmp_path / "run", sft.SFT(), name="sft") as run,
        pytest.raises(UserError, match=r"3 steps in a row\. The last one is step 7"),
    ):
        loop = loop_of(run, max_skipped=3)
        for step, one in enumerate([0, 1, 1, 0, 1, 1, 1, 0, 0]):
            loop.watch_skipped(step, np.int32(one), {"rows": np.full(2, step + 1)})
            watched.append(step + 1)
    assert watched[-1] == 7  # one step later, when it is known without waiting
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "skipped-sft-7.npz")["rows"], [7, 7])
    with Run(tmp_path / "any", sft.SFT(), name="sft") as run:
        loop = loop_of(run, max_skipped=0)
        for step in range(50):
            loop.watch_skipped(step, np.int32(1), {})


def state_of(step):
    return TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(1.0)).replace(step=step)


def test_it_logs_and_saves_when_that_is_due_and_goes_on_from_there(tmp_path):
    """Every second step is logged and every third saved; the evaluated one is both."""
    kept = {}
    for resume in (False, True):
        with Run(tmp_path / "run", sft.SFT(), name="sft", resume=resume) as run:
            loop = Loop(
                run, "sft", steps=7, save_every=3, keep=9, max_skipped=0, show=("loss",), log_every=2,
                learning_rate=lambda step: 0.5 * step,
            )  # fmt: skip
            loop.restore(state_of(0))
            assert loop.first == (4 if resume else 0)
            assert loop.data_state() == ({"at": 4} if resume else None)
            for step in loop:
                last = loop.is_last(step)
                loop.end_step(
                    step, state_of(step), {"loss": step}, evaluated=step == 3 or last, data_state={"at": step + 1}
                )
                if not resume and step == 4:
                    break
        rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
        kept[resume] = [(row["step"], row["learning_rate"], row["skipped"]) for row in rows]
    # TrainState.step counts what was not skipped: here one behind.
    assert kept[False] == [(1, 0.0, 1), (3, 1.0, 1), (4, 1.5, 1), (5, 2.0, 1)]
    assert kept[True] == [*kept[False][:3], (5, 2.0, 1), (7, 3.0, 1)]
    assert [one.step for one in checkpoint.checkpoints(tmp_path / "run")] == [3, 4, 6, 7]
    assert loop.last_metrics() == {"loss": 6.0, "learning_rate": 3.0, "skipped": 1.0}


def test_data_go_on_in_as_many_shares_only(monkeypatch):
    """Another mesh may change the shares with the same processes: each would go on at another's place."""

    class Batches:
        def get_state(self):
            return {"next": 7}

        def set_state(self, state):
            self.state = state

    def on(number, count, *heard):
        monkeypatch.setattr(loop_module, "host_share", lambda: (number, count))
        monkeypatch.setattr(loop_module, "gather", lambda value: list(heard) or [value])

    on(0, 1)
    assert loop_module.gather_data_state(Batches()) == {"next": 7}
    on(0, 1, [0, {"next": 3}], [0, {"next": 3}])  # two processes that read the same
    alike = loop_module.gather_data_state(Batches())
    assert alike == {"next": 3}
    on(1, 2, [1, {"next": 5}], [0, {"next": 4}])
    shares = loop_module.gather_data_state(Batches())
    batches = Batches()
    loop_module.set_data_state(batches, shares)
    assert batches.state == {"next": 5}
    with pytest.raises(UserError, match=r"in 1 shares; .* read them in 2"):
        loop_module.set_data_state(batches, alike)
    on(0, 1)
    with pytest.raises(UserError, match=r"in 2 shares; .* read them in 1"):
        loop_module.set_data_state(batches, shares)
    loop_module.set_data_state(batches, alike)
    assert batches.state == {"next": 3}

    class Other(Batches):
        def set_state(self, state):
            self.state = state["parent"]

    with pytest.raises(UserError, match="position in the data is none in these data"):
        loop_module.set_data_state(Other(), alike)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: sft.SFT(batch_size=16, accumulate=3), "16 rows a step do not divide into 3 microbatches"),
        (lambda: reward_model.RewardModel(prompts_per_step=4, accumulate=8), "4 prompts a step do not divide into 8"),
        (lambda: ppo.PPO(responses=8, minibatches=4, accumulate=4), "2 responses a step do not divide into 4"),
        (lambda: sft.SFT(accumulate=0), "accumulate is 0; it must be at least 1"),
        (lambda: sft.SFT(max_grad_norm=-1.0), "max-grad-norm is -1.0"),
        (lambda: sft.SFT(max_grad_norm=0.0), "max-grad-norm is 0.0; it must be more than 0"),
        (lambda: sft.SFT(warmup=1.5), "warmup is 1.5, and a share of all steps is at most 1"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(UserError, match=message):
        make()
