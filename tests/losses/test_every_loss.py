"""What holds of every loss: its oracle, its mask, its gradients, its rows, its shards."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import losses
from rlhf_jax.masking import constant_mean, sequence_mean

ROWS, LENGTH = 8, 5
RNG = np.random.default_rng(0)


def real(*shape: int) -> np.ndarray:
    return RNG.normal(0.0, 1.0, shape)


def logprobs(*shape: int) -> np.ndarray:
    return -0.05 - np.abs(real(*shape))


class Case(NamedTuple):
    loss: Callable
    args: dict[str, np.ndarray]
    settings: dict[str, Any]
    trained: tuple[str, ...]
    """Every other float argument must get a gradient of exactly zero."""
    surrogate: bool = False
    """Whether the gradient is not that of the value, by intention."""
    counts_rows: bool = False
    """Whether a row counts that has no token."""

    def floats(self) -> list[str]:
        return [name for name, x in self.args.items() if np.issubdtype(x.dtype, np.floating)]


# Holes, an empty row, and rows that end early.
MASK = RNG.random((ROWS, LENGTH)) < 0.7
MASK[0], MASK[1], MASK[2] = False, True, [True, True, False, False, False]
# Equal ranks among them.
RANKS = RNG.integers(0, 4, (ROWS, LENGTH)).astype(np.int32)
TOKENS, ROW = (ROWS, LENGTH), (ROWS,)
PAIRS = {
    "chosen_logprobs": 4 * logprobs(*ROW),
    "rejected_logprobs": 4 * logprobs(*ROW),
}
REFERENCE = {"ref_chosen_logprobs": 4 * logprobs(*ROW), "ref_rejected_logprobs": 4 * logprobs(*ROW)}
LENGTHS = {
    "chosen_lengths": RNG.integers(2, 9, ROW).astype(float),
    "rejected_lengths": RNG.integers(2, 9, ROW).astype(float),
}
BOTH = ("chosen_logprobs", "rejected_logprobs")

RATIOS = {
    "logprobs": logprobs(*TOKENS),
    "old_logprobs": logprobs(*TOKENS),
    "advantages": real(*ROW),
    "mask": MASK,
}

CASES = {
    "sft": Case(losses.sft_loss, {"logprobs": logprobs(*TOKENS), "mask": MASK}, {}, ("logprobs",)),
    "ppo_clip": Case(
        losses.ppo_clip_loss,
        {"logprobs": logprobs(*TOKENS), "old_logprobs": logprobs(*TOKENS), "advantages": real(*TOKENS), "mask": MASK},
        {"clip_eps": 0.2},
        ("logprobs",),
    ),
    "value_clip": Case(
        losses.value_clip_loss,
        {"values": real(*TOKENS), "old_values": real(*TOKENS), "returns": real(*TOKENS), "mask": MASK},
        {"clip_eps": 0.3},
        ("values",),
    ),
    "grpo": Case(
        losses.grpo_loss,
        {
            "logprobs": logprobs(*TOKENS),
            "old_logprobs": logprobs(*TOKENS),
            "ref_logprobs": logprobs(*TOKENS),
            "advantages": real(*ROW),
            "mask": MASK,
        },
        {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "beta": 0.04},
        ("logprobs",),
    ),
    "dr_grpo": Case(
        losses.grpo_loss,
        RATIOS | {"ref_logprobs": logprobs(*TOKENS)},
        {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "beta": 0.0, "reduce": partial(constant_mean, length=9)},
        ("logprobs",),
        counts_rows=True,
    ),
    "weighted_grpo": Case(
        losses.grpo_loss,
        RATIOS | {"ref_logprobs": logprobs(*TOKENS), "weights": np.abs(real(*TOKENS))},
        {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "beta": 0.04, "reduce": sequence_mean},
        ("logprobs",),
    ),
    "gspo": Case(losses.gspo_loss, RATIOS, {"clip_eps_low": 0.2, "clip_eps_high": 0.3}, ("logprobs",)),
    "cispo": Case(
        losses.cispo_loss,
        RATIOS,
        {"clip_eps_low": 1.0, "clip_eps_high": 0.3, "reduce": sequence_mean},
        ("logprobs",),
        surrogate=True,
    ),
    "reinforce": Case(
        losses.reinforce_loss,
        {"logprobs": logprobs(*TOKENS), "advantages": real(*ROW), "mask": MASK, "weights": np.abs(real(*TOKENS))},
        {"reduce": partial(constant_mean, length=9)},
        ("logprobs",),
        counts_rows=True,
    ),
    "ranking": Case(losses.ranking_loss, {"rewards": real(*TOKENS), "ranks": RANKS, "mask": MASK}, {}, ("rewards",)),
    "soft_ranking": Case(
        losses.ranking_loss,
        {"rewards": real(*TOKENS), "ranks": RANKS, "mask": MASK},
        {"margin": 0.3, "label_smoothing": 0.2},
        ("rewards",),
    ),
    "plackett_luce": Case(
        losses.plackett_luce_loss, {"rewards": real(*TOKENS), "ranks": RANKS, "mask": MASK}, {}, ("rewards",)
    ),
    "bradley_terry": Case(
        losses.bradley_terry_loss,
        {"chosen_rewards": real(*ROW), "rejected_rewards": real(*ROW)},
        {"margin": 0.3},
        ("chosen_rewards", "rejected_rewards"),
    ),
    "dpo": Case(losses.dpo_loss, PAIRS | REFERENCE, {"beta": 0.3}, BOTH),
    "cdpo": Case(losses.dpo_loss, PAIRS | REFERENCE, {"beta": 0.3, "label_smoothing": 0.1}, BOTH),
    "ipo": Case(losses.ipo_loss, PAIRS | REFERENCE, {"beta": 0.2}, BOTH),
    "soft_ipo": Case(losses.ipo_loss, PAIRS | REFERENCE, {"beta": 0.2, "label_smoothing": 0.3}, BOTH),
    "simpo": Case(losses.simpo_loss, PAIRS | LENGTHS, {"beta": 2.0, "gamma": 0.5}, BOTH + tuple(LENGTHS)),
    "orpo": Case(losses.orpo_loss, PAIRS | LENGTHS, {"beta": 0.3}, BOTH + tuple(LENGTHS)),
    "kto": Case(
        losses.kto_loss,
        {
            "logprobs": 4 * logprobs(*ROW),
            "ref_logprobs": 4 * logprobs(*ROW),
            "desirable": np.arange(ROWS) % 3 > 0,
            "kl": np.array(0.4),
        },
        {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5},
        ("logprobs",),
    ),
}
every = pytest.mark.parametrize("name", CASES)
masked = pytest.mark.parametrize("name", [name for name, case in CASES.items() if "mask" in case.args])


def single(args: dict) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(x, jnp.float32 if np.issubdtype(x.dtype, np.floating) else None) for name, x in args.items()
    }


@cache
def compiled(name: str) -> Callable:
    case = CASES[name]

    def loss(floats: dict, rest: dict):
        return case.loss(**floats, **rest, **case.settings)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(name: str, args: dict) -> tuple[jax.Array, dict, dict]:
    """The loss, its metrics, and the gradient into every float argument."""
    floats = {arg: args[arg] for arg in CASES[name].floats()}
    rest = {arg: x for arg, x in args.items() if arg not in floats}
    (value, metrics), grads = compiled(name)(floats, rest)
    return value, metrics, grads


def poisoned(args: dict, poison: float) -> dict:
    """`poison` in every masked entry, and in the numbers of a row that has nothing unmasked."""
    mask = args["mask"]
    out = {}
    for name, x in args.items():
        keep = mask if x.shape == mask.shape else mask.any(axis=1)
        out[name] = np.where(keep, x, poison) if np.issubdtype(x.dtype, np.floating) else x
    return out


def assert_same(actual, expected, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


@every
def test_equals_the_loop(name):
    case = CASES[name]
    expected = getattr(oracles, case.loss.__name__)(**case.args, **case.settings)
    value, _, _ = evaluate(name, single(case.args))
    assert value.shape == () and value.dtype == jnp.float32
    assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.surrogate])
def test_gradients(name):
    case = CASES[name]
    trained = {name: case.args[name] for name in case.trained}
    rest = {name: x for name, x in case.args.items() if name not in trained}
    with jax.enable_x64(True):
        rest = {name: jnp.asarray(x) for name, x in rest.items()}
        check_grads(
            jax.jit(lambda trained: case.loss(**trained, **rest, **case.settings)[0]),
            ({name: jnp.asarray(x) for name, x in trained.items()},),
            order=1,
            modes=["rev"],
        )


@every
def test_no_gradient_into_what_is_given(name):
    case = CASES[name]
    _, _, grads = evaluate(name, single(case.args))
    for arg in case.floats():
        assert np.any(grads[arg]) == (arg in case.trained), arg


@every
@settings(max_examples=3, deadline=None, phases=(Phase.generate,))
@given(order=st.permutations(range(ROWS)))
def test_rows_may_be_permuted(name, order):
    case = CASES[name]
    args = {name: x[np.array(order)] if x.ndim else x for name, x in case.args.items()}
    value, metrics, grads = evaluate(name, single(case.args))
    expected_grads = {name: grad[np.array(order)] if grad.ndim else grad for name, grad in grads.items()}
    assert_same(evaluate(name, single(args)), (value, metrics, expected_grads))


@every
def test_sharded_over_eight_devices_as_on_one(name):
    case = CASES[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    args = single(case.args)
    sharded = {name: jax.device_put(x, NamedSharding(mesh, P("data") if x.ndim else P())) for name, x in args.items()}
    actual, expected = evaluate(name, sharded), evaluate(name, args)
    assert_same(actual, expected)
    assert len(actual[2][case.trained[0]].sharding.device_set) == 8


@masked
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_padding_is_never_read(name, poison):
    case = CASES[name]
    actual, expected = evaluate(name, single(poisoned(case.args, poison))), evaluate(name, single(case.args))
    jax.tree.map(assert_array_equal, actual, expected)
    assert_array_equal(np.asarray(actual[2][case.trained[0]])[~MASK], 0.0)


@masked
def test_padding_is_never_read_outside_jit(name):
    """Compiled, `x * mask` becomes a select, and a NaN in padding goes unseen."""
    case = CASES[name]
    args = single(poisoned(case.args, np.nan))
    value, grad = jax.value_and_grad(lambda x: case.loss(**args | {case.trained[0]: x}, **case.settings)[0])(
        args[case.trained[0]]
    )
    expected, _, grads = evaluate(name, single(case.args))
    assert_same((value, grad), (expected, grads[case.trained[0]]))


@masked
def test_more_padding_changes_nothing(name):
    case = CASES[name]
    args = {}
    for arg, x in case.args.items():
        pad = ((0, 0 if case.counts_rows else 2), (0, 3))[: x.ndim]
        args[arg] = np.pad(x, pad, constant_values=np.nan if np.issubdtype(x.dtype, np.floating) else 0)
    value, metrics, grads = evaluate(name, single(args))
    grads = {arg: grad[:ROWS] if grad.ndim == 1 else grad[:ROWS, :LENGTH] for arg, grad in grads.items()}
    assert_same((value, metrics, grads), evaluate(name, single(case.args)))


@masked
@pytest.mark.parametrize("poison", [0.0, np.nan])
def test_nothing_unmasked_is_zero(name, poison):
    case = CASES[name]
    args = poisoned(case.args | {"mask": np.zeros_like(MASK)}, poison)
    value, metrics, grads = evaluate(name, single(args))
    for x in jax.tree.leaves((value, metrics, grads)):
        assert_array_equal(x, np.zeros(x.shape))
