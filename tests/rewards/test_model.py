"""Reward models as rewards: of other sizes and families by tokens, with another tokenizer by texts."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from transformers import AutoTokenizer

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.conversations import message
from rlhf_jax.data.tokens import join, pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, ScalarModel
from rlhf_jax.rewards.model import (
    check_reads,
    encode_answer,
    model_reward,
    same_tokenizer,
    text_model_reward,
)
from rlhf_jax.rewards.reward import params_of, score_tokens, trl_forms
from rlhf_jax.scoring import response_rewards
from rlhf_jax.sharding import make_mesh

CONFIG = ModelConfig(
    vocab_size=13, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=16, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=True, max_length=32,
)  # fmt: skip
WIDE = replace(
    CONFIG, d_model=20, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=10, family="gpt2", norm="layer",
    activation="gelu_tanh", gated_mlp=False, learned_positions=True, qkv_bias=True, output_bias=True, mlp_bias=True,
)  # fmt: skip
WORDS = "Once upon a time there was a little dog who liked to run in the park".split()


def scalar_params(config):
    """Random numbers: those that a model starts from are so small that all answers score alike."""
    shapes = jax.eval_shape(ScalarModel(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


@cache
def scorer(config):
    return jax.jit(partial(response_rewards, ScalarModel(config)))


def alone(config, params, prompt, answer, length=200):
    """The score of one answer in a batch of its own."""
    return scorer(config)(params, pad_sequences([(prompt, answer)], length=length, pad_id=0))[0]


@pytest.fixture(scope="module")
def stories(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


@pytest.fixture(scope="module")
def minimind(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.fixture(params=["stories", "minimind"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def reader(tokenizer, max_length=256):
    """A reward model for a tokenizer."""
    config = replace(CONFIG, vocab_size=len(tokenizer), max_length=max_length)
    return config, scalar_params(config)


def by_text(tokenizer, *, max_length=256, batch_size=4, max_failed_share=1.0):
    config, params = reader(tokenizer, max_length)
    return text_model_reward(
        config, params, tokenizer, name="rm", weight=2.0,
        batch_size=batch_size, max_length=max_length, failed_score=-7.0, max_failed_share=max_failed_share,
    )  # fmt: skip


def sampled():
    prompts = Prompts(
        jnp.asarray([[0, 3, 1], [4, 1, 5]]), jnp.asarray([[False, True, True], [True] * 3]), jnp.arange(2)
    )
    tokens = jnp.asarray([[9, 2, 0], [6, 7, 2]])
    return prompts, Completions(tokens, tokens > 0, jnp.zeros(tokens.shape))


def test_models_of_two_sizes_and_families_score_in_one_program():
    rewards = [
        model_reward(config, scalar_params(config), name=name, weight=1.0)
        for name, config in (("small", CONFIG), ("wide", WIDE))
    ]
    assert all(reward.traceable for reward in rewards)
    prompts, completions = sampled()
    program = jax.jit(lambda params, *batch: score_tokens(rewards, params, join(*batch, pad_id=0)))
    found = program(params_of(rewards), prompts, completions)
    for reward, config in zip(rewards, (CONFIG, WIDE), strict=True):
        # Each answer on its own, without padding before it.
        for row, ids in enumerate([([3, 1], [9, 2]), ([4, 1, 5], [6, 7, 2])]):
            assert_allclose(found[reward.name][row], alone(config, reward.params, *ids, length=8), rtol=1e-5)
    assert not np.allclose(found["small"], found["wide"])


def test_a_model_that_has_diverged_does_not_pass_for_one_that_does_not_apply():
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, scalar_params(CONFIG))
    reward = model_reward(CONFIG, params, name="rm", weight=1.0)
    found = jax.jit(reward.on_tokens)(params, join(*sampled(), pad_id=0))
    assert_array_equal(found, [np.inf, np.inf])


@pytest.mark.parametrize("vocab_size, length, message", [(14, 32, "ids below 13"), (13, 33, "at most 32 tokens")])
def test_a_model_that_cannot_read_the_policy_is_refused(vocab_size, length, message):
    check_reads(CONFIG, name="rm", vocab_size=13, length=32)
    with pytest.raises(UserError, match=f"rm: it reads .*{message}|rm: it reads {message}"):
        check_reads(CONFIG, name="rm", vocab_size=vocab_size, length=length)


def test_by_text_each_answer_has_the_score_of_its_own_ids(tokenizer):
    config, params = reader(tokenizer)
    prompts = [" ".join(WORDS[:n]) for n in (1, 9, 2, 14, 3, 5, 4)]
    prompts[2:4] = [(message("user", "Why?"), message("assistant", "So."), message("user", text)) for text in "ab"]
    texts = [" ".join(WORDS[-n:]) for n in (3, 2, 9, 1, 7, 1, 5)]
    given = trl_forms(prompts, texts)
    found = by_text(tokenizer).on_texts(*given, {})
    assert found[1:] == (0, 0, 0, "")
    for row, (prompt, completion) in enumerate(zip(*given, strict=True)):
        ids, answer, cut = encode_answer(prompt, completion, tokenizer, 256)
        assert cut == 0 and answer[-1] == tokenizer.eos_token_id and texts[row] in tokenizer.decode(answer)
        assert_allclose(found.scores[row], alone(config, params, ids, answer), rtol=1e-4, atol=1e-5)
    assert len(set(found.scores)) == len(texts)


def test_text_and_tokens_agree_where_the_tokenizer_is_the_same(stories):
    config, params = reader(stories)
    prompts, texts = ["Tell me a story", "What did the dog do?"], ["Once upon a time", "He ran in the park"]
    found = by_text(stories).on_texts(*trl_forms(prompts, texts), {})
    pairs = [encode_answer(*pair, stories, 256)[:2] for pair in zip(prompts, texts, strict=True)]
    reward = model_reward(config, params, name="rm", weight=1.0)
    program = jax.jit(lambda params, tokens: score_tokens([reward], params, tokens))
    by_tokens = program(params_of([reward]), pad_sequences(pairs, length=64, pad_id=0))
    assert_allclose(found.scores, by_tokens["rm"], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_counted(minimind):
    before = [message("user", " ".join(WORDS * 8)), message("assistant", "So."), message("user", "Why?")]
    prompts = ["Hi", before, "Hi", "Hi", [message("user", "Hi"), message("stranger", "Ho")]]
    texts = ["Yes", "No", " ".join(WORDS * 8), "", "Yes"]
    found = by_text(minimind, max_length=64).on_texts(*trl_forms(prompts, texts), {})
    assert_array_equal(found.scores == -7.0, [False, False, True, False, True])
    assert (found.errors, found.timeouts, found.shortened) == (2, 0, 1)
    assert found.first_error == "answer 2: response too long for 64 tokens"
    with pytest.raises(
        UserError, match=r"rm: it failed on 2 of 5 answers \(40%; at most 39% may\); answer 2: response"
    ):
        by_text(minimind, max_length=64, max_failed_share=0.39).on_texts(*trl_forms(prompts, texts), {})


def test_no_answers_no_scores(stories):
    assert by_text(stories).on_texts([], [], {}).scores.shape == (0,)


def test_by_text_on_a_mesh(stories):
    given = trl_forms(["Hi"] * 5, [" ".join(WORDS[:n]) for n in range(1, 6)])
    expected = by_text(stories, batch_size=8).on_texts(*given, {}).scores
    with jax.set_mesh(make_mesh("data=4,fsdp=2")):
        assert_allclose(by_text(stories, batch_size=8).on_texts(*given, {}).scores, expected, rtol=1e-4, atol=1e-5)


def changed(tokenizer, **attributes):
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def normalised(tokenizer):
    from tokenizers.normalizers import Lowercase

    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


def with_token(tokenizer, **how):
    tokenizer.add_tokens(["<new>"], **how)
    return tokenizer


@pytest.mark.parametrize(
    "change, same",
    [
        (lambda t: t, True),
        (partial(changed, pad_token="<|image_pad|>"), True),
        (partial(changed, pad_token="<|buffer9|>"), True),
        (partial(changed, padding_side="left", model_max_length=7), True),
        (partial(changed, chat_template="{{ messages }}"), False),
        (partial(changed, eos_token="<|endoftext|>"), False),
        (partial(changed, bos_token="<|endoftext|>"), False),
        (normalised, False),
        (with_token, False),
    ],
)
def test_same_tokenizer(minimind, shared_data, change, same):
    other = change(AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind"))
    assert same_tokenizer(minimind, other) == same_tokenizer(other, minimind) == same


def test_tokenizers_of_two_models_differ_and_a_saved_one_is_the_same(minimind, stories, shared_data, tmp_path):
    assert not same_tokenizer(minimind, stories)
    other = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")
    other("words", padding="max_length", max_length=9, truncation=True)  # what leaves traces in a backend
    other.save_pretrained(tmp_path)
    assert same_tokenizer(minimind, AutoTokenizer.from_pretrained(tmp_path))
