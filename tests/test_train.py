"""The training step, PPO's minibatches, and scoring of tokens."""

from dataclasses import replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.train_state import TrainState

from rlhf_jax.batches import Experience
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.logprobs import token_entropy, token_logprobs
from rlhf_jax.models import ModelConfig, Transformer
from rlhf_jax.optimizers import adamw
from rlhf_jax.scoring import response_logprobs, token_scores
from rlhf_jax.train import make_state, make_train_step, ppo_update

CONFIG = ModelConfig(
    vocab_size=20, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32,
)  # fmt: skip


def experience(rows: int) -> Experience:
    tokens = pad_sequences([([3], [r + 4, 2]) for r in range(rows)], length=4, pad_id=0)
    zeros = jnp.zeros(tokens.mask.shape)
    return Experience(jax.tree.map(jnp.asarray, tokens), *[zeros] * 6)


def collect(seen, batch):
    """A step that learns nothing and reports which rows it saw."""
    some, extra = batch
    rows = some.tokens.inputs[:, 1] - 4
    return seen.at[rows].add(1), {"rows": rows, "extra": extra}


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    update = jax.jit(lambda key: ppo_update(
        collect, jnp.zeros(8, jnp.int32), experience(8), jnp.arange(6), key, epochs=3, minibatches=2
    ))  # fmt: skip
    seen, metrics = update(jax.random.key(0))
    np.testing.assert_array_equal(seen, 3)
    epochs = np.asarray(metrics["rows"]).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(8), (3, 1)))
    assert len({tuple(order) for order in epochs}) == 3
    np.testing.assert_array_equal(metrics["extra"], np.arange(6))
    assert (update(jax.random.key(1))[1]["rows"] != metrics["rows"]).any()


def test_rows_of_a_single_minibatch_stay_in_their_order():
    _, metrics = ppo_update(
        collect, jnp.zeros(8, jnp.int32), experience(8), jnp.arange(2), jax.random.key(0), epochs=2, minibatches=1
    )
    np.testing.assert_array_equal(metrics["rows"], np.tile(np.arange(8), (2, 1)))


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="8 responses cannot be cut into 3"):
        ppo_update(collect, jnp.zeros(8), experience(8), None, jax.random.key(0), epochs=1, minibatches=3)


def test_a_step_follows_the_gradient_and_is_compiled_once():
    state = TrainState.create(
        apply_fn=None, params={"w": jnp.array([3.0])}, tx=adamw(0.1, weight_decay=0.0, max_grad_norm=1.0)
    )
    step = make_train_step(chex.assert_max_traces(lambda p, x: (jnp.sum(p["w"] ** 2) * x, {"x": x}), n=1))
    for _ in range(3):
        state, metrics = step(state, jnp.float32(1.0))
    np.testing.assert_allclose(state.params["w"], [3.0 - 3 * 0.1], atol=1e-3)  # Adam moves by its learning rate
    assert set(metrics) == {"loss", "grad_norm", "skipped", "x"} and int(state.step) == 3


def root_loss(params, x):
    """Its gradient is infinite at 0, where it is finite itself; at inf it is infinite."""
    return jnp.sqrt(jnp.sum(x * params["w"] ** 2)), {}


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(bad, parts):
    counts = {"counts": lambda batch: {"loss": jnp.int32(1)}} if parts > 1 else {}
    step = make_train_step(root_loss, **counts)

    def run(batches):
        params = {"w": jnp.array([3.0, 1.0])}
        state = TrainState.create(apply_fn=None, params=params, tx=adamw(0.1, weight_decay=0.1, max_grad_norm=1.0))
        skipped = []
        for x in batches:
            state, metrics = step(state, jnp.full((parts, 2) if parts > 1 else 2, x))
            skipped.append(int(metrics["skipped"]))
        return state, skipped

    state, skipped = run([1.0, bad, bad, 2.0])
    expected, never = run([1.0, 2.0])
    assert skipped == [0, 1, 1, 0] and never == [0, 0] and int(state.step) == 2
    chex.assert_trees_all_equal((state.params, state.opt_state), (expected.params, expected.opt_state))


def test_ppo_skips_only_the_minibatches_that_are_not_finite():
    rows = experience(8)
    rows = rows._replace(advantages=rows.advantages.at[3].set(jnp.nan))
    train_step = make_train_step(lambda p, batch: (jnp.sum(p["w"] * batch.advantages) + jnp.sum(p["w"]), {}))
    tx = adamw(0.1, weight_decay=0.0, max_grad_norm=1.0)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(())}, tx=tx)
    state, metrics = ppo_update(
        lambda state, batch: train_step(state, batch[0]), state, rows, None, jax.random.key(0), epochs=2, minibatches=4
    )
    assert metrics["skipped"].sum() == 2 and int(state.step) == 6
    np.testing.assert_allclose(state.params["w"], 1 - 6 * 0.1, atol=1e-3)


@cache
def new_params():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), experience(4).tokens.inputs)["params"]


@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (0.7, 0.5)])
def test_token_scores_are_those_of_the_tempered_logits(temperature, softcap):
    model = Transformer(replace(CONFIG, final_softcap=softcap))
    tokens, params = experience(4).tokens, new_params()
    score, score_alone = (
        jax.jit(partial(f, model, temperature=temperature)) for f in (token_scores, response_logprobs)
    )
    logprobs, entropy = score(params, tokens)
    logits = jax.jit(model.apply)({"params": params}, tokens.inputs, tokens.positions, tokens.segment_ids)
    logits /= temperature
    expected = np.where(tokens.mask, token_logprobs(logits, tokens.targets), 0.0)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    np.testing.assert_allclose(entropy, np.where(tokens.mask, token_entropy(logits), 0.0), atol=1e-5)
    np.testing.assert_allclose(score_alone(params, tokens), expected, atol=1e-5)


def test_a_state_may_be_donated_while_its_parameters_live_on():
    model = Transformer(CONFIG)
    tokens, params = experience(4).tokens, new_params()
    step = make_train_step(lambda p, t: (-token_scores(model, p, t)[0].mean(), {}))
    step(make_state(model, params, adamw(0.1, weight_decay=0.0, max_grad_norm=1.0)), tokens)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
