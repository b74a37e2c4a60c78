"""Answers that go on from a prompt read once are what whole rows are: log-probabilities, entropy and gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny import CONFIG, new_params, random_tree

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.tokens import join
from rlhf_jax.models import Transformer, init_lora, with_lora
from rlhf_jax.scoring import Joined, answer_states, hidden_states, response_logprobs, token_scores

RNG = np.random.default_rng(0)
GROUPS, SIZE, WIDTH = 3, 4, 5
PLAIN = replace(CONFIG, n_layers=3)
CONFIGS = {
    "llama": PLAIN,
    "scanned": replace(PLAIN, scan_layers=True),
    "recomputed": replace(PLAIN, scan_layers=True, remat=True),
    "windows": replace(PLAIN, windows=(3, None, 4), local_rope_theta=100.0, scan_layers=True, nope_layers=(1,)),
    "gemma": replace(
        PLAIN, windows=(3, None, 3), norm_at="both", norm_offset=1.0, attention_softcap=2.0, final_softcap=3.0,
        embedding_scale=3.0, qk_norm="head",
    ),
    "gpt2": replace(PLAIN, learned_positions=True, norm="layer", gated_mlp=False, qkv_bias=True, tie_embeddings=False),
    "neox": replace(PLAIN, parallel_residual=True, rotary_fraction=0.34, norm="layer"),
}  # fmt: skip


def batch(length):
    """Groups whose prompts have 5, 2 and no tokens, and answers of 1 to `length`."""
    sizes = np.repeat([5, 2, 0], SIZE)[:, None]
    ids = np.repeat(RNG.integers(1, 13, (GROUPS, WIDTH)), SIZE, axis=0)
    asked = np.arange(WIDTH)[None] >= WIDTH - sizes
    answers = RNG.integers(1, 13, (GROUPS * SIZE, length))
    mask = np.arange(length)[None] < RNG.integers(1, length + 1, (GROUPS * SIZE, 1))
    prompts = Prompts(jnp.asarray(np.where(asked, ids, 0), jnp.int32), jnp.asarray(asked), jnp.arange(len(ids)))
    nothing = jnp.zeros(mask.shape)
    return join(prompts, Completions(jnp.asarray(answers, jnp.int32), jnp.asarray(mask), nothing), pad_id=0)


def same(model, params, tokens, over=lambda own: own, *, sizes=(SIZE,)):
    """Compares passes over groups of so many rows with that over whole rows."""
    weights = jnp.asarray(RNG.normal(size=(2, *tokens.mask.shape)), jnp.float32)

    def run(joined):
        def loss(own):
            logprobs, entropy = token_scores(model, over(own), tokens, temperature=0.7, joined=joined)
            return (weights[0] * logprobs + weights[1] * entropy).sum(), (logprobs, entropy)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, scores), grads = run(None)
    assert (scores[0] != 0).sum() == tokens.mask.sum() > GROUPS * SIZE - 1
    for size in sizes:
        (_, found), found_grads = run(Joined(WIDTH, size))
        jax.tree.map(partial(assert_allclose, atol=3e-5, rtol=3e-4), (found, found_grads), (scores, grads))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_prompt_read_once_is_exact(config):
    same(Transformer(config), new_params(config), batch(7))


@pytest.mark.parametrize("length", [1, 70])
def test_answers_of_one_token_and_of_many(length):
    """70 are more columns than the head reads at once. A group of one row reads its prompt alone."""
    same(Transformer(PLAIN), new_params(PLAIN), batch(length), sizes=(1, SIZE))


def test_log_probabilities_alone_are_those_with_the_entropy():
    model, params, tokens = Transformer(PLAIN), new_params(PLAIN), batch(7)
    for joined in (None, Joined(WIDTH, 1), Joined(WIDTH, SIZE)):
        both, alone = (
            jax.jit(partial(function, model, temperature=0.7, joined=joined))(params, tokens)
            for function in (token_scores, response_logprobs)
        )
        assert_allclose(alone, both[0], atol=3e-6)


def test_over_an_adapter():
    trunk = new_params(PLAIN)
    own = init_lora(jax.random.key(0), trunk, rank=2, alpha=4.0, targets=".*")
    same(Transformer(PLAIN), random_tree(own, 1, 0.5), batch(7), over=partial(with_lora, trunk))


def test_the_prompt_is_read_once():
    """The answers of the second row of a group are predicted from the prompt of its first."""
    model, params, tokens = Transformer(PLAIN), new_params(PLAIN), batch(7)
    other = tokens._replace(inputs=tokens.inputs.at[1, :WIDTH].set(0))
    once = jax.jit(partial(answer_states, model, joined=Joined(WIDTH, SIZE)))
    np.testing.assert_array_equal(once(params, other), once(params, tokens))
    whole = jax.jit(partial(hidden_states, model))
    assert np.abs(whole(params, other) - whole(params, tokens))[1].max() > 1e-3
