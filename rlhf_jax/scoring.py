"""Forward passes over `Tokens`: log-probabilities, entropy, values and rewards, at once or in batches.

No pass makes a [B, T, V] array.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.batches import PackedRankings, Rankings, Tokens
from rlhf_jax.data.encode import encode_windows
from rlhf_jax.data.preferences import packed_rewards
from rlhf_jax.data.tokens import Document, Ids, pad_sequences, size, take
from rlhf_jax.logprobs import chunked_logprobs, chunked_logprobs_and_entropy, sequence_logprobs, soft_cap
from rlhf_jax.losses import chunked_sft_loss
from rlhf_jax.models import (
    ModelConfig,
    ScalarModel,
    Transformer,
    count_weights,
    head_kernel,
    init_cache,
    last_token_rewards,
    repeated_cache,
)
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.sampling.sampler import like_lengths
from rlhf_jax.sharding import current_mesh, shard_batch, to_host
from rlhf_jax.types import Metrics, Params

Arrays = TypeVar("Arrays")

HEAD_COLUMNS, HEAD_TOKENS = 64, 512
"""Columns of time whose logits exist at once, at most; and tokens of a device, where its rows are many."""


def head_chunk(rows: int) -> int:
    """Columns of time whose logits exist at once for so many rows: 100 MB of them for 49 thousand words."""
    return max(1, min(HEAD_COLUMNS, HEAD_TOKENS * row_devices() // rows))


def row_devices() -> int:
    """Devices among which rows are shared out."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


LAYER_BYTES, MOST_ROWS = 2**28, 256


def rows_at_once(config: ModelConfig, length: int, weights: int) -> int:
    """Rows of so many tokens to read or to sample at once where nothing is trained, for a model of `weights` numbers.

    What one layer makes of them takes 256 MB a device, or an eighth of the weights' bytes if that is more. There are
    at most 256, and one for each device along "data" and "fsdp" at least.
    """
    devices = row_devices()
    room = max(LAYER_BYTES * devices, jnp.dtype(config.precision.parameters).itemsize * weights // 8)
    token = 4 * (4 * config.d_model + 2 * config.d_ff + config.n_heads * length)
    return devices * max(1, min(MOST_ROWS, room // (token * length)) // devices)


def hidden_states(model: Transformer, params: Params, tokens: Tokens) -> Float[Array, "B T D"]:
    """The hidden states that the heads read, one at each input."""
    return model.apply({"params": params}, tokens.inputs, tokens.positions, tokens.segment_ids, method="hidden_states")


class Joined(NamedTuple):
    """The sizes of `Tokens` that are prompts `join`ed with answers; T = width + N."""

    width: int
    """Columns of the prompts."""
    group_size: int = 1
    """So many rows, one after the other, have their prompt in common."""


def answer_states(model: Transformer, params: Params, tokens: Tokens, joined: Joined) -> Float[Array, "B N D"]:
    """The hidden states that predict the answers' N tokens, at columns width − 1 to T − 2.

    Those of `hidden_states` in value and in gradient. The prompt of a group is read once, into a cache, and all of its
    answers go on from there.
    """
    width, size = joined
    if size == 1:
        return hidden_states(model, params, tokens)[:, width - 1 : -1]
    inputs, positions, segment_ids = tokens.inputs, tokens.positions, tokens.segment_ids
    cache = init_cache(model.config, len(inputs) // size, width)
    read = partial(model.apply, {"params": params}, method="decode")
    asked, cache = read(inputs[::size, :width], positions[::size, :width], segment_ids[::size, :width], cache)
    last = jnp.repeat(asked[:, -1:], size, axis=0)
    more = inputs.shape[1] - 1 - width
    if not more:
        return last
    cache = repeated_cache(cache, size, more)
    answers, _ = read(inputs[:, width:-1], positions[:, width:-1], segment_ids[:, width:-1], cache)
    return jnp.concatenate([last, answers], axis=1)


def _predictors(
    model: Transformer, params: Params, tokens: Tokens, joined: Joined | None
) -> tuple[Array, Array, Array, Callable[[Array], Array]]:
    """Hidden states, their targets and mask, and a function that lays their [B, N] scores into [B, T]."""
    if joined is None:
        return hidden_states(model, params, tokens), tokens.targets, tokens.mask, lambda scores: scores
    start = joined.width - 1
    hidden = answer_states(model, params, tokens, joined)
    return hidden, tokens.targets[:, start:-1], tokens.mask[:, start:-1], lambda x: jnp.pad(x, ((0, 0), (start, 1)))


def response_logprobs(
    model: Transformer, params: Params, tokens: Tokens, *, temperature: float = 1.0, joined: Joined | None = None
) -> Float[Array, "B T"]:
    """Log-probability of every target in the mask. The head reads these tokens only; [B, T, V] never exists.

    Less is computed for tokens that are known to be `joined`.
    """
    hidden, targets, mask, lay = _predictors(model, params, tokens, joined)
    return lay(chunked_logprobs(
        hidden, head_kernel(params), targets, chunk_size=head_chunk(len(hidden)),
        mask=mask, softcap=model.config.final_softcap, temperature=temperature,
    ))  # fmt: skip


def answer_logprobs(model: Transformer, params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """log π(y|x) of each response. Preference losses compare it."""
    return sequence_logprobs(response_logprobs(model, params, tokens), tokens.mask)


def token_scores(
    model: Transformer, params: Params, tokens: Tokens, *, temperature: float = 1.0, joined: Joined | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of every target in the mask, and the entropy of its distribution, at a temperature.

    The [B, T, V] logits never exist at once. Less is computed for tokens that are known to be `joined`.
    """
    hidden, targets, mask, lay = _predictors(model, params, tokens, joined)
    logprobs, entropy = chunked_logprobs_and_entropy(
        hidden, head_kernel(params), targets, chunk_size=head_chunk(len(hidden)),
        mask=mask, softcap=model.config.final_softcap, temperature=temperature,
    )  # fmt: skip
    return lay(logprobs), lay(entropy)


def in_parts(function: Callable[[Tokens], Arrays], tokens: Tokens, number: int) -> Arrays:
    """function(tokens), computed for B / number rows at a time, in the memory of one part. For traced code.

    `function` returns arrays [B, …]. Raises ValueError when the rows do not divide.
    """
    if number == 1:
        return function(tokens)
    if len(tokens.inputs) % number:
        raise ValueError(f"{len(tokens.inputs)} rows do not divide into {number} parts")
    parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), tokens)
    found = jax.lax.map(lambda part: shard_batch(function(part)), shard_batch(parts, axis=1))
    return shard_batch(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))


def sft_objective(model: Transformer, params: Params, tokens: Tokens) -> tuple[Float[Array, ""], Metrics]:
    """`sft_loss` of the responses, its gradient computed along with the logits."""
    return chunked_sft_loss(
        hidden_states(model, params, tokens), head_kernel(params), tokens.targets, tokens.mask,
        chunk_size=head_chunk(len(tokens.mask)), softcap=model.config.final_softcap,
    )  # fmt: skip


def token_values(model: ScalarModel, params: Params, tokens: Tokens) -> Float[Array, "B T"]:
    """V(inputs_≤t): the scalar head at each token."""
    return model.apply({"params": params}, tokens.inputs, tokens.positions, tokens.segment_ids)


def response_rewards(model: ScalarModel, params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """A reward model's score of each response, read at its last token."""
    return last_token_rewards(token_values(model, params, tokens), tokens.mask)


def ranking_rewards(model: ScalarModel, params: Params, batch: Rankings | PackedRankings) -> Float[Array, "P K"]:
    """A reward model's score of every answer of a batch of rankings, packed or one to a row."""
    if isinstance(batch, PackedRankings):
        return packed_rewards(token_values(model, params, batch.tokens), batch)
    return response_rewards(model, params, batch.responses).reshape(batch.ranks.shape)


def score_in_batches(
    function: Callable[[Params, Tokens], Array], batch_size: int
) -> Callable[[Params, Tokens], np.ndarray]:
    """Returns score(params, tokens) -> [B, …], which calls function(params, tokens) -> [B, …] on batches of rows.

    All batches have one shape, so the function is compiled once. The last batch is filled up with the first rows.
    """
    compiled = jax.jit(function)

    def score(params: Params, tokens: Tokens) -> np.ndarray:
        count = len(tokens.mask)
        size = min(batch_size, count)
        starts = range(0, count, size)
        parts = [compiled(params, shard_batch(take(tokens, np.arange(s, s + size) % count))) for s in starts]
        return np.concatenate(to_host(parts))[:count]

    return score


def score_documents(
    function: Callable[[Params, Tokens], Array],
    params: Params,
    documents: Sequence[Document],
    *,
    batch_size: int | Callable[[int], int],
    longest: int,
    pad_id: int,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> np.ndarray:
    """A number for each of N documents of ids, [N], by a compiled function(params, tokens) -> [B].

    At most `batch_size` documents are scored at once, or as many as it says of a width. Documents of like length share
    a batch. `progress` goes through the batches, and may show how far that is.
    Raises ValueError when a document has more than `longest` tokens.
    """
    found = np.zeros(len(documents), np.float64)
    batches = list(like_lengths([size(document) for document in documents], batch_size, longest))
    for rows, real, width in progress(batches):
        tokens = pad_sequences([documents[row] for row in rows], length=width, pad_id=pad_id)
        found[rows[:real]] = to_host(function(params, shard_batch(tokens)))[:real]
    return found


def choice_logits(model: Transformer, pair: Int[Array, " 2"], params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """log π(a|x) − log π(b|x) of two tokens a, b as the response y of one token: their logits' difference."""
    at = tokens.mask.argmax(axis=1)[:, None, None]
    hidden = jnp.take_along_axis(hidden_states(model, params, tokens), at, axis=1)[:, 0]
    kernel = head_kernel(params)[:, pair].astype(hidden.dtype)
    logits = soft_cap(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), model.config.final_softcap)
    return logits[:, 0] - logits[:, 1]


_compiled_choices = jax.jit(choice_logits, static_argnums=0)
_compiled_logprobs = jax.jit(answer_logprobs, static_argnums=0)
_compiled_rewards = jax.jit(response_rewards, static_argnums=0)


def _scored(
    score: Callable[[Params, Tokens], Array], model: Pretrained, documents: Sequence[Document], most: int
) -> np.ndarray:
    """`score_documents`, at most so many at once; fewer where they are long."""
    config, weights = model.config, count_weights(model.params)

    def at_once(width: int) -> int:
        return min(most, rows_at_once(config, width, weights))

    return score_documents(
        score, model.params, documents, batch_size=at_once, longest=config.max_length, pad_id=model.pad_id
    )


def document_logprobs(model: Pretrained, documents: Sequence[Document], *, batch_size: int) -> np.ndarray:
    """log π(y|x) of each of N documents (x, y) of ids under a language model, [N].

    Raises ValueError when a document has more tokens than the model reads.
    """
    score = partial(_compiled_logprobs, Transformer(model.config))
    return _scored(score, model, documents, batch_size)


def token_choices(model: Pretrained, prompts: Sequence[Ids], pair: tuple[int, int], *, batch_size: int) -> np.ndarray:
    """log π(a|x) − log π(b|x) of the pair's tokens a and b as the next one after each of N prompts, [N].

    One forward pass of a prompt tells both. Raises ValueError when a prompt has no room for one token more.
    """
    score = partial(_compiled_choices, Transformer(model.config), jnp.array(pair))
    documents = [(prompt, pair[:1]) for prompt in prompts]
    return _scored(score, model, documents, batch_size)


def document_rewards(model: Pretrained, documents: Sequence[Document], *, batch_size: int) -> np.ndarray:
    """A reward model's score of each of N documents (x, y) of ids, [N].

    Raises ValueError when a document has more tokens than the model reads.
    """
    score = partial(_compiled_rewards, ScalarModel(model.config))
    return _scored(score, model, documents, batch_size)


def text_logprobs(
    model: Pretrained, texts: Sequence[str], *, max_length: int, batch_size: int
) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """log π of each of N texts under a language model, and how many of its tokens were predicted.

    A text is read in windows of at most `max_length` tokens; `batch_size` of them are scored at once.
    """
    windows = [encode_windows(text, model.tokenizer, max_length) for text in texts]
    number = np.repeat(np.arange(len(texts)), [len(some) for some in windows])
    documents = [document for some in windows for document in some]
    logprobs = document_logprobs(model, documents, batch_size=batch_size)
    counts = np.array([sum(len(predicted) for _, predicted in some) for some in windows], int)
    return np.bincount(number, logprobs, len(texts)), counts


def mean_in_batches(function: Callable[[Params, Tokens], Array], batch_size: int) -> Callable[[Params, Tokens], float]:
    """Returns mean(params, tokens), which calls `function`, a mean over the mask of its tokens, on batches of rows.

    Each batch is weighted by its number of tokens in the mask, so the result is the mean over all of them.
    """
    compiled = jax.jit(function)

    def mean(params: Params, tokens: Tokens) -> float:
        count = len(tokens.mask)
        starts = range(0, count, batch_size)
        parts = [take(tokens, np.arange(start, min(start + batch_size, count))) for start in starts]
        numbers = np.array([np.asarray(part.mask).sum() for part in parts], np.float64)
        means = to_host([compiled(params, shard_batch(part)) for part in parts])
        return float(np.dot(means, numbers / numbers.sum())) if len(parts) > 1 else float(means[0])

    return mean
