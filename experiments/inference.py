"""A model from a folder, and what evaluation asks of it in batches: answers, log-probabilities, rewards, verdicts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_jax.batches import Tokens
from rlhf_jax.data.tokens import pad_prompts, pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, load_hf
from rlhf_jax.sampling import generate
from rlhf_jax.scoring import response_rewards, token_scores
from rlhf_jax.sharding import hf_shardings, shard_batch, to_host

Ids = Sequence[int]
SHORTEST = 16
"""The least width of a batch."""


class Loaded(NamedTuple):
    """A language model, or a reward model, and its tokenizer."""

    folder: str
    config: ModelConfig
    params: Any
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


class Answers(NamedTuple):
    """What was sampled, as text without special tokens, and whether each ended by itself."""

    texts: list[str]
    ended: np.ndarray


def load(folder: str, *, reward_model: bool = False) -> Loaded:
    """Reads a Hugging Face folder. Raises UserError for what is wrong with it."""
    try:
        if reward_model:
            from rlhf_jax.models import load_hf_reward_model as read
        else:
            read = load_hf
        config, params = read(folder, shardings=hf_shardings(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token, so nothing says where a response ends")
    return Loaded(folder, config, params, tokenizer)


def batches(lengths: Sequence[int], size: int, longest: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(rows, how many of them are real, width): rows of like length together, at most `size`.

    Widths are powers of two (at most `longest`), and so are the numbers of rows, filled up by rows said again: few
    shapes, so few programs are compiled.
    """
    widths = np.array([min(longest, max(SHORTEST, 1 << (length - 1).bit_length())) for length in lengths])
    for width in sorted(set(widths.tolist())):
        rows = np.flatnonzero(widths == width)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            full = size if len(rows) > size else 1 << (len(some) - 1).bit_length()
            yield np.resize(some, full), len(some), width


def answer(
    model: Loaded, prompts: Sequence[Ids], *, max_new_tokens: int, temperature: float, seed: int, batch_size: int
) -> Answers:
    """One answer a prompt; temperature 0 is greedy."""
    transformer = Transformer(model.config)
    texts, ended = [""] * len(prompts), np.zeros(len(prompts), bool)
    lengths = [len(ids) for ids in prompts]
    for number, (rows, real, width) in enumerate(batches(lengths, batch_size, model.config.max_length)):
        some = pad_prompts([prompts[row] for row in rows], length=width, pad_id=model.pad_id)
        completions = generate(
            transformer, model.params, *shard_batch((jnp.asarray(some.tokens), jnp.asarray(some.mask))),
            jax.random.fold_in(jax.random.key(seed), number),
            max_new_tokens=max_new_tokens, temperature=temperature, eos_id=model.eos_id, pad_id=model.pad_id,
        )  # fmt: skip
        tokens, mask, _ = to_host(completions)
        sampled = [list(map(int, ids[here])) for ids, here in zip(tokens, mask, strict=True)]
        decoded = model.tokenizer.batch_decode(sampled[:real], skip_special_tokens=True)
        for row, text in zip(rows[:real].tolist(), decoded, strict=True):
            texts[row] = text
        ended[rows[:real]] = ((tokens == model.eos_id) & mask).any(axis=1)[:real]
    return Answers(texts, ended)


def logprobs(model: Loaded, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int) -> np.ndarray:
    """log π(response | prompt) of each pair of ids, [N]."""
    transformer = Transformer(model.config)

    @jax.jit
    def score(params: Any, tokens: Tokens) -> jax.Array:
        scores, _ = token_scores(transformer, params, tokens)
        return jnp.where(tokens.mask, scores, 0.0).sum(axis=1)

    return _score(score, model, pairs, batch_size)


def rewards(model: Loaded, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int) -> np.ndarray:
    """A reward model's score of each response to its prompt, [N]."""
    scalar = ScalarModel(model.config)
    return _score(jax.jit(lambda params, tokens: response_rewards(scalar, params, tokens)), model, pairs, batch_size)


def _score(score: Any, model: Loaded, pairs: Sequence[tuple[Ids, Ids]], batch_size: int) -> np.ndarray:
    found = np.zeros(len(pairs), np.float64)
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    for rows, real, width in batches(lengths, batch_size, model.config.max_length):
        tokens = pad_sequences([pairs[row] for row in rows], length=width, pad_id=model.pad_id)
        found[rows[:real]] = to_host(score(model.params, shard_batch(tokens)))[:real]
    return found
