"""The layout of sampling: copies of the weights along "fsdp", cut along "tensor" as far as they must be."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.meshes import collectives
from rlhf_jax.batches import Prompts
from rlhf_jax.models import MIXED, ModelConfig, Transformer, init_lora, with_lora
from rlhf_jax.sampling import generate, layout
from rlhf_jax.sampling.sampler import sample_answers
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params

CONFIG = ModelConfig(
    vocab_size=96, d_model=16, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=4, d_ff=32, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32, precision=MIXED,
)  # fmt: skip
PROMPTS = np.random.default_rng(0).integers(1, 96, (8, 5)).astype(np.int32)


def weights(config):
    return Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def adapted(params):
    own = init_lora(jax.random.key(2), params, rank=2, alpha=4.0, targets="query|down")
    return with_lora(params, jax.tree.map(lambda x: x + 0.1, own))


def answers(config, params, **numbers):
    tokens = shard_batch(jnp.asarray(PROMPTS))
    return generate(
        Transformer(config), params, tokens, tokens > 0, jax.random.key(1), temperature=1.0, eos_id=-1, pad_id=0,
        **numbers,
    )  # fmt: skip


@pytest.mark.parametrize(
    "mesh, kind, gigabytes, expected",
    [
        ("fsdp=4,tensor=2", "cpu", 1000, (4, 1, 1, 2)),  # nobody tells the memory
        ("data=2,fsdp=2,tensor=2", "TPU v5 lite", 1, (4, 1, 1, 2)),
        ("fsdp=8", "TPU v5 lite", 16, (2, 1, 1, 4)),
        ("fsdp=2,sequence=4", "TPU v5 lite", 16, (2, 1, 1, 4)),
        ("fsdp=8", "TPU v5", 16, (8, 1, 1, 1)),
        ("fsdp=8", "TPU v5 lite", 500, (2, 1, 1, 4)),  # four heads of keys
    ],
)
def test_a_copy_takes_a_part_of_a_device(monkeypatch, mesh, kind, gigabytes, expected):
    monkeypatch.setattr(layout, "device_memory", lambda mesh: layout.MEMORY.get(kind))
    found = layout.sampling_mesh(make_mesh(mesh).abstract_mesh, CONFIG, 1e9 * gigabytes)
    assert found.axis_sizes == expected and found.axis_names == ("data", "fsdp", "sequence", "tensor")


@pytest.mark.parametrize(
    "mesh, scan, adapters",
    [
        ("fsdp=8", True, False), ("fsdp=8", True, True), ("fsdp=8", False, False), ("fsdp=8", False, True),
        ("data=4,fsdp=2", True, False), ("fsdp=2,sequence=4", True, True),
    ],
)  # fmt: skip
def test_answers_on_a_mesh_of_another_shape_are_those_of_one_device(monkeypatch, mesh, scan, adapters):
    config = replace(CONFIG, scan_layers=scan, precision=CONFIG.precision._replace(compute=jnp.float32))
    params = weights(config)
    if adapters:
        params = adapted(params)
    expected = answers(config, params, max_new_tokens=6)
    monkeypatch.setattr(layout, "device_memory", lambda mesh: 1.0)  # so that "fsdp" becomes "tensor" as far as it may
    with jax.set_mesh(make_mesh(mesh)):
        found = answers(config, shard_params(params), max_new_tokens=6)
        assert found.tokens.sharding.mesh.shape == make_mesh(mesh).shape  # it comes back on the mesh that is set
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=2e-5)


def test_on_a_mesh_and_in_larger_batches_each_prompt_is_given_the_answers_of_one_device():
    config = replace(CONFIG, precision=CONFIG.precision._replace(compute=jnp.float32))
    params, prompts = weights(config), Prompts(PROMPTS, PROMPTS > 0, np.arange(8))

    def drawn(batch_size):
        return sample_answers(
            Transformer(config), params, prompts, jax.random.key(1), answers=3, max_new_tokens=6, temperature=1.0,
            eos_id=-1, pad_id=0, batch_size=batch_size,
        ).tokens  # fmt: skip

    expected = drawn(4)
    with jax.set_mesh(make_mesh("data=2,fsdp=4")):
        params = shard_params(params)
        np.testing.assert_array_equal(drawn(16), expected)


def test_on_the_way_to_another_shape_no_weight_is_whole(monkeypatch):
    config = replace(CONFIG, scan_layers=True)
    monkeypatch.setattr(layout, "device_memory", lambda mesh: 1.0)
    with jax.set_mesh(make_mesh("fsdp=8")):
        params = shard_params(weights(config))
        program = jax.jit(lambda params: answers(config, params, max_new_tokens=5)).lower(params).compile().as_text()
    shapes = [shape for kind, shapes, _ in collectives(program) for shape in shapes if kind == "all-gather"]
    gathered = {tuple(sorted(shape)) for shape in shapes if len(shape) == 3}  # of two layers
    assert gathered == {tuple(sorted(shape)) for shape in [(2, 16, 8), (2, 16, 4), (2, 8, 16)]}  # a fourth of each
    assert any(kind == "all-to-all" for kind, _, _ in collectives(program))


def test_weights_never_become_wider():
    config = replace(CONFIG, precision=CONFIG.precision._replace(compute=jnp.float32))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(layout.as_computed(config, narrow))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_as_computed_change_no_number(tied):
    config = replace(CONFIG, tie_embeddings=tied)
    params = jax.tree.map(lambda x: x + 0.01, adapted(weights(config)))  # numbers that bfloat16 does not have
    rounded = layout.as_computed(config, params)
    chex.assert_trees_all_equal(
        *(Transformer(config).apply({"params": some}, jnp.asarray(PROMPTS)) for some in (params, rounded))
    )
    dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(rounded)}
    halved = {name for name, dtype in dtypes.items() if dtype == jnp.bfloat16}
    assert any("kernel" in name for name in halved) and not any("lora" in name or "scale" in name for name in halved)
    assert ("['embedding']" in halved) == (not tied)  # a tied one is the head, which is read in float32
