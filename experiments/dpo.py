"""Direct preference optimisation: a policy from comparisons without a reward model, and four of its kin.

`--loss dpo` is Rafailov et al. 2023, eq. 7 (https://arxiv.org/abs/2305.18290); ipo, simpo, orpo and kto are as
`rlhf_jax.losses` cites them. Every one starts from the SFT weights, which are also the reference; the reference's
log-probabilities are computed once, before training. ORPO, which its authors run instead of SFT, runs after it here.
KTO draws single answers, and estimates the KL of a batch by its responses set after other prompts. Which prompt that
is, is drawn once, so that the reference is asked once for these, too; Ethayarajh et al. 2024 (§4) shift each batch.
    python experiments/dpo.py
    python experiments/dpo.py --loss kto --model FOLDER --demonstrations FILE --comparisons FILE --unpaired FILE
It runs SFT first. In the controlled world true utility rises from 0.8 to 2.0 (experiments/results/dpo.md), and log π
of chosen answers falls with that of rejected ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import pipeline, sft
from experiments.adapters import split
from experiments.pairs import Answer, Batch, Examples, Pairs, lay_out, mismatch, paired, singly, width
from experiments.reward_model import agreement, in_batches
from experiments.setting import Comparisons, Setting, Source, announce, load_setting
from experiments.sft import SFT
from experiments.text import read_unpaired
from experiments.training import SkippedSteps, Training, check_parts, counts_of, in_place, make_optimizer, save_due
from rlhf_jax.batches import PackedRankings, Rankings, Tokens
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.preferences import packed_logprobs, stack_packed
from rlhf_jax.data.tokens import join
from rlhf_jax.diagnostics import distinct_n, duplicate_share
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_jax.masking import masked_mean
from rlhf_jax.models import ModelConfig, Transformer, with_lora
from rlhf_jax.report import write_report
from rlhf_jax.scoring import answer_logprobs, response_logprobs
from rlhf_jax.sharding import shard_params
from rlhf_jax.train import make_state, make_train_step
from rlhf_jax.types import Metrics, Params

BETAS = {"dpo": 0.1, "ipo": 0.03, "simpo": 2.0, "orpo": 3.0, "kto": 0.1}
"""The β of each loss unless it is told another: of those tried in the controlled world (results/dpo.md)."""
OWN = {"label_smoothing": "dpo", "gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
"""Whose flags these are."""


@dataclass(frozen=True)
class DPO(Training):
    """What preference optimisation can be told."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    steps: int = 200
    batch_size: int = 64
    """Pairs a step; KTO: twice as many single answers."""
    pairs: Pairs = "best_worst"
    """Of a prompt's ranked answers the best and the worst, or all that differ in rank."""
    learning_rate: float = 5e-4
    """The highest one."""
    weight_decay: float = 0.0
    """Of matrices, times the learning rate; norms and biases do not decay."""
    beta: float | None = None
    """β; IPO calls it τ, ORPO λ. By default DPO and KTO 0.1, IPO 0.03, SimPO 2, ORPO 3."""
    label_smoothing: float = 0.0
    """DPO: the chance that a label is wrong (conservative DPO)."""
    gamma: float = 1.0
    """SimPO: the margin between chosen and rejected."""
    desirable_weight: float = 1.0
    """KTO: λ_D, the weight of good answers."""
    undesirable_weight: float = 1.0
    """KTO: λ_U, the weight of bad ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steps=1, batch_size=1, label_smoothing=0, gamma=0, desirable_weight=0, undesirable_weight=0)
        if not self.beta_used > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        if self.label_smoothing >= 0.5:
            raise UserError(f"label-smoothing is {self.label_smoothing}; it must be below 0.5")
        for flag in fields(self):
            if OWN.get(flag.name, self.loss) != self.loss and getattr(self, flag.name) != flag.default:
                raise UserError(f"{flag.name.replace('_', '-')} is a number of --loss {OWN[flag.name]}")
        if self.loss == "kto" and self.accumulate > 1:
            raise UserError("KTO's KL estimate needs its whole batch at once: accumulate must be 1")
        check_parts(self, self.batch_size, "pairs")

    @property
    def beta_used(self) -> float:
        """β as told, or the loss's own."""
        return BETAS[self.loss] if self.beta is None else self.beta


@dataclass(frozen=True)
class Config(DPO, Source):
    """DPO, IPO, SimPO, ORPO or KTO; runs SFT first."""

    unpaired: str | tuple[str, ...] | None = None
    """KTO: answers found good or not (prompt, completion, label) to train on instead of the comparisons."""
    unpaired_columns: tuple[str, ...] = ()
    """What its columns are called, OURS=THEIRS."""
    sft: SFT = field(default_factory=SFT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unpaired and not (self.loss == "kto" and self.model):
            raise UserError("unpaired answers need --loss kto and real text (--model and the files)")


Loss = tuple[Array, Metrics]
Scorer = Callable[[Tokens], np.ndarray]
"""A number for each row."""


def dpo(cfg: DPO, logprobs: Array, batch: Batch, _: Array | None) -> Loss:
    """Log-odds of chosen against rejected, beside the reference's."""
    return dpo_loss(
        *jnp.split(logprobs, 2), *jnp.split(batch.ref_logprobs, 2),
        beta=cfg.beta_used, label_smoothing=cfg.label_smoothing,
    )  # fmt: skip


def ipo(cfg: DPO, logprobs: Array, batch: Batch, _: Array | None) -> Loss:
    """The same difference drawn to 1/2β."""
    return ipo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.ref_logprobs, 2), beta=cfg.beta_used)


def simpo(cfg: DPO, logprobs: Array, batch: Batch, _: Array | None) -> Loss:
    """Log-probabilities a token, no reference."""
    return simpo_loss(
        *jnp.split(logprobs, 2), *jnp.split(batch.lengths, 2), beta=cfg.beta_used, gamma=cfg.gamma
    )  # fmt: skip


def orpo(cfg: DPO, logprobs: Array, batch: Batch, _: Array | None) -> Loss:
    """The chosen answer's SFT loss and the log-odds ratio, no reference."""
    return orpo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.lengths, 2), beta=cfg.beta_used)


def kto(cfg: DPO, logprobs: Array, batch: Batch, kl: Array | None) -> Loss:
    """Single answers, each against the KL estimate."""
    assert kl is not None
    return kto_loss(
        logprobs, batch.ref_logprobs, batch.good, kl,
        beta=cfg.beta_used, desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight,
    )  # fmt: skip


LOSSES: dict[str, Callable[[DPO, Array, Batch, Array | None], Loss]] = {
    "dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo, "kto": kto,
}  # fmt: skip


def implicit_rewards(cfg: DPO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """What the policy says of answers: β log π/π_ref (Rafailov et al. 2023, eq. 5); SimPO and ORPO β log π a token."""
    if cfg.loss in ("simpo", "orpo"):
        return cfg.beta_used * logprobs / np.maximum(lengths, 1)
    return cfg.beta_used * (logprobs - ref_logprobs)


def batch_logprobs(model: Transformer, params: Params, answers: Tokens | PackedRankings) -> Array:
    """log π(y|x) of each answer of a batch, packed or not."""
    if isinstance(answers, PackedRankings):
        return packed_logprobs(response_logprobs(model, params, answers.tokens), answers)[:, 0]
    return answer_logprobs(model, params, answers)


def objective(cfg: DPO, model: Transformer, params: Params, batch: Batch) -> Loss:
    """The loss that the flag names, with how far chosen and rejected answers have moved from the reference."""
    logprobs = batch_logprobs(model, params, batch.answers)
    kl = None
    if batch.mismatched is not None:
        others = batch_logprobs(model, jax.lax.stop_gradient(params), batch.mismatched)
        kl = jnp.mean(others - batch.ref_mismatched)
    loss, metrics = LOSSES[cfg.loss](cfg, logprobs, batch, kl)
    moved = logprobs - batch.ref_logprobs
    return loss, metrics | {
        "chosen_change": masked_mean(moved, batch.good),
        "rejected_change": masked_mean(moved, ~batch.good),
    }


def make_step(cfg: DPO, config: ModelConfig):
    """train_step(state, batch, frozen) -> (state, metrics)."""
    model = Transformer(config)
    return make_train_step(
        lambda own, batch, frozen: objective(cfg, model, with_lora(frozen, own), batch),
        counts=counts_of(cfg, lambda batch: {"loss": batch.good.sum()}),
    )


def make_batches(
    cfg: DPO, setting: Setting, examples: Examples, ref_score: Scorer, *, packed: bool, seed: int
) -> Callable[[int], Batch]:
    """batch(step), in an order of its own each epoch. The reference is asked here, once for every answer."""
    longest = setting.model.max_length

    def prepare(answers: list[Answer]) -> tuple[int, np.ndarray]:
        length = width(answers, longest)
        return length, ref_score(lay_out(answers, length=length, pad_id=setting.pad_id, packed=False))

    answers, (count, each) = examples.answers, examples.groups.shape
    length, ref_logprobs = prepare(answers)
    lengths = np.array([len(response) for _, response in answers])
    if cfg.loss == "kto":
        others = mismatch(answers, longest=length, seed=seed)
        other_length, ref_others = prepare(others)
    groups_a_step = min(count, 2 * cfg.batch_size // each)
    check_parts(cfg, groups_a_step, "pairs")
    steps_an_epoch = count // groups_a_step
    lay = partial(lay_out, pad_id=setting.pad_id, packed=packed)

    def lay_groups(drawn: np.ndarray) -> Batch:
        rows, good = (numbers[drawn].T.reshape(-1) for numbers in (examples.groups, examples.good))
        some = lay([answers[row] for row in rows], length=length)
        if cfg.loss != "kto":
            return Batch(some, good, lengths[rows], ref_logprobs[rows])
        mismatched = lay([others[row] for row in rows], length=other_length)
        return Batch(some, good, lengths[rows], ref_logprobs[rows], mismatched, ref_others[rows])

    def batch(step: int) -> Batch:
        epoch, at = divmod(step, steps_an_epoch)
        order = np.random.default_rng([seed, 4, epoch]).permutation(count)
        drawn = order[at * groups_a_step : (at + 1) * groups_a_step]
        parts = [lay_groups(part) for part in np.split(drawn, cfg.accumulate)]
        return in_place(cfg, stack(parts) if cfg.accumulate > 1 else parts[0])

    return batch


def stack(parts: list[Batch]) -> Batch:
    """Microbatches along a new first axis."""

    def together(some: list[Any]) -> Any:
        return jax.tree.map(lambda *arrays: np.stack(arrays), *some)

    answers = [part.answers for part in parts]
    stacked = stack_packed(answers) if isinstance(answers[0], PackedRankings) else together(answers)
    return together([part._replace(answers=None) for part in parts])._replace(answers=stacked)


def make_measure(
    cfg: DPO, setting: Setting, score: Callable[[Params, Tokens], np.ndarray], reference: Params, heldout: Rankings,
    seed: int,
) -> Callable[[Params, int], dict[str, Any]]:  # fmt: skip
    """measure(params, number): the implicit reward on held-out comparisons, and samples for held-out prompts."""
    ref_logprobs = score(reference, heldout.responses)
    lengths = np.asarray(heldout.responses.mask).sum(axis=1)
    rows = np.arange(len(heldout.ranks))
    best, worst = heldout.ranks.argmin(axis=1), heldout.ranks.argmax(axis=1)

    def measure(params: Params, number: int) -> dict[str, Any]:
        logprobs = score(params, heldout.responses)
        metrics = agreement(implicit_rewards(cfg, logprobs, ref_logprobs, lengths), heldout)
        moved = (logprobs - ref_logprobs).reshape(heldout.ranks.shape)
        metrics["val_chosen_change"] = moved[rows, best].mean()
        metrics["val_rejected_change"] = moved[rows, worst].mean()

        completions = sft.make_sampler(setting, params, seed)(setting.heldout, number)
        tokens = join(setting.heldout, completions, pad_id=setting.pad_id)
        ids = [some[real].tolist() for some, real in zip(completions.tokens, completions.mask, strict=True)]
        metrics |= {
            "kl_k1": (score(params, tokens) - score(reference, tokens)).mean(),
            "length": completions.mask.sum(axis=1).mean(),
            "ended": setting.answers(completions)[1].mean(),
            "distinct_2": distinct_n(ids, 2),
            "duplicates": duplicate_share(ids),
        }
        if setting.judge is not None:
            metrics["utility"] = setting.judge(setting.heldout, completions).mean()
        return metrics

    return measure


def train(
    cfg: DPO, setting: Setting, comparisons: Comparisons, sft_params: Any, run: Run, seed: int,
    unpaired: Examples | None = None,
) -> tuple[Params, Scorer, dict[str, float]]:  # fmt: skip
    """Trains; returns the policy, its implicit reward of any answers, and the final metrics.

    Answers in `unpaired` take the place of the comparisons in training, not in what is measured.
    """
    model = Transformer(setting.model)
    run.say(f"{cfg.loss}: β {cfg.beta_used:g}, learning rate {cfg.learning_rate:g}")
    frozen, own = shard_params(split(cfg, jax.random.key(seed + 5), sft_params))
    reference = frozen if cfg.lora_rank else own
    state = make_state(model, own, make_optimizer(cfg, cfg.steps))
    train_step = make_step(cfg, setting.model)

    score = in_batches(partial(answer_logprobs, model), 2 * cfg.batch_size)
    if unpaired is None:
        pairs = paired(comparisons.train, cfg.pairs)
        examples = singly(pairs) if cfg.loss == "kto" else pairs
    else:
        examples = unpaired
    packed = comparisons.pack is not None
    batch = make_batches(cfg, setting, examples, partial(score, reference), packed=packed, seed=seed)
    measure = make_measure(cfg, setting, score, reference, comparisons.heldout, seed)

    state, first = run.restore("dpo", state)
    skipped = SkippedSteps(cfg, run, "dpo")
    for step in run.progress("dpo", range(first, cfg.steps), show=("loss", "val_accuracy", "kl_k1", "utility")):
        some = batch(step)
        state, metrics = train_step(state, some, frozen)
        skipped.watch(step + 1, metrics["skipped"], some)
        last = step + 1 == cfg.steps
        if (step + 1) % max(1, cfg.steps // 8) == 0 or last:
            metrics |= measure(with_lora(frozen, state.params), step + 1)
        evaluated = "val_accuracy" in metrics
        if step % 20 == 0 or evaluated:
            run.log("dpo", step + 1, metrics | {"skipped": step + 1 - int(state.step)})
        if save_due(cfg, run, step + 1, evaluated=evaluated):
            run.save("dpo", step + 1, state, keep=cfg.keep, metric=metrics.get("val_accuracy"))

    params = with_lora(frozen, state.params)

    def reward(tokens: Tokens) -> np.ndarray:
        lengths = np.asarray(tokens.mask).sum(axis=1)
        return implicit_rewards(cfg, score(params, tokens), score(reference, tokens), lengths)

    metrics = measure(params, 0) | comparisons.facts
    return params, reward, {f"dpo_{name}": float(value) for name, value in metrics.items()}


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """SFT, comparisons of its answers, preference optimisation; returns the final metrics."""
    setting = load_setting(cfg)
    unpaired = None
    if cfg.unpaired:
        unpaired, notes = read_unpaired(cfg.unpaired, cfg.unpaired_columns, setting, cfg.max_length)
        setting = setting._replace(notes=(*setting.notes, *notes))
    with Run(cfg.run_dir, cfg, name="dpo", resume=cfg.resume) as run:
        announce(setting, run)
        try:
            start = sft.train(cfg.sft, setting, run, cfg.seed)[-1]
            comparisons = setting.compare(sft.make_sampler(setting, start, cfg.seed))
            policy, reward, metrics = train(cfg, setting, comparisons, start, run, cfg.seed, unpaired)
            metrics |= setting.facts
            metrics |= pipeline.evaluate(setting, start, policy, reward, run, cfg.seed, stage="dpo")
            run.summary(metrics)
            card = pipeline.card(cfg, f"{cfg.loss.upper()}, β = {cfg.beta_used:g}, from SFT", metrics, "dpo_")
            pipeline.export(setting, policy, card, run)
        finally:
            # An interrupted run, too, can be looked at.
            if run.first:
                run.say(f"report: {write_report(run.dir)}")
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
