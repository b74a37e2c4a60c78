"""Shapes that would be broadcast to another number are refused; ratios do not overflow; results are float32."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from rlhf_jax.arrays import ratio, ratio_minus_one
from rlhf_jax.kl import adaptive_beta, kl_exact, kl_k1, kl_k2, kl_k3, kl_shaped_rewards
from rlhf_jax.losses import grpo_loss, ppo_clip_loss
from rlhf_jax.scored_groups import rows_with_signal

WRONG_SHAPES = """
import jax.numpy as jnp
from rlhf_jax import advantages, diagnostics, kl, logprobs, losses, masking
from rlhf_jax.models import last_token_rewards

B, T, V = 3, 4, 5
x, mask, row = jnp.zeros((B, T)), jnp.zeros((B, T), bool), jnp.zeros(B)
ranks, logits, targets = jnp.zeros((B, T), int), jnp.zeros((B, T, V)), jnp.zeros((B, T), int)
beta = {"beta": 1.0}
clip, clips = {"clip_eps": 0.2}, {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "beta": 0.1}
eps = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}
kto = {"beta": 1.0, "desirable_weight": 1.0, "undesirable_weight": 1.0}
CALLS = [
    (masking.masked_sum, (x, mask), {}), (masking.masked_mean, (x, mask), {}), (masking.masked_whiten, (x, mask), {}),
    (logprobs.token_logprobs, (logits, targets), {}), (logprobs.sequence_logprobs, (x, mask), {}),
    (logprobs.chunked_logprobs, (logits, jnp.zeros((V, 7)), targets), {"chunk_size": 2}),
    (kl.kl_k1, (x, x), {}), (kl.kl_k2, (x, x), {}), (kl.kl_k3, (x, x), {}), (kl.kl_exact, (logits, logits), {}),
    (kl.kl_shaped_rewards, (row, x, x, mask), beta), (advantages.gae, (x, x, mask), {"gamma": 1.0, "lam": 1.0}),
    (losses.sft_loss, (x, mask), {}), (losses.bradley_terry_loss, (row, row), {}),
    (losses.ranking_loss, (x, ranks, mask), {}), (losses.plackett_luce_loss, (x, ranks, mask), {}),
    (losses.ppo_clip_loss, (x, x, x, mask), clip), (losses.value_clip_loss, (x, x, x, mask), clip),
    (losses.grpo_loss, (x, x, x, row, mask), clips), (losses.dpo_loss, (row,) * 4, beta),
    (losses.gspo_loss, (x, x, row, mask), eps), (losses.cispo_loss, (x, x, row, mask), eps),
    (losses.reinforce_loss, (x, row, mask), {}), (losses.truncated_importance_weights, (x, x, mask), {"cap": 2.0}),
    (masking.sequence_mean, (x, mask), {}), (masking.constant_mean, (x, mask), {"length": 3}),
    (losses.ipo_loss, (row,) * 4, beta), (losses.simpo_loss, (row,) * 4, beta | {"gamma": 0.5}),
    (losses.orpo_loss, (row,) * 4, beta), (losses.kto_loss, (row, row, row > 0, jnp.zeros(())), kto),
    (diagnostics.explained_variance, (x, x, mask), {}), (last_token_rewards, (x, mask), {}),
    (advantages.group_advantages, (row,), {"group_size": 1, "scale_by_std": True}),
    (advantages.leave_one_out_advantages, (jnp.zeros(4),), {"group_size": 2}),
]
silent = []
for function, given, numbers in CALLS:
    function(*given, **numbers)  # the right shapes
    for place, array in enumerate(given):
        if function is logprobs.chunked_logprobs and place == 1:
            continue
        smaller = [array[:1], array[..., :1], array.sum()] if array.ndim and len(given) > 1 else []
        for wrong in (array[..., None], *smaller):
            if wrong.shape == array.shape or (wrong.shape[:-1] == (B, T) and array.ndim == 3):
                continue  # another vocabulary or width, not another shape of what it is compared with
            try:
                function(*given[:place], wrong, *given[place + 1 :], **numbers)
            except ValueError as error:
                if str(tuple(wrong.shape)) in str(error):
                    continue
                silent.append((function.__name__, place, wrong.shape, str(error)))
            else:
                silent.append((function.__name__, place, wrong.shape, "no error"))
for name, loss, given in [
    ("margin", losses.bradley_terry_loss, (row, row)), ("label_smoothing", losses.bradley_terry_loss, (row, row)),
    ("label_smoothing", lambda *a, **k: losses.dpo_loss(*a, beta=1.0, **k), (row,) * 4),
    ("label_smoothing", lambda *a, **k: losses.ipo_loss(*a, beta=1.0, **k), (row,) * 4),
    ("margin", losses.ranking_loss, (x, ranks, mask)), ("label_smoothing", losses.ranking_loss, (x, ranks, mask)),
]:
    loss(*given, **{name: row})
    try:
        loss(*given, **{name: row[:, None]})
    except ValueError:
        continue
    silent.append((name, "no error"))
print(len(CALLS))
assert not silent, "\\n".join(map(str, silent))
"""


def test_arrays_of_another_shape_are_refused_in_every_equation():
    # In a process of its own, for here the type checker would refuse them first.
    run = subprocess.run([sys.executable, "-c", WRONG_SHAPES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "34"


def test_a_mask_of_weights_is_refused():
    command = "import jax.numpy as jnp; from rlhf_jax.masking import *; masked_mean(jnp.ones(3), jnp.ones(3) / 2)"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert "ValueError: the mask is of float32; it must be of booleans" in run.stderr


def test_ratios_are_exp_and_then_its_tangent():
    x = jnp.asarray([-100.0, -1.0, 0.0, 1e-4, 19.9, 20.0, 21.0, 100.0, 1e4])
    whole = np.exp(20.0)
    expected = [0, np.exp(-1), 1, np.exp(1e-4), np.exp(19.9), whole, 2 * whole, 81 * whole, 9981 * whole]
    assert_allclose(ratio(x), expected, rtol=1e-5, atol=1e-30)
    assert_allclose(ratio_minus_one(x), np.float64(expected) - 1, rtol=1e-4)
    assert_allclose(jax.grad(lambda x: ratio(x).sum())(x)[-2:], [whole, whole], rtol=1e-6)


@pytest.mark.parametrize("advantage, loss, gradient", [(1.0, -1.2, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("which", ["ppo", "grpo"])
def test_a_log_ratio_of_100_has_the_loss_and_the_gradient_of_the_limit(advantage, loss, gradient, which):
    def objective(logprobs):
        old, mask = jnp.full((1, 2), -100.0), jnp.ones((1, 2), bool)
        if which == "ppo":
            return ppo_clip_loss(logprobs, old, jnp.full((1, 2), advantage), mask, clip_eps=0.2)
        return grpo_loss(
            logprobs, old, old, jnp.full(1, advantage), mask, clip_eps_low=0.2, clip_eps_high=0.2, beta=0.0
        )

    (found, metrics), grads = jax.value_and_grad(objective, has_aux=True)(jnp.zeros((1, 2)))
    assert found == pytest.approx(loss) and all(jnp.isfinite(value).all() for value in metrics.values())
    assert (grads == gradient).all()


def test_a_bad_answer_that_became_likely_is_pushed_away():
    def loss(logprobs):
        old, mask = jnp.full((1, 2), -100.0), jnp.ones((1, 2), bool)
        return ppo_clip_loss(logprobs, old, -jnp.ones((1, 2)), mask, clip_eps=0.2)[0]

    grads = jax.grad(loss)(jnp.zeros((1, 2)))
    assert jnp.isfinite(grads).all() and (grads > 0).all()


def test_k3_is_finite_with_a_gradient_of_the_right_sign():
    far = jnp.asarray([[-50.0, 50.0]]), jnp.asarray([[50.0, -50.0]])
    value, gradient = kl_k3(*far), jax.grad(lambda x: kl_k3(x, far[1]).sum())(far[0])
    assert jnp.isfinite(value).all() and (value >= 0).all()
    assert value[0, 1] == pytest.approx(99.0)  # e⁻¹⁰⁰ − 1 + 100
    assert gradient[0, 0] < 0 < gradient[0, 1]  # towards the reference, from either side


HALF = jnp.bfloat16


@pytest.mark.parametrize("function", [kl_k1, kl_k2, kl_k3])
def test_estimators_of_half_precision_are_those_of_the_same_numbers_in_float32(function):
    x, y = jnp.asarray([[-1.0, -2.125]], HALF), jnp.asarray([[-1.5, -0.03125]], HALF)
    found = function(x, y)
    assert found.dtype == jnp.float32
    assert_allclose(found, function(x.astype(jnp.float32), y.astype(jnp.float32)))


def test_everything_that_half_precision_goes_into_comes_out_in_float32():
    from rlhf_jax import advantages, losses, masking

    x, mask, row = jnp.ones((2, 3), HALF), jnp.ones((2, 3), bool), jnp.ones(2, HALF)
    found = [
        masking.masked_sum(x, mask),
        masking.masked_mean(x, mask),
        masking.masked_whiten(x, mask),
        kl_exact(x[..., None], x[..., None]),
        kl_shaped_rewards(row, x, x, mask, beta=0.1),
        adaptive_beta(0.1, row[0], target_kl=1.0, horizon=10, batch_size=1),
        *advantages.gae(x, x, mask, gamma=1.0, lam=0.9),
        advantages.group_advantages(row, group_size=2, scale_by_std=True),
        advantages.leave_one_out_advantages(row, group_size=2),
        losses.sft_loss(x, mask)[0],
        losses.bradley_terry_loss(row, row)[0],
        losses.ranking_loss(x, jnp.zeros((2, 3), int), mask)[0],
        losses.plackett_luce_loss(x, jnp.zeros((2, 3), int), mask)[0],
        losses.ppo_clip_loss(x, x, x, mask, clip_eps=0.2)[0],
        losses.value_clip_loss(x, x, x, mask, clip_eps=0.2)[0],
        losses.grpo_loss(x, x, x, row, mask, clip_eps_low=0.2, clip_eps_high=0.2, beta=0.1)[0],
        losses.dpo_loss(row, row, row, row, beta=0.1)[0],
        losses.ipo_loss(row, row, row, row, beta=0.1)[0],
        losses.simpo_loss(row, row, row, row, beta=0.1, gamma=0.5)[0],
        losses.orpo_loss(row, row, row, row, beta=0.1)[0],
        losses.kto_loss(
            row, row, row > 0, row[0], beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
        )[0],
    ]  # fmt: skip
    assert {x.dtype for x in found} == {jnp.dtype("float32")}


def test_in_tests_a_wrong_shape_inside_the_library_is_an_error():
    """The shapes that signatures say are checked in every call (conftest.py)."""
    with pytest.raises(TypeCheckError):
        rows_with_signal(np.zeros((4, 1)), prompts=2, group_size=2)
