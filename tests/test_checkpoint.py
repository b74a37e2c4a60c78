import json
import os
import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import checkpoint
from rlhf_jax.compiled import count_compilations
from rlhf_jax.errors import UserError
from rlhf_jax.log import _given_up


class State(NamedTuple):
    policy: TrainState
    critic: TrainState
    key: jax.Array
    beta: jax.Array
    row: int
    order: np.ndarray


def train_state(offset, tx=None):
    params = {"w": jnp.arange(32.0).reshape(8, 4) + offset, "half": jnp.full(3, offset, jnp.bfloat16)}
    return TrainState.create(apply_fn=len, params=params, tx=tx or optax.adam(0.1))


def make(offset=1.0, row=5):
    key = jax.random.split(jax.random.key(int(offset)), 3)
    order = np.arange(4) + int(offset)
    return State(train_state(offset), train_state(offset + 1), key, jnp.float32(offset), row, order)


def step(state):
    grads = jax.tree.map(jnp.ones_like, state.policy.params)
    return state._replace(policy=state.policy.apply_gradients(grads=grads))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if checkpoint._is_key(b):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_comes_back_bit_for_bit_and_as_what_it_was(tmp_path):
    tx = optax.adam(0.1)
    state = step(make()._replace(policy=train_state(1.0, tx)))
    checkpoint.save(tmp_path, "ppo", 7, state)
    like = make(9.0, row=0)._replace(policy=train_state(9.0, tx))
    like = like._replace(critic=like.critic.replace(tx=state.critic.tx))
    restored = checkpoint.restore(tmp_path, "ppo", like=like)
    assert_same(restored, state)
    assert type(restored.row) is int and restored.row == 5
    assert type(restored.order) is np.ndarray
    # The generator goes on where it stood.
    assert jax.random.uniform(restored.key[0]) == jax.random.uniform(state.key[0])
    assert_same(step(restored), step(state))


def test_a_counter_that_went_through_jit_is_restored_into_a_fresh_state(tmp_path):
    trained = jax.jit(lambda s: s.replace(step=s.step + 3))(train_state(1.0))
    assert isinstance(trained.step, jax.Array)
    checkpoint.save(tmp_path, "sft", 3, trained)
    assert checkpoint.restore(tmp_path, "sft", like=train_state(0.0)).step == 3


def test_restored_arrays_can_be_donated(tmp_path):
    checkpoint.save(tmp_path, "sft", 1, train_state(1.0).params)
    restored = checkpoint.restore(tmp_path, "sft", like=train_state(0.0).params)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(restored)
    assert restored["w"].is_deleted()


@pytest.mark.parametrize(
    ("make_leaf", "give_up"),
    [
        (lambda: jnp.arange(3), lambda leaf: leaf),
        (lambda: jnp.arange(3), _given_up),
        (lambda: jax.random.split(jax.random.key(0), 3), lambda leaf: leaf),
    ],
    ids=["an array", "an array given up", "keys"],
)
def test_no_step_is_compiled_again_for_what_was_restored(tmp_path, make_leaf, give_up):
    """To jit, an array that is bound to its device is another argument, and what it then returns yet another."""
    advance = jax.jit(lambda leaf: leaf[::-1])
    with count_compilations() as compilations:
        leaf = advance(make_leaf())
        checkpoint.save(tmp_path, "sft", 1, leaf)
        restored = checkpoint.restore(tmp_path, "sft", like=give_up(leaf))
        before = compilations()
        again = advance(advance(restored))
        assert compilations() == before
    assert_same(again, advance(make_leaf()))


def placed(devices, value):
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.device_put(value, NamedSharding(mesh, P("fsdp")))


@pytest.mark.parametrize(("devices", "others"), [(8, 8), (8, 4), (8, 1), (4, 8), (1, 8)])
def test_saved_on_some_devices_restored_on_others(tmp_path, devices, others):
    """Each device gets its part, whatever was saved; the step it is given to reuses the memory."""
    assert len(jax.devices()) == 8
    value = np.arange(8 * 4096.0, dtype=np.float32).reshape(8, 4096)
    checkpoint.save(tmp_path, "sft", 1, {"w": placed(devices, value)})
    like = {"w": placed(others, np.zeros_like(value))}
    abstract = {"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=like["w"].sharding)}
    for target in (like, abstract):
        restored = checkpoint.restore(tmp_path, "sft", like=target)["w"]
        assert restored.sharding == like["w"].sharding
        assert {shard.data.shape for shard in restored.addressable_shards} == {(8 // others, 4096)}
        np.testing.assert_array_equal(restored, value)
    restored = checkpoint.restore(tmp_path, "sft", like=like)["w"]
    before = [shard.data.unsafe_buffer_pointer() for shard in restored.addressable_shards]
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(restored)
    assert [shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards] == before


def test_the_hash_is_of_the_content(tmp_path):
    def digests(number, state):
        checkpoint.save(tmp_path, "sft", number, state)
        return checkpoint.inspect(tmp_path, "sft", number).sha256

    state = make()
    first = digests(1, state)
    assert first.keys() == {"params", "opt_state", "rest"}
    assert digests(2, state) == first
    sharded = state._replace(beta=jax.device_put(state.beta, jax.devices()[0]))
    assert digests(3, sharded) == first
    other = digests(4, state._replace(row=6))
    assert other["rest"] != first["rest"] and other["params"] == first["params"]
    moved = digests(5, step(state))
    assert moved["params"] != first["params"] and moved["opt_state"] != first["opt_state"]


def biggest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = biggest(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path.name


def alter(folder):
    path = biggest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.name


def remove(folder):
    path = biggest(folder)
    path.unlink()
    return path.name


def alter_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"data_position"', '"data-position"'))
    return "manifest.json"


def change_hash(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["content"]["sha256"]["params"] = "0" * 64
    path.write_text(json.dumps(manifest))
    return "manifest.json was altered"


def truncate_manifest(folder):
    os.truncate(folder / "manifest.json", 100)
    return "manifest.json cannot be read"


def remove_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json is missing"


DAMAGES = [truncate, alter, remove, alter_manifest, change_hash, truncate_manifest, remove_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path, capsys, damage):
    for number in (9, 10):
        checkpoint.save(tmp_path, "sft", number, {"params": {"w": jnp.arange(600.0) + number}})
    assert checkpoint.latest(tmp_path, "sft") == 10
    what = damage(tmp_path / "checkpoints" / "sft" / "10")
    assert checkpoint.latest(tmp_path, "sft") == 9
    like = {"params": {"w": jnp.zeros(600)}}
    assert checkpoint.restore(tmp_path, "sft", like=like)["params"]["w"][0] == 9
    with pytest.raises(UserError, match="sft/10 is damaged: .*" + what):
        checkpoint.restore(tmp_path, "sft", 10, like=like)
    assert checkpoint.main([str(tmp_path)]) == 1
    whole, damaged = capsys.readouterr().out.splitlines()[1:]
    assert " whole " in whole and " damaged " in damaged and what in damaged


def test_the_listing(tmp_path, capsys):
    checkpoint.save(tmp_path, "sft", 20, make())
    checkpoint.save(tmp_path, "reward_model", 100, make(2.0), data_position={"epoch": 1, "row": 64})
    checkpoint.save(tmp_path, "reward_model", 20, make(3.0))
    assert checkpoint.main([str(tmp_path)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "step", "state", "parameters", "optimiser", "data", "position"]
    assert [row.split()[:3] for row in rows] == [
        ["sft", "20", "whole"], ["reward_model", "20", "whole"], ["reward_model", "100", "whole"],
    ]  # fmt: skip
    assert checkpoint.inspect(tmp_path, "sft", 20).sha256["params"][:12] in rows[0]
    assert rows[0].endswith("step 20") and rows[2].endswith("epoch 1, row 64")


def test_faults_of_the_command_are_one_line(tmp_path, capsys):
    for arguments, message in [
        ([str(tmp_path / "no")], "no checkpoints in"),
        ([], "usage"),
        (["-x"], "usage"),
    ]:
        assert checkpoint.main(arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path):
    checkpoint.save(tmp_path, "sft", 1, {"w": jnp.zeros(3), "b": jnp.zeros(2)})
    for like, message in [
        ({"w": jnp.zeros(3)}, "unexpected b"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(2), "c": 1}, "has no c"),
        ({"w": jnp.zeros(4), "b": jnp.zeros(2)}, r"w as float32\(3,\), not float32\(4,\)"),
        ({"w": jnp.zeros(3, jnp.int32), "b": jnp.zeros(2)}, r"w as float32\(3,\), not int32\(3,\)"),
    ]:
        with pytest.raises(UserError, match=message):
            checkpoint.restore(tmp_path, "sft", like=like)
    checkpoint.save(tmp_path, "apart", 1, {"layer_0": {"w": jnp.zeros(3)}})
    with pytest.raises(UserError, match=r"unexpected layer_0\.w.*--scan-layers otherwise than now"):
        checkpoint.restore(tmp_path, "apart", like={"layers": {"w": jnp.zeros((1, 3))}})
    with pytest.raises(UserError, match="no whole checkpoint of ppo"):
        checkpoint.restore(tmp_path, "ppo", like={})
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.restore(tmp_path, "sft", 2, like={})


def test_saving_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, "sft", 1, {"w": jnp.full(3, value)})
    assert checkpoint.restore(tmp_path, "sft", like={"w": jnp.zeros(3)})["w"][0] == 2.0
    assert [path.name for path in (tmp_path / "checkpoints" / "sft").iterdir()] == ["1"]


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from rlhf_jax import checkpoint
checkpoint.save(sys.argv[1], "sft", 1, {"w": jnp.ones(3)})
checkpoint.files_in = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], "sft", 2, {"w": jnp.ones(3)})
"""


def test_a_kill_while_writing_leaves_no_half_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [one.step for one in checkpoint.checkpoints(tmp_path)] == [1]
    checkpoint.save(tmp_path, "sft", 3, {"w": jnp.ones(3)})
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "sft").iterdir()) == ["1", "3"]
