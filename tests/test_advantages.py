import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.advantages import gae, group_advantages, leave_one_out_advantages, running_mean_advantages

RNG = np.random.default_rng(0)
B, T = 8, 6
REWARDS, VALUES = RNG.normal(size=(2, B, T)).astype(np.float32)
MASK = RNG.random((B, T)) < 0.7
MASK[0], MASK[1], MASK[2] = False, True, [True, False, False, True, True, False]
ARGS = jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK)


def assert_close(actual, expected):
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected)


def test_gae_by_hand():
    # δ = (0 + ½·2 − 1, 0 + ½·4 − 2, 8 − 4) = (0, 0, 4); each step back is worth γλ = ¼.
    rewards, values = jnp.asarray([[0.0, 0.0, 8.0]]), jnp.asarray([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 3), bool), gamma=0.5, lam=0.5)
    assert_allclose(advantages, [[0.25, 1.0, 4.0]])
    assert_allclose(returns, [[1.25, 3.0, 8.0]])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_equals_the_sum(gamma, lam):
    assert_close(gae(*ARGS, gamma=gamma, lam=lam), oracles.gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam))


def test_gae_steps_over_holes_as_if_they_were_not_there():
    advantages, returns = gae(*ARGS, gamma=0.9, lam=0.8)
    for b in range(B):
        keep = MASK[b]
        if keep.any():
            row = (jnp.asarray(x[b][keep])[None] for x in (REWARDS, VALUES, MASK))
            assert_close((advantages[b][keep][None], returns[b][keep][None]), gae(*row, gamma=0.9, lam=0.8))


def test_lambda_1_is_monte_carlo_and_lambda_0_is_td():
    rewards, values, mask = ARGS[0], ARGS[1], jnp.ones((B, T), bool)
    to_go = np.cumsum(REWARDS[:, ::-1], axis=1)[:, ::-1]
    assert_close(gae(rewards, values, mask, gamma=1.0, lam=1.0), (to_go - VALUES, to_go))
    target = REWARDS + 0.9 * np.pad(VALUES[:, 1:], ((0, 0), (0, 1)))
    assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.0), (target - VALUES, target))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_gae_never_reads_padding(poison):
    poisoned = [jnp.where(MASK, x, poison) for x in ARGS[:2]]
    actual = gae(*poisoned, ARGS[2], gamma=0.9, lam=0.8)
    jax.tree.map(assert_array_equal, actual, gae(*ARGS, gamma=0.9, lam=0.8))
    for x in actual:
        assert_array_equal(np.asarray(x)[~MASK], 0.0)
    wider = [jnp.pad(x, ((0, 2), (1, 3)), constant_values=c) for x, c in zip(ARGS, (poison, poison, 0), strict=True)]
    assert_close([x[:B, 1 : T + 1] for x in gae(*wider, gamma=0.9, lam=0.8)], list(actual))


def test_gae_sharded_over_eight_devices_as_on_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    estimate = jax.jit(lambda *args: gae(*args, gamma=0.9, lam=0.8))
    actual = estimate(*jax.device_put(ARGS, NamedSharding(mesh, P("data"))))
    assert_close(actual, estimate(*ARGS))
    assert len(actual[0].sharding.device_set) == 8


def test_no_gradient_through_advantages():
    grads = jax.grad(lambda r, v: sum(x.sum() for x in gae(r, v, ARGS[2], gamma=0.9, lam=0.8)), argnums=(0, 1))
    assert not any(np.any(grad) for grad in grads(*ARGS[:2]))
    rewards = jnp.arange(6.0)
    assert not np.any(jax.grad(lambda r: (r * 0 + leave_one_out_advantages(r, group_size=3)).sum())(rewards))
    weights = jnp.arange(6.0)
    scaled = jax.grad(lambda r: (weights * group_advantages(r, group_size=3, scale_by_std=True)).sum())
    assert not np.any(scaled(rewards))


def test_groups_by_hand():
    rewards = jnp.asarray([1.0, 3.0, 0.0, 8.0])
    assert_allclose(group_advantages(rewards, group_size=2, scale_by_std=False), [-1, 1, -4, 4])
    assert_allclose(group_advantages(rewards, group_size=2, scale_by_std=True), [-1, 1, -1, 1], rtol=2e-4)
    assert_allclose(leave_one_out_advantages(rewards, group_size=2), [-2, 2, -8, 8])
    assert_allclose(leave_one_out_advantages(jnp.asarray([0.0, 3.0, 6.0]), group_size=3), [-4.5, 0, 4.5])


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_groups_equal_the_loops(group_size):
    rewards = RNG.normal(5.0, 2.0, 12).astype(np.float32)
    for scale in (True, False):
        actual = group_advantages(jnp.asarray(rewards), group_size=group_size, scale_by_std=scale)
        assert_close(actual, oracles.group_advantages(rewards, group_size=group_size, scale_by_std=scale))
    actual = leave_one_out_advantages(jnp.asarray(rewards), group_size=group_size)
    assert_close(actual, oracles.leave_one_out_advantages(rewards, group_size=group_size))
    # r − mean of the others = G / (G − 1) · (r − mean of all).
    centred = group_advantages(jnp.asarray(rewards), group_size=group_size, scale_by_std=False)
    assert_close(actual, centred * (group_size / (group_size - 1)))


@pytest.mark.parametrize("reward", [0.1, 1000.1, -3e5 + 0.7])
@pytest.mark.parametrize("group_size", [3, 7])
def test_a_group_of_equal_rewards_gets_exactly_nothing(reward, group_size):
    rewards = jnp.full(group_size, reward, jnp.float32)
    assert_array_equal(group_advantages(rewards, group_size=group_size, scale_by_std=True), np.zeros(group_size))


def test_wrong_groups_are_errors():
    with pytest.raises(ValueError, match="5 rewards are not a whole number of groups of 2"):
        group_advantages(jnp.zeros(5), group_size=2, scale_by_std=True)
    with pytest.raises(ValueError, match="5 rewards"):
        leave_one_out_advantages(jnp.zeros(5), group_size=2)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        leave_one_out_advantages(jnp.zeros(5), group_size=1)


def test_a_running_mean_by_hand():
    advantages, baseline = running_mean_advantages(jnp.asarray([1.0, 3.0]), 1.0, decay=0.75)
    assert_allclose(advantages, [0, 2])
    assert_allclose(baseline, 0.75 * 1 + 0.25 * 2)
    # It reaches the mean of what it sees, and no gradient flows.
    for _ in range(60):
        _, baseline = running_mean_advantages(jnp.asarray([1.0, 3.0]), baseline, decay=0.75)
    assert_allclose(baseline, 2.0, rtol=1e-6)
    assert not np.any(jax.grad(lambda r: running_mean_advantages(r, 0.0, decay=0.5)[0].sum())(jnp.ones(2)))
