"""Adapters over a frozen trunk: what they change, what they leave alone, and what is trained."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from tiny import TOKENS, new_params, random_tree

from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.logprobs import sequence_logprobs
from rlhf_jax.losses import bradley_terry_loss, dpo_loss, sft_loss
from rlhf_jax.models import (
    MIXED,
    ScalarModel,
    Transformer,
    cast_frozen,
    from_language_model,
    init_lora,
    merge_lora,
    quantize_frozen,
    split_lora,
    with_dropout,
    with_lora,
)
from rlhf_jax.models.transformer import Linear
from rlhf_jax.models.weights import flat, nested
from rlhf_jax.optimizers import adamw
from rlhf_jax.sampling import generate
from rlhf_jax.scoring import response_rewards, token_scores
from rlhf_jax.train import make_state, make_train_step

CONFIG = replace(tiny.CONFIG, tie_embeddings=False)
EVERYTHING = "(query|key|value|output|gate|up|down)/kernel"


def new_adapter(params, seed=1, **options):
    """One that has been trained: B is not zero."""
    adapter = init_lora(jax.random.key(seed), params, **(dict(rank=2, alpha=3.0, targets=EVERYTHING) | options))
    b = {name: random_tree(leaf, seed, 0.3) for name, leaf in flat(adapter).items() if name.endswith("lora_b")}
    return with_lora(adapter, nested(b))


@partial(jax.jit, static_argnums=0)
def forward(config, params):
    return Transformer(config).apply({"params": params}, TOKENS)


@pytest.fixture(scope="module")
def params():
    return new_params(CONFIG)


def test_a_new_adapter_leaves_the_logits_as_they_are_to_the_bit(params):
    adapter = init_lora(jax.random.key(0), params, rank=2, alpha=4.0, targets=EVERYTHING)
    assert len(flat(adapter)) == 3 * 7 * 2
    assert_array_equal(forward(CONFIG, with_lora(params, adapter)), forward(CONFIG, params))


def test_what_it_computes_is_the_kernel_plus_s_times_a_b(params):
    adapter = new_adapter(params, targets="layer_1/down")
    assert set(flat(adapter)) == {f"layer_1/down/{leaf}" for leaf in ("lora_a", "lora_b", "lora_scale")}
    leaves, ours = flat(params), flat(adapter)
    a, b = (np.asarray(ours[f"layer_1/down/lora_{x}"], np.float64) for x in "ab")
    kernel = np.asarray(leaves["layer_1/down/kernel"], np.float64) + 3.0 / 2 * a @ b
    expected = nested(leaves | {"layer_1/down/kernel": jnp.asarray(kernel, jnp.float32)})
    got = forward(CONFIG, with_lora(params, adapter))
    assert_allclose(got, forward(CONFIG, expected), atol=1e-5)
    assert np.abs(got - forward(CONFIG, params)).max() > 0.1


def test_the_trunk_is_not_copied_and_comes_apart_again(params):
    adapter = new_adapter(params)
    both = with_lora(params, adapter)
    leaves = flat(both)
    assert all(leaves[name] is leaf for name, leaf in (flat(params) | flat(adapter)).items())
    trunk, own = split_lora(both)
    assert flat(trunk) == flat(params) and flat(own) == flat(adapter)
    assert with_lora(params, {}) == params and with_lora({}, params) == params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_equals_unmerged(scan, rank_stabilized):
    config = replace(CONFIG, scan_layers=scan)
    params = new_params(config)
    both = with_lora(params, new_adapter(params, rank_stabilized=rank_stabilized))
    merged = merge_lora(both)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    assert_allclose(forward(config, merged), forward(config, both), atol=1e-5)
    assert merge_lora(params) == params


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    params = {"layer_0": {"up": {"kernel": jnp.zeros((300, 5))}}}
    for stabilized, expected in [(False, 10 / 16), (True, 10 / 4)]:
        adapter = init_lora(jax.random.key(0), params, rank=16, alpha=10, targets="up", rank_stabilized=stabilized)
        up = adapter["layer_0"]["up"]
        assert float(up["lora_scale"]) == expected
        assert up["lora_a"].shape == (300, 16) and not up["lora_b"].any() and up["lora_b"].shape == (16, 5)
        assert_allclose(up["lora_a"].std(), 300**-0.5, rtol=0.05)


def test_scanned_layers_equal_unscanned(params):
    """A stack of the layers' adapters does what they do, in training too, where the layer is computed again."""
    adapter = new_adapter(params)
    trees = {False: (params, adapter)}

    def stacked(tree):
        rest = {name: value for name, value in tree.items() if not name.startswith("layer_")}
        return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), tree["layer_0"], tree["layer_1"])}

    trees[True] = (stacked(params), stacked(adapter))
    shapes = init_lora(jax.random.key(0), trees[True][0], rank=2, alpha=3.0, targets=EVERYTHING)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, trees[True][1])
    logits, gradients = {}, {}
    for scan, (trunk, own) in trees.items():
        config = replace(CONFIG, scan_layers=scan, remat=scan)
        logits[scan] = forward(config, with_lora(trunk, own))
        loss = lambda own, trunk, config=config: jnp.square(forward(config, with_lora(trunk, own))).mean()  # noqa: E731
        gradients[scan] = jax.grad(loss)(own, trunk)
    assert_allclose(logits[True], logits[False], atol=1e-5)
    chex.assert_trees_all_close(gradients[True], stacked(gradients[False]), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": "q_proj"}, r"targets 'q_proj' match no kernel; there are kernels such as layer_0/down/kernel"),
        ({"targets": "embedding|_norm"}, r"'embedding\|_norm' match no kernel"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
    ],
)
def test_mistakes_are_errors(params, options, message):
    with pytest.raises(ValueError, match=message) as error:
        init_lora(jax.random.key(0), params, **(dict(rank=2, alpha=1.0, targets=EVERYTHING) | options))
    assert "\n" not in str(error.value)


def test_a_scalar_head_is_no_target(params):
    scalar = from_language_model(params, jax.random.key(0), CONFIG)
    adapter = init_lora(jax.random.key(0), scalar, rank=2, alpha=1.0, targets="kernel")
    assert set(adapter) == {"trunk"}


def test_sampling_reads_the_adapter(params):
    prompts = jnp.asarray([[3, 1, 4], [2, 7, 1]])
    both = with_lora(params, new_adapter(params))
    sample = partial(
        generate, Transformer(CONFIG), prompts=prompts, prompt_mask=jnp.ones_like(prompts, bool),
        key=jax.random.key(0), max_new_tokens=6, temperature=1.0, eos_id=None, pad_id=0,
    )  # fmt: skip
    ours, merged = sample(both), sample(merge_lora(both))
    assert_array_equal(ours.tokens, merged.tokens)
    assert_allclose(ours.logprobs, merged.logprobs, atol=1e-5)
    assert not np.array_equal(ours.tokens, sample(params).tokens)


def test_dropout_leaves_out_a_share_of_what_a_reads():
    """A and B of ones on the diagonal, so that what is read comes out."""
    width, eye = 64, jnp.eye(64)
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 50, width)), jnp.float32)
    params = {"kernel": 2 * eye, "lora_a": eye, "lora_b": eye, "lora_scale": jnp.float32(10.0)}
    linear = Linear(CONFIG, width)
    out = linear.apply({"params": with_dropout(params, jax.random.key(0), rate=0.2)}, x)
    read = (np.asarray(out, np.float64) - 2 * np.asarray(x, np.float64)) / 10
    dropped = np.abs(read) < 1e-5
    assert_allclose(read, np.where(dropped, 0.0, x / 0.8), rtol=1e-5, atol=1e-5)
    # 9600 numbers: a standard deviation is 0.004.
    assert_allclose(dropped.mean(), 0.2, atol=0.016)
    assert dropped.mean(axis=(0, 1)).std() < 0.06 and dropped.mean(axis=2).std() < 0.09
    none = linear.apply({"params": with_dropout(params, jax.random.key(0), rate=0.0)}, x)
    assert_allclose(none, 12 * x, rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_every_adapter_drops_other_numbers(scan):
    params = new_params(replace(CONFIG, scan_layers=scan))
    own = {"trunk": new_adapter(params), "head": {"kernel": jnp.ones(12)}}

    def keys(key):
        leaves = flat(with_dropout(own, key, rate=0.5))
        assert set(flat(own)) < set(leaves) and not any("lora_dropout" in name for name in leaves if "head" in name)
        found = [jax.random.key_data(leaf.key) for name, leaf in leaves.items() if name.endswith("lora_dropout")]
        return {tuple(row) for leaf in found for row in np.asarray(leaf).reshape(-1, 2).tolist()}

    assert len(keys(jax.random.key(0))) == 7 * 2 == len(keys(jax.random.key(1)))
    assert keys(jax.random.key(0)) == keys(jax.random.key(0)) and not keys(jax.random.key(0)) & keys(jax.random.key(1))


def test_a_layer_computed_again_drops_the_same():
    scanned = replace(CONFIG, scan_layers=True)
    params = new_params(scanned)
    own, other = (with_dropout(new_adapter(params), jax.random.key(n), rate=0.5) for n in (0, 1))

    def loss(a, config, own):
        with_a = nested(flat(own) | {"layers/query/lora_a": a})
        return jnp.square(forward(config, with_lora(params, with_a))).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    a = own["layers"]["query"]["lora_a"]
    expected = gradient(a, scanned, own)
    assert_allclose(gradient(a, replace(scanned, remat=True), own), expected, atol=1e-5)
    assert np.abs(gradient(a, scanned, other) - expected).max() > 1e-3


def losses(params):
    """Of every stage that trains on given text: loss_fn(own, (trunk, batch)), what it trains, and its trunk."""
    model, scalar_model = Transformer(CONFIG), ScalarModel(CONFIG)

    def scores(params, batch):
        return sequence_logprobs(token_scores(model, params, batch)[0], batch.mask)

    def sft(own, batch):
        trunk, (chosen, _) = batch
        return sft_loss(token_scores(model, with_lora(trunk, own), chosen)[0], chosen.mask)

    def dpo(own, batch):
        trunk, pair = batch
        ours, reference = ([scores(p, side) for side in pair] for p in (with_lora(trunk, own), trunk))
        return dpo_loss(*ours, *reference, beta=0.5)

    def reward_model(own, batch):
        trunk, pair = batch
        return bradley_terry_loss(*(response_rewards(scalar_model, with_lora(trunk, own), side) for side in pair))

    adapter = init_lora(jax.random.key(0), params, rank=2, alpha=3.0, targets=EVERYTHING)
    head = from_language_model(params, jax.random.key(1), CONFIG)["head"]
    return {
        "sft": (sft, adapter, params),
        "dpo": (dpo, adapter, params),
        "reward_model": (reward_model, {"trunk": adapter, "head": head}, {"trunk": params}),
    }


PAIR = tuple(
    jax.tree.map(jnp.asarray, pad_sequences([([3, 4], answer), ([5], answer)], length=8, pad_id=0))
    for answer in ([5, 2], [7, 8, 2])
)


@pytest.mark.parametrize(
    "stage, freeze",
    [
        ("sft", lambda trunk: trunk), ("sft", quantize_frozen), ("dpo", quantize_frozen),
        ("reward_model", partial(cast_frozen, dtype=jnp.bfloat16)), ("reward_model", lambda trunk: trunk),
    ],
)  # fmt: skip
def test_a_step_moves_only_what_is_the_stages_own(params, stage, freeze):
    loss_fn, own, trunk = losses(params)[stage]
    trunk = freeze(trunk)
    before = jax.tree.map(np.asarray, trunk)
    state = make_state(Transformer(CONFIG), own, adamw(1e-2, weight_decay=0.1, max_grad_norm=1.0))
    trained = sum(leaf.size for leaf in jax.tree.leaves(own))
    # Two moments of each number that is trained, and counters: nothing of the trunk.
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= 2 * trained + 4
    step, losses_seen = make_train_step(loss_fn), []
    for _ in range(8):
        state, metrics = step(state, (trunk, PAIR))
        losses_seen.append(float(metrics["loss"]))
    assert losses_seen[-1] < losses_seen[0]
    chex.assert_trees_all_equal(trunk, before)
    for name, leaf in flat(state.params).items():
        moved = not np.array_equal(leaf, flat(own)[name])
        # The bias of a reward model cancels in a comparison.
        assert moved == (not name.endswith(("lora_scale", "head/bias"))), name


def test_the_reference_of_dpo_is_the_trunk(params):
    loss_fn, own, trunk = losses(params)["dpo"]
    assert_allclose(jax.jit(loss_fn)(own, (trunk, PAIR))[0], np.log(2), atol=1e-6)


def test_a_cast_trunk_keeps_its_norms_and_biases():
    config = replace(CONFIG, qkv_bias=True, norm="layer", precision=MIXED._replace(head=jnp.bfloat16))
    params = new_params(config)
    cast = cast_frozen(params, jnp.bfloat16)
    kept = {name for name, leaf in flat(cast).items() if leaf.dtype == jnp.float32}
    assert kept == {name for name in flat(params) if name.endswith(("/scale", "/bias"))}
    # Weights are read as bfloat16 anyway.
    assert_array_equal(forward(config, cast), forward(config, params))


def test_no_gradient_of_a_trunks_size_is_computed(params):
    """The compiled gradient puts out what is trained, and has less than a trunk beside it."""
    config = replace(CONFIG, vocab_size=64, d_model=128, d_ff=512, n_layers=4)
    trunk = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    own = jax.eval_shape(partial(init_lora, rank=2, alpha=1.0, targets=EVERYTHING), jax.random.key(0), trunk)

    def loss(own, trunk):
        return sft_loss(token_scores(Transformer(config), with_lora(trunk, own), PAIR[0])[0], PAIR[0].mask)[0]

    memory = jax.jit(jax.grad(loss)).lower(own, trunk).compile().memory_analysis()
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(trunk))
    assert memory.output_size_in_bytes < size / 20 and memory.temp_size_in_bytes < size / 2
