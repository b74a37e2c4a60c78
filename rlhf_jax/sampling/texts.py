"""Answers in text to prompts in text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, PRNGKeyArray

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.tokens import Document, pad_prompts
from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.sampling.sampler import sample_answers


class TextAnswers(NamedTuple):
    """One answer to each of N prompts."""

    texts: list[str]
    """Without special tokens."""
    ended: Bool[np.ndarray, " N"]
    """Whether each ended by itself."""
    documents: list[Document]
    """(prompt, answer) in the ids that were sampled; an answer that did not end has no EOS."""


def encode_prompt(model: Pretrained, prompt: str, number: int, longest: int) -> list[int]:
    """The ids of a prompt of one turn, the `number`-th.

    Raises BadRow for one with more than `longest` tokens, or that the model's chat template refuses.
    """
    row = Prompt(({"role": "user", "content": prompt},), Place("prompt", number))
    return encode(row, model.tokenizer, longest)[0]


def answerable(
    models: Sequence[Pretrained], prompts: Sequence[str], longest: Sequence[int]
) -> tuple[list[int], dict[str, list[int]]]:
    """The places of the prompts that all models can be asked, each in its `longest` tokens; reason -> numbers of the
    others, counted from 1."""
    kept, reasons = [], dict[str, list[int]]()
    for number, prompt in enumerate(prompts, 1):
        try:
            for model, most in zip(models, longest, strict=True):
                encode_prompt(model, prompt, number, most)
        except BadRow as error:
            reasons.setdefault(f"not asked: {error}", []).append(number)
        else:
            kept.append(number - 1)
    return kept, reasons


def answer_texts(
    model: Pretrained,
    prompts: Sequence[str],
    key: PRNGKeyArray,
    *,
    max_length: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> TextAnswers:
    """The model's answer to each of N prompts of one turn, N at least 1; temperature 0 is greedy.

    `max_length` is tokens of prompt and answer together, of which the answer has at most `max_new_tokens`. At most
    `batch_size` prompts are answered at once. The same key gives the same answers.
    Raises UserError for a prompt that leaves no room for an answer, or that the model's chat template refuses.
    """
    ids = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids.append(encode_prompt(model, prompt, number, max(1, max_length - max_new_tokens)))
        except BadRow as error:
            reason = f"{error}: {error.detail}" if error.detail else str(error)
            raise UserError(f"{model.name} cannot answer prompt {number}, {prompt[:60]!r}: {reason}") from None
    completions = sample_answers(
        Transformer(model.config), model.params,
        pad_prompts(ids, length=max(map(len, ids)), pad_id=model.pad_id), key, max_new_tokens=max_new_tokens,
        temperature=temperature, eos_id=model.eos_id, pad_id=model.pad_id, batch_size=batch_size,
    )  # fmt: skip
    sampled = [row[real].tolist() for row, real in zip(completions.tokens, completions.mask, strict=True)]
    return TextAnswers(model.read_answers(completions), model.ended(completions), list(zip(ids, sampled, strict=True)))
