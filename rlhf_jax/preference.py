"""Offline preference optimisation: the loop that DPO, IPO, SimPO, ORPO and KTO share. Only their losses differ.

Each answer's log-probability under the reference is computed once, before training, and kept in the run's folder; of
a stream it is computed as the answer comes.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Float

from rlhf_jax.batches import PackedAnswers, RankedAnswers, Rankings, Tokens
from rlhf_jax.data.order import EpochOrder, RankingStream
from rlhf_jax.data.pairs import AnswerBatch, Examples, lay_out, mismatch, paired, width
from rlhf_jax.data.preferences import Answer, pack_answers, packed_logprobs, stack_batches
from rlhf_jax.data.tokens import host_batch
from rlhf_jax.drawn import DrawnRankings
from rlhf_jax.evaluate import agreement
from rlhf_jax.folder import read_json
from rlhf_jax.hosts import first, from_first
from rlhf_jax.loop import Loop, check_microbatches, microbatch_shape, shard_stacked
from rlhf_jax.masking import masked_mean
from rlhf_jax.models import ModelConfig, Transformer, with_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import answer_logprobs, response_logprobs, score_documents, score_in_batches
from rlhf_jax.sharding import shard_batch, shard_params, to_host
from rlhf_jax.train import make_state, make_train_step
from rlhf_jax.types import Metrics, Params

PreferenceLoss = Callable[[Float[Array, " B"], AnswerBatch, Float[Array, ""] | None], tuple[Array, Metrics]]
"""loss(logprobs, batch, kl) -> (loss, metrics): log π(y|x) of the batch's answers, chosen ones first where they are
pairs; `kl` is KTO's estimate, None for the others."""
ImplicitReward = Callable[[Any, Any, Any], Any]
"""reward(logprobs, ref_logprobs, lengths) -> [B]: the policy's own score of each answer."""


class Trained(NamedTuple):
    """The trained policy and its implicit reward."""

    params: Params
    """The policy's parameters, adapters not merged."""
    reward: Callable[[Tokens], np.ndarray]
    """reward(tokens) -> [B]."""
    metrics: dict[str, float]


def objective(loss: PreferenceLoss, model: Transformer, params: Params, batch: AnswerBatch) -> tuple[Array, Metrics]:
    """The loss of a batch, and how far chosen and rejected answers have moved from the reference, in nats."""
    logprobs = batch_logprobs(model, params, batch.answers)
    kl = None
    if batch.mismatched is not None:
        assert batch.ref_mismatched is not None
        others = batch_logprobs(model, jax.lax.stop_gradient(params), batch.mismatched)
        kl = jnp.mean(others - batch.ref_mismatched)
    value, metrics = loss(logprobs, batch, kl)
    moved = logprobs - batch.ref_logprobs
    return value, metrics | {
        "chosen_change": masked_mean(moved, batch.good),
        "rejected_change": masked_mean(moved, ~batch.good),
    }


def batch_logprobs(model: Transformer, params: Params, answers: Tokens | PackedAnswers) -> Float[Array, " B"]:
    """log π(y|x) of each answer of a batch, packed or not."""
    if isinstance(answers, PackedAnswers):
        return packed_logprobs(response_logprobs(model, params, answers.tokens), answers)
    return answer_logprobs(model, params, answers)


def make_step(loss: PreferenceLoss, config: ModelConfig, accumulate: int) -> Callable[..., tuple[TrainState, Metrics]]:
    """train_step(state, batch, frozen) -> (state, metrics)."""
    model = Transformer(config)
    return make_train_step(
        lambda trainable, batch, frozen: objective(loss, model, with_lora(frozen, trainable), batch),
        counts=(lambda batch: {"loss": batch.good.sum()}) if accumulate > 1 else None,
    )


def make_batches(
    examples: Examples,
    ref_score: Callable[[Sequence[Answer]], np.ndarray],
    config: ModelConfig,
    *,
    groups_a_step: int,
    accumulate: int,
    packed: bool,
    pad_id: int,
    mismatched: bool,
    seed: int,
) -> Callable[[int], AnswerBatch]:
    """Returns batch(step). Each epoch has an order of its own. `ref_score` is called here, once for every answer.

    `mismatched` adds the same responses after other prompts, for KTO's KL. The other prompts are drawn once.
    """
    answers = examples.answers
    length, ref_logprobs = width(answers, config.max_length), ref_score(answers)
    if mismatched:
        others = mismatch(answers, longest=length, seed=seed)
        other_length, ref_others = width(others, config.max_length), ref_score(others)
    order = EpochOrder([seed, 4], len(examples.groups), groups_a_step)
    lay = partial(lay_out, pad_id=pad_id, packed=packed)

    def part(drawn: np.ndarray) -> AnswerBatch:
        batch, rows = lay_groups(examples, drawn, partial(lay, length=length))
        batch = batch._replace(ref_logprobs=ref_logprobs[rows])
        if not mismatched:
            return batch
        beside = lay([others[row] for row in rows], length=other_length)
        return batch._replace(mismatched=beside, ref_mismatched=ref_others[rows])

    def batch(step: int) -> AnswerBatch:
        parts = [part(drawn) for drawn in np.split(order.rows(step), accumulate)]
        return shard_stacked(stack_batches(parts), accumulate)

    return batch


def stream_batches(
    drawn: DrawnRankings,
    ref_score: Callable[[PackedAnswers], np.ndarray],
    *,
    accumulate: int,
    length: int,
    pad_id: int,
) -> Callable[[int], AnswerBatch]:
    """Returns batch(step) of a stream: each ranking's best and worst answer, which `ref_score` scores as they come."""
    lay = partial(pack_answers, length=length, pad_id=pad_id)

    def part(rankings: Sequence[RankedAnswers]) -> AnswerBatch:
        examples = paired(rankings, "best_worst")
        batch, _ = lay_groups(examples, np.arange(len(examples.groups)), lay)
        return batch._replace(ref_logprobs=ref_score(batch.answers))  # type: ignore[arg-type]

    def batch(step: int) -> AnswerBatch:
        return shard_stacked(stack_batches([part(some) for some in drawn.parts(step, accumulate)]), accumulate)

    return batch


def lay_groups(
    examples: Examples, drawn: np.ndarray, lay: Callable[[Sequence[Answer]], Tokens | PackedAnswers]
) -> tuple[AnswerBatch, np.ndarray]:
    """The batch of some groups by their numbers, its reference still at 0, and the numbers of its answers."""
    rows, good = (numbers[drawn].T.reshape(-1) for numbers in (examples.groups, examples.good))
    answers = [examples.answers[row] for row in rows]
    lengths = np.array([len(response) for _, response in answers])
    doubt = np.tile(examples.doubt[drawn], examples.groups.shape[1])
    return host_batch(AnswerBatch, lay(answers), good, lengths, np.zeros(len(rows), np.float32), doubt), rows


def train_preferences(
    loss: PreferenceLoss,
    implicit_reward: ImplicitReward,
    base: Pretrained,
    examples: Examples | RankingStream,
    heldout: Rankings | None,
    loop: Loop,
    seed: int,
    *,
    split: Callable[[Params, Any], tuple[Params, Params]],
    optimizer: optax.GradientTransformation,
    batch_size: int,
    accumulate: int,
    packed: bool,
    eval_batch_size: int,
    evaluations: int,
    reference: Params | None = None,
    mismatched: bool = False,
    measure: Callable[[Params, Params, int], dict[str, Any]] | None = None,
) -> Trained:
    """Trains `base` on pairs (or single answers) of `examples`.

    Of a stream the pairs are the best and the worst answer of each ranking. `split(params, key)`
    returns the frozen and the trained parameters. `reference` is by default the model that training starts from. A
    step takes `batch_size` pairs, or twice as many single answers. At each of `evaluations`
    evaluations the implicit reward predicts the comparisons in `heldout`, and `measure(policy, reference, number)`
    adds metrics of samples.
    Raises UserError when a step's pairs do not divide into `accumulate` microbatches and over the mesh.
    """
    model = Transformer(base.config)
    frozen, trainable = shard_params(split(base.params, jax.random.key(seed + 5)))
    if reference is None:
        reference = frozen or trainable
    reference = shard_params(reference)
    state = make_state(model, trainable, optimizer)
    train_step = make_step(loss, base.config, accumulate)
    score = score_in_batches(partial(answer_logprobs, model), eval_batch_size)
    compiled = jax.jit(partial(answer_logprobs, model))

    files = map("{}_reference_{}.npz".format, repeat(loop.stage), count(1))

    def ref_score(answers: Sequence[Answer]) -> np.ndarray:
        file = loop.run.dir / next(files)
        inputs = read_json(loop.run.dir / "run.json").get("inputs")
        key = content_key(answers, reference, inputs) if first() else ""
        kept = from_first(lambda: kept_scores(file, key) if loop.run.resumed else None)
        if kept is not None:
            return np.asarray(kept, np.float32)
        scores = score_documents(
            compiled, reference, answers, batch_size=eval_batch_size, longest=base.config.max_length,
            pad_id=base.pad_id, progress=partial(loop.run.progress, "reference"),
        ).astype(np.float32)  # fmt: skip
        if first():
            np.savez(temporary := file.with_suffix(".part.npz"), scores=scores, key=key)
            os.replace(temporary, file)
        return scores

    state, drawn = loop.restore(state), None
    if isinstance(examples, RankingStream):
        assert not mismatched
        check_microbatches(batch_size, accumulate, "pairs")
        drawn, score_packed = (
            DrawnRankings((), examples, batch_size, seed, loop),
            jax.jit(partial(batch_logprobs, model)),
        )
        batch = stream_batches(
            drawn, lambda packed: to_host(score_packed(reference, shard_batch(packed))), accumulate=accumulate,
            length=examples.length, pad_id=base.pad_id,
        )  # fmt: skip
    else:
        groups, each = examples.groups.shape
        groups_a_step = min(groups, 2 * batch_size // each)
        check_microbatches(groups_a_step, accumulate, "pairs")
        batch = make_batches(
            examples, ref_score, base.config, groups_a_step=groups_a_step, accumulate=accumulate, packed=packed,
            pad_id=base.pad_id, mismatched=mismatched, seed=seed,
        )  # fmt: skip
    evaluate = make_evaluation(implicit_reward, score, reference, heldout)

    for step in loop:
        some = batch(step)
        if step == loop.first:
            shape, held = microbatch_shape(some.answers, accumulate), (state, frozen, reference)
            loop.say_memory(base.config, state.params, held, shape, adapters=bool(frozen))
        state, trained = train_step(state, some, frozen)
        metrics: dict[str, Any] = {**trained}
        loop.watch_skipped(step, metrics["skipped"], some)
        evaluated = (step + 1) % max(1, loop.steps // evaluations) == 0 or loop.is_last(step)
        if evaluated:
            policy = with_lora(frozen, state.params)
            metrics |= evaluate(policy)
            metrics |= measure(policy, reference, step + 1) if measure else {}
        best, position = metrics.get("val_accuracy"), None if drawn is None else drawn.data_state
        loop.end_step(step, state, metrics, evaluated=evaluated, best=best, data_state=position)

    policy = with_lora(frozen, state.params)

    def reward(tokens: Tokens) -> np.ndarray:
        lengths = np.asarray(tokens.mask).sum(axis=1)
        return implicit_reward(score(policy, tokens), score(reference, tokens), lengths)

    found = evaluate(policy) | (measure(policy, reference, 0) if measure else {})
    return Trained(policy, reward, {name: float(value) for name, value in found.items()})


def content_key(answers: Sequence[Answer], reference: Params, inputs: Any) -> str:
    """A hash of the ids, of the types of the reference's arrays, and of the fingerprints of a run's files."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode())
    digest.update(str([(x.dtype, x.shape) for x in jax.tree.leaves(reference)]).encode())
    for prompt, response in answers:
        for ids in (prompt, response):
            digest.update(np.asarray([len(ids), *ids], np.int32).tobytes())
    return digest.hexdigest()


def kept_scores(file: Path, key: str) -> list[float] | None:
    """The scores that a run has kept in a file; None where it is not there, damaged, or of another content."""
    try:
        with np.load(file) as found:
            return found["scores"].tolist() if str(found["key"]) == key else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def make_evaluation(
    implicit_reward: ImplicitReward,
    score: Callable[[Params, Tokens], np.ndarray],
    reference: Params,
    heldout: Rankings | None,
) -> Callable[[Params], dict[str, Any]]:
    """Returns evaluate(params) -> metrics: how well the implicit reward predicts held-out comparisons, and how far
    log π has moved. Without held-out comparisons there are no metrics."""
    if heldout is None:
        return lambda params: {}
    ref_logprobs = score(reference, heldout.responses)
    lengths = np.asarray(heldout.responses.mask).sum(axis=1)
    rows = np.arange(len(heldout.ranks))
    best, worst = heldout.ranks.argmin(axis=1), heldout.ranks.argmax(axis=1)

    def evaluate(params: Params) -> dict[str, Any]:
        logprobs = score(params, heldout.responses)
        moved = (logprobs - ref_logprobs).reshape(heldout.ranks.shape)
        return agreement(implicit_reward(logprobs, ref_logprobs, lengths), heldout) | {
            "val_chosen_change": moved[rows, best].mean(),
            "val_rejected_change": moved[rows, worst].mean(),
        }

    return evaluate
