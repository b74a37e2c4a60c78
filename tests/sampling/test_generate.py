from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.models import ModelConfig, Transformer
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.draw import truncate
from rlhf_jax.sampling.generate import _generate

VOCAB, WIDTH, NEW, PAD = 11, 4, 6, 0
MODEL = Transformer(
    ModelConfig(
        vocab_size=VOCAB, d_model=12, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=6, d_ff=16,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=False, max_length=32,
    )
)  # fmt: skip


@cache
def new_params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), leaf.dtype), shapes)


def prompts_of(batch, seed=0):
    """Ragged, left-padded."""
    rng = np.random.default_rng(seed)
    mask = np.arange(WIDTH)[None] >= WIDTH - rng.integers(1, WIDTH + 1, batch)[:, None]
    return jnp.asarray(np.where(mask, rng.integers(1, VOCAB, (batch, WIDTH)), PAD)), jnp.asarray(mask)


def sample(prompts, mask, seed=0, temperature=1.0, max_new_tokens=NEW, eos_id=None, **options):
    return generate(
        MODEL, new_params(), prompts, mask, jax.random.key(seed),
        max_new_tokens=max_new_tokens, temperature=temperature, eos_id=eos_id, pad_id=PAD, **options,
    )  # fmt: skip


@jax.jit
def next_logits(prompts, mask, completion):
    """Logits before each token of the completion, by one pass over the joined sequence."""
    tokens = jnp.concatenate([prompts, completion], axis=1)
    mask = jnp.concatenate([mask, jnp.ones(completion.shape, bool)], axis=1)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    logits = MODEL.apply({"params": new_params()}, tokens, positions, mask.astype(jnp.int32))
    return logits[:, prompts.shape[1] - 1 : -1]


def an_eos(prompts, mask, **options):
    """A token that ends some rows, but not all of them at once."""
    tokens = np.asarray(sample(prompts, mask, **options).tokens)
    ends = [np.where((t := tokens == v).any(axis=1), t.argmax(axis=1), NEW) for v in range(1, VOCAB)]
    return 1 + int(np.argmax([len(set(end)) + (0 < end.max() < NEW - 1) for end in ends]))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("max_new_tokens", [1, NEW])
@pytest.mark.parametrize("with_eos", [False, True])
def test_greedy_equals_teacher_forced_argmax(batch, max_new_tokens, with_eos):
    prompts, mask = prompts_of(batch)
    eos = an_eos(prompts, mask, temperature=0.0) if with_eos else None
    completions = sample(prompts, mask, temperature=0.0, max_new_tokens=max_new_tokens, eos_id=eos)
    assert completions.tokens.shape == completions.mask.shape == (batch, max_new_tokens)
    logits = next_logits(prompts, mask, completions.tokens)
    kept = np.asarray(completions.mask)
    assert_array_equal(completions.tokens[kept], logits.argmax(axis=-1)[kept])
    logprobs = jax.nn.log_softmax(logits).max(axis=-1)
    assert_allclose(completions.logprobs[kept], logprobs[kept], atol=1e-4)
    if not with_eos:
        assert kept.all()


def test_each_row_ends_with_its_eos_and_is_padded_after():
    prompts, mask = prompts_of(7)
    eos = an_eos(prompts, mask)
    completions = sample(prompts, mask, eos_id=eos)
    lengths = []
    for tokens, kept, logprobs in zip(*map(np.asarray, completions), strict=True):
        ends = np.flatnonzero(tokens == eos)
        n = ends[0] + 1 if len(ends) else NEW
        assert_array_equal(kept, np.arange(NEW) < n)
        assert (tokens[n:] == PAD).all() and (logprobs[n:] == 0).all() and (logprobs[:n] < 0).all()
        lengths.append(n)
    assert len(set(lengths)) > 1 and min(lengths) < NEW


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_equal_those_of_one_full_pass(temperature):
    prompts, mask = prompts_of(7)
    completions = sample(prompts, mask, temperature=temperature, seed=3)
    logprobs = jax.nn.log_softmax(next_logits(prompts, mask, completions.tokens) / temperature)
    expected = jnp.take_along_axis(logprobs, completions.tokens[:, :, None], axis=-1)[:, :, 0]
    assert_allclose(completions.logprobs, expected, atol=1e-4)


def test_logprobs_are_of_the_truncated_distribution():
    prompts, mask = prompts_of(7)
    completions = sample(prompts, mask, temperature=0.8, top_k=5, top_p=0.7)
    logits = next_logits(prompts, mask, completions.tokens).reshape(-1, VOCAB)
    kept = truncate(logits / 0.8, top_k=5, top_p=jnp.asarray(0.7))
    logprobs = jax.nn.log_softmax(kept).reshape(7, NEW, VOCAB)
    expected = jnp.take_along_axis(logprobs, completions.tokens[:, :, None], axis=-1)[:, :, 0]
    assert_allclose(completions.logprobs, expected, atol=1e-4)


def test_first_tokens_are_drawn_from_the_model():
    n = 4096
    prompts, mask = (jnp.broadcast_to(x[:1], (n, WIDTH)) for x in prompts_of(1))
    tokens = sample(prompts, mask, max_new_tokens=1).tokens[:, 0]
    probs = jax.nn.softmax(next_logits(prompts[:1], mask[:1], jnp.zeros((1, 1), jnp.int32))[0, 0])
    frequencies = np.bincount(tokens, minlength=VOCAB) / n
    assert_allclose(frequencies, probs, atol=4 * 0.5 / n**0.5)
    assert np.unique(tokens).size > 3


@pytest.mark.parametrize("batch", [7])
def test_decoding_ends_with_the_last_row(batch):
    prompts, mask = prompts_of(batch)
    new = 40

    def steps(eos_id):
        completions, steps = _generate(
            MODEL, new_params(), prompts, mask, jax.random.key(0), jnp.asarray(1.0), None,
            max_new_tokens=new, greedy=False, top_k=None, eos_id=eos_id, pad_id=PAD,
        )  # fmt: skip
        return int(steps), int(completions.mask.sum(axis=1).max())

    assert steps(()) == (new, new)
    early = [steps((eos,)) for eos in range(1, 5)]
    assert all(n == longest for n, longest in early)
    assert min(early)[0] < new


def test_a_row_does_not_depend_on_the_other_rows():
    prompts, mask = prompts_of(7)
    eos = an_eos(prompts, mask)
    completions = sample(prompts, mask, eos_id=eos)
    others, others_mask = prompts_of(7, seed=1)
    mixed = sample(others.at[2].set(prompts[2]), others_mask.at[2].set(mask[2]), eos_id=eos)
    for a, b in zip(completions, mixed, strict=True):
        assert_allclose(a[2], b[2], atol=1e-5)
    assert (np.asarray(completions.tokens) != mixed.tokens).any()

    unending = sample(prompts, mask)
    kept = np.asarray(completions.mask)
    assert_array_equal(completions.tokens[kept], unending.tokens[kept])


def test_more_padding_changes_nothing():
    prompts, mask = prompts_of(3)
    wider = sample(jnp.pad(prompts, ((0, 0), (3, 0)), constant_values=PAD), jnp.pad(mask, ((0, 0), (3, 0))))
    completions = sample(prompts, mask)
    assert_array_equal(wider.tokens, completions.tokens)
    assert_allclose(wider.logprobs, completions.logprobs, atol=1e-5)


def test_the_key_decides():
    prompts, mask = prompts_of(7)
    first = sample(prompts, mask, seed=1).tokens
    assert_array_equal(sample(prompts, mask, seed=1).tokens, first)
    assert (np.asarray(sample(prompts, mask, seed=2).tokens) != first).any()


def test_every_row_and_step_has_its_own_number():
    """Of a model that prefers nothing: where numbers were shared, so would be the tokens."""
    flat = jax.tree.map(jnp.zeros_like, new_params())
    prompts, mask = prompts_of(7)
    tokens = np.asarray(
        generate(
            MODEL, flat, prompts, mask, jax.random.key(0),
            max_new_tokens=NEW, temperature=1.0, eos_id=None, pad_id=PAD,
        ).tokens
    )  # fmt: skip
    assert (tokens != tokens[:, :1]).any(axis=1).all()
    assert (tokens != tokens[:1]).any(axis=0).all()


def test_top_k_1_is_greedy():
    prompts, mask = prompts_of(2)
    narrow = sample(prompts, mask, top_k=1)
    assert_array_equal(narrow.tokens, sample(prompts, mask, temperature=0.0).tokens)
    assert_allclose(narrow.logprobs, 0.0, atol=1e-6)


def test_new_values_compile_nothing():
    sample(*prompts_of(5), seed=0, temperature=1.0, top_p=0.9, max_new_tokens=2)
    compiled = _generate._cache_size()
    sample(*prompts_of(5, seed=4), seed=4, temperature=0.3, top_p=0.5, max_new_tokens=2)
    sample(*prompts_of(5), temperature=jnp.asarray(2.0), top_p=jnp.asarray(1.0), max_new_tokens=2)
    assert _generate._cache_size() == compiled
    sample(*prompts_of(5), temperature=1.0, top_p=0.9, max_new_tokens=3)
    assert _generate._cache_size() == compiled + 1


def test_generate_works_inside_jit():
    prompts, mask = prompts_of(2)
    traced = jax.jit(lambda p, m, t: sample(p, m, temperature=t))(prompts, mask, 0.7)
    plain = sample(prompts, mask, temperature=0.7)
    assert_array_equal(traced.tokens, plain.tokens)
    assert_allclose(traced.logprobs, plain.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": -1.0}, "temperature must lie between"),
        ({"temperature": float("nan")}, "temperature must lie between"),
        ({"top_p": 0.0}, "top_p must lie between"),
        ({"top_p": 1.5}, "top_p must lie between"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        sample(*prompts_of(2), **options)


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]])
def test_prompts_that_are_empty_or_not_left_padded(row):
    prompts, mask = prompts_of(2)
    with pytest.raises(ValueError, match="prompt 1 is empty or not left-padded"):
        sample(prompts, mask.at[1].set(jnp.asarray(row, bool)))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sample(prompts[:, :0], mask[:, :0])
