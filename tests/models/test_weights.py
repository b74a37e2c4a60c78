"""Weights on many devices: each slice to its own, and no more on the host than must be."""

import json
import subprocess
import sys
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.models import ModelConfig, load_hf, load_hf_reward_model, save_hf, save_hf_reward_model
from rlhf_jax.models.weights import nested, param_shapes

LLAMA = ModelConfig(
    vocab_size=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=4, d_ff=32, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=False, max_length=32,
)  # fmt: skip
CONFIGS = {
    "each tensor a parameter": LLAMA,
    "side by side": replace(LLAMA, family="phi3", n_kv_heads=2),
    "head by head": replace(
        LLAMA, family="gpt_neox", norm="layer", gated_mlp=False, parallel_residual=True, activation="gelu",
        qkv_bias=True, output_bias=True, mlp_bias=True, rotary_fraction=0.5,
    ),
    "[in, out] as ours": replace(
        LLAMA, family="gpt2", norm="layer", gated_mlp=False, activation="gelu_tanh", learned_positions=True,
        qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
}  # fmt: skip


def new_params(config):
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    return nested({name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()})


def mesh():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def split_all(name):
    axes = ("tensor", "fsdp") if name.endswith(("output/kernel", "down/kernel")) else ("fsdp", "tensor")
    one_axis = name.endswith(("bias", "scale", "head/kernel")) and not name.endswith("bias/kernel")
    return NamedSharding(mesh(), PartitionSpec(("fsdp", "tensor")) if one_axis else PartitionSpec(*axes))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_device_gets_its_slice_and_none_a_whole_parameter(kind, tmp_path):
    config, params = CONFIGS[kind], new_params(CONFIGS[kind])
    save_hf(tmp_path, config, params)
    again, loaded = load_hf(tmp_path, shardings=split_all)
    assert again == config
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(params))
    for leaf in jax.tree.leaves(loaded):
        assert len(leaf.addressable_shards) == 8
        assert all(shard.data.size * 8 == leaf.size for shard in leaf.addressable_shards)


def test_shardings_may_be_a_tree_and_leave_replicas(tmp_path):
    params = new_params(LLAMA)
    save_hf(tmp_path, LLAMA, params)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh(), PartitionSpec(None)), params)
    shardings["layer_1"]["key"]["kernel"] = NamedSharding(mesh(), PartitionSpec(None, "tensor"))
    _, loaded = load_hf(tmp_path, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(params))


def test_a_sharding_that_is_missing_is_named(tmp_path):
    params = new_params(LLAMA)
    save_hf(tmp_path, LLAMA, params)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh(), PartitionSpec()), params)
    del shardings["layer_1"]["key"]
    with pytest.raises(ValueError, match="shardings have none for layer_1/key/kernel"):
        load_hf(tmp_path, shardings=shardings)


def test_a_reward_model_is_split_by_its_own_names(tmp_path):
    trunk = {name: leaf for name, leaf in new_params(LLAMA).items() if name != "head"}
    params = {"trunk": trunk, "head": {"kernel": jnp.arange(16.0), "bias": jnp.zeros(())}}
    save_hf_reward_model(tmp_path, LLAMA, params)
    asked = []

    def sharding_of(name):
        asked.append(name)
        return NamedSharding(mesh(), PartitionSpec()) if name == "head/bias" else split_all(name)

    config, loaded = load_hf_reward_model(tmp_path, shardings=sharding_of)
    assert config == LLAMA
    assert {"head/kernel", "head/bias", "trunk/embedding", "trunk/layer_1/query/kernel"} <= set(asked)
    chex.assert_trees_all_equal(jax.device_get(loaded), jax.device_get(params))
    assert all(shard.data.size == 2 for shard in loaded["head"]["kernel"].addressable_shards)


MEASURE = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec
from rlhf_jax.models import load_hf

mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
split = (lambda name: NamedSharding(mesh, PartitionSpec("fsdp"))) if sys.argv[3] == "split" else None

def peak():  # ru_maxrss would begin with that of the process that started this one
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024

load_hf(sys.argv[1], shardings=split)
before = peak()
_, params = load_hf(sys.argv[2], shardings=split)
print(json.dumps([peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params))]))
"""


@pytest.mark.parametrize("dtype, placed", [(np.float32, "split"), (jnp.bfloat16, "split"), (jnp.bfloat16, "whole")])
def test_the_host_holds_the_model_and_at_most_one_shard_more(dtype, placed, tmp_path):
    """The rise of the process's peak while nine shards are read, the last of one large tensor, after another model."""
    from safetensors.numpy import load_file, save_file

    large = replace(LLAMA, vocab_size=16384, d_model=512, d_ff=2048, n_layers=8, head_dim=128, tie_embeddings=True)
    rng = np.random.default_rng(0)
    for name, config in [("small", LLAMA), ("large", large)]:
        shapes = param_shapes(config)
        noise = rng.normal(size=max(np.prod(s) for s in shapes.values())).astype(np.float32)
        save_hf(tmp_path / name, config, nested({n: noise[: np.prod(s)].reshape(s) for n, s in shapes.items()}))
    whole = {n: t.astype(dtype) for n, t in load_file(tmp_path / "large" / "model.safetensors").items()}
    (tmp_path / "large" / "model.safetensors").unlink()
    places, largest = {}, 0
    for shard in range(9):
        names = [n for n in whole if f"layers.{shard}." in n or (shard == 8 and "layers" not in n)]
        file = f"model-{shard + 1:05}-of-00009.safetensors"
        save_file({n: whole[n] for n in names}, tmp_path / "large" / file)
        places |= dict.fromkeys(names, file)
        largest = max(largest, sum(whole[n].nbytes for n in names))
    index = tmp_path / "large" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))

    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), placed],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    grown, own = json.loads(run.stdout)
    assert own == 4 * sum(tensor.size for tensor in whole.values())
    assert own > 3 * largest
    assert 0.9 * own < grown < own + 0.6 * largest  # 1.2 would do; it is a block of 4 MiB, and noise
