"""Reward models as rewards: by tokens in the one program, or by texts where their tokenizer is not the policy's."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.batches import Tokens
from rlhf_jax.data.conversations import messages
from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Unpaired
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.data.tokens import Ids
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, ScalarModel
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import (
    Columns,
    Completion,
    HostScores,
    Part,
    Prompt,
    Reward,
    first_failure,
    refuse_failures,
)
from rlhf_jax.scoring import response_rewards, score_documents
from rlhf_jax.types import Params


def model_reward(config: ModelConfig, params: Params, *, name: str, weight: float) -> Reward:
    """A reward model that reads the policy's own tokens; its size and family are its own. Traceable.

    `params` are a ScalarModel's. Only for a model whose tokenizer is the policy's (`same_tokenizer`), and whose
    vocabulary and context are large enough (`check_reads`).
    """
    return Reward(name, weight, on_tokens=partial(_model_scores, ScalarModel(config)), params=params)


def check_reads(config: ModelConfig, *, name: str, vocab_size: int, length: int) -> None:
    """Raises UserError when a reward model cannot read every id below `vocab_size`, or `length` tokens."""
    if config.vocab_size < vocab_size:
        raise UserError(
            f"{name}: it reads ids below {config.vocab_size}, and the policy's go up to {vocab_size - 1}; "
            "it must be trained with the policy's vocabulary"
        )
    if config.max_length < length:
        raise UserError(
            f"{name}: it reads at most {config.max_length} tokens, and a prompt and its answer may have {length}; "
            "make prompts or answers shorter"
        )


def text_model_reward(
    config: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    weight: float,
    batch_size: int,
    max_length: int,
    failed_score: float,
    max_failed_share: float,
) -> Reward:
    """A reward model with its own tokenizer, which reads texts: a host reward.

    Conversations are written by its tokenizer's chat template. At most `batch_size` answers are scored at once, each
    with its prompt in at most `max_length` tokens. A conversation that is too long for that loses its oldest
    turns, and is counted as shortened; an answer that does not fit even so, or that the template refuses, scores
    `failed_score` and is counted as an error. The reward raises UserError when more than `max_failed_share` of a
    batch's answers are.
    """
    score = jax.jit(partial(_model_scores, ScalarModel(config)))
    pad_id = Pretrained(config, params, tokenizer).pad_id

    def on_texts(
        prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Columns, part: Part | None = None
    ) -> HostScores:
        pairs: dict[int, tuple[Ids, Ids]] = {}
        failures: dict[int, str] = {}
        shortened = 0
        part = part or Part(np.arange(len(prompts)), len(prompts))
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                *pair, cut = encode_answer(prompt, completion, tokenizer, max_length)
            except BadRow as error:
                failures[int(part.rows[row])] = str(error)
            else:
                pairs[row] = (pair[0], pair[1])
                shortened += cut > 0
        refuse_failures(name, failures, part.total, max_failed_share)
        scores = np.full(len(prompts), failed_score)
        scores[list(pairs)] = score_documents(
            score, params, list(pairs.values()), batch_size=batch_size, longest=max_length, pad_id=pad_id
        )
        return HostScores(scores, errors=len(failures), shortened=shortened, first_error=first_failure(failures))

    return Reward(name, weight, on_texts=on_texts, max_failed_share=max_failed_share)


def encode_answer(
    prompt: Prompt, completion: Completion, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int], int]:
    """Ids of a prompt and of its answer, as in training, and how many tokens the prompt lost to fit `max_length`.

    Raises BadRow for an answer that does not fit or does not show, and for messages that cannot be used.
    """
    given = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    answer = ({"role": "assistant", "content": text},)
    row = Unpaired(messages({"prompt": given}, "prompt"), answer, True, Place("", 0))
    encoded, cut = encode(row, tokenizer, max_length)
    return encoded.prompt, encoded.response, cut


def same_tokenizer(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids for every conversation, so that one may read what the other wrote.

    They do when vocabulary, merges, added and special tokens, normaliser, pre-tokeniser and chat template are equal;
    their padding tokens may differ. False where it cannot be told: without a backend of the library `tokenizers`.
    """
    tokenizers = (first, second)
    if not all(hasattr(tokenizer, "backend_tokenizer") for tokenizer in tokenizers):
        return False
    pads = {tokenizer.pad_token_id for tokenizer in tokenizers}
    mine, theirs = (_id_parts(tokenizer, pads) for tokenizer in tokenizers)
    return mine == theirs


def _id_parts(tokenizer: PreTrainedTokenizerBase, pads: set[int | None]) -> list[Any]:
    """All that the ids depend on."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [saved[name] for name in ("model", "normalizer", "pre_tokenizer")]
    parts.append([token for token in saved["added_tokens"] if token["id"] not in pads])
    special = set(tokenizer.all_special_ids) - pads
    return [*parts, special, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]


def _model_scores(model: ScalarModel, params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """A NaN says that a reward does not apply. A model that has diverged must not pass for that: it gives inf."""
    scores = response_rewards(model, params, tokens)
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)
