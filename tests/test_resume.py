"""A run that is killed again and again is, to the bit, the run that was not."""

import json
import os
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import CLOCKS

# Forked before JAX has a backend, so that a life costs no imports.
KILLS = """
import os, random, signal, sys, time
from dataclasses import dataclass
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint
from flax.training.train_state import TrainState
from rlhf_jax.log import Run
from rlhf_jax.trackers import torch_hidden
from rlhf_jax.train import make_train_step

with torch_hidden():
    import tensorboardX

STEPS, ROWS = 300, 24
tx = optax.adam(1e-2)

@dataclass(frozen=True)
class Config:
    name: str = "kills"

def train(folder, resume, begun):
    params = {"w": jnp.ones((32, 32))}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step_fn = make_train_step(lambda p, x: (jnp.mean((x @ p["w"] - x[:, ::-1]) ** 2), {"first_row": x[0, 0]}))
    data = np.random.default_rng(0).normal(size=(ROWS, 32)).astype(np.float32)
    with Run(folder, Config(), name="test", resume=resume) as run:
        state, first = run.restore("sft", state)
        step_fn.lower(state, data[:4]).compile()
        os.write(begun, b"x")
        for step in run.progress("sft", range(first, STEPS)):
            epoch, at = divmod(step, ROWS // 4)
            order = np.random.default_rng([1, epoch]).permutation(ROWS)
            state, metrics = step_fn(state, data[order[4 * at : 4 * at + 4]])
            run.log("sft", step + 1, metrics)
            if (step + 1) % 3 == 0 or step + 1 == STEPS:
                run.save("sft", step + 1, state, keep=2, metric=-float(metrics["loss"]))

def life(folder, resume, seconds):
    read, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            train(folder, resume, begun)
            code = 0
        finally:
            os._exit(code)
    os.close(begun)
    os.read(read, 1)
    os.close(read)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

straight, killed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert life(straight, False, None) == 0
rng = random.Random(0)
for number in range(kills):
    assert life(killed, number > 0, rng.uniform(0, 0.1)) == -signal.SIGKILL
assert life(killed, True, None) == 0
"""


def metrics_without_clocks(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def test_twenty_kills_change_nothing(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    # The lives share their compiled programs, however small: in a folder of their own, for a kill may cut one short.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLS, straight, killed, "20"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = [checkpoint.inspect(folder, "sft", 300) for folder in (straight, killed)]
    assert last[0].sha256 == last[1].sha256 and last[0].sha256.keys() == {"params", "opt_state", "rest"}
    rows = [metrics_without_clocks(folder) for folder in (straight, killed)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[1]] == list(range(1, 301))
    names = [sorted(path.name for path in (folder / "checkpoints" / "sft").iterdir()) for folder in (straight, killed)]
    assert names[0] == names[1] and {"297", "300"} <= set(names[0]) and len(names[0]) <= 3


def save(folder, step, *, keep=None, metric=None):
    checkpoint.save(folder, "sft", step, {"w": jnp.full(3, step)}, keep=keep, metric=metric)


def kept(folder):
    return sorted(one.step for one in checkpoint.checkpoints(folder))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: None, 4: float("nan"), 5: 0.9, 6: 0.2, 7: 0.1, 8: None}
    for step, metric in metrics.items():
        save(tmp_path, step, keep=2, metric=metric)
    assert kept(tmp_path) == [5, 7, 8]
    save(tmp_path, 6, keep=1)  # gone back to: later ones are not its to delete
    assert kept(tmp_path) == [5, 6, 7, 8]
    assert checkpoint.latest(tmp_path, "sft") == 8 and checkpoint.latest(tmp_path, "sft", before=6) == 5


def test_a_damaged_one_is_never_deleted(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "sft" / "1" / "manifest.json").write_text("{}")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1)
    assert kept(tmp_path) == [1, 4]


@pytest.mark.parametrize("how", ["truncated", "altered", "removed", "a folder instead"])
def test_damage_to_any_file_is_found(tmp_path, how):
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = tmp_path / "checkpoints" / "sft" / "2"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        if how == "truncated" and not before:
            continue
        if how == "truncated":
            path.write_bytes(before[: len(before) // 2])
        elif how == "altered":
            path.write_bytes(before[: len(before) // 2] + b"?" + before[len(before) // 2 + 1 :])
        else:
            path.unlink()
        if how == "a folder instead":
            path.mkdir()
        found = checkpoint.inspect(tmp_path, "sft", 2)
        assert found.damage is not None and path.name in found.damage
        assert checkpoint.latest(tmp_path, "sft") == 1
        if how == "a folder instead":
            path.rmdir()
        path.write_bytes(before)
        assert checkpoint.inspect(tmp_path, "sft", 2).damage is None


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    """It is written while the next step already changes the buffers that it was in."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    writer = checkpoint.Writer(tmp_path)
    state = jnp.zeros(1 << 20)
    for number in range(4):
        writer.save("sft", number, {"w": state})
        for _ in range(5):
            state = step(state)
    writer.close()
    for number in range(4):
        restored = checkpoint.restore(tmp_path, "sft", number, like={"w": jnp.zeros(1 << 20)})["w"]
        np.testing.assert_array_equal(restored, 5 * number)


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    waited = checkpoint.files_in

    def slow(folder):
        time.sleep(0.5)
        return waited(folder)

    monkeypatch.setattr(checkpoint, "files_in", slow)
    writer = checkpoint.Writer(tmp_path)
    began = time.perf_counter()
    writer.save("sft", 1, {"w": np.zeros(3)})
    assert time.perf_counter() - began < 0.4
    writer.save("sft", 2, {"w": np.zeros(3)})  # one at a time
    assert time.perf_counter() - began > 0.5
    writer.close()
    assert checkpoint.latest(tmp_path, "sft") == 2


def test_no_room_is_one_line_and_leaves_what_is_there(tmp_path):
    """The system itself refuses to let a file grow, as a full disk does."""
    w = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    checkpoint.save(tmp_path, "sft", 1, {"w": w})
    writer = checkpoint.Writer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        writer.save("sft", 2, {"w": w + 1})
        with pytest.raises(UserError, match=r"sft/2 was not written: File too large; those before it are whole"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "checkpoints" / "sft") == ["1"]
    writer.save("sft", 2, {"w": w + 1})  # there is room again
    writer.close()
    assert [one.damage for one in checkpoint.checkpoints(tmp_path)] == [None, None]


AT = {
    "while it is deleted": "checkpoint.shutil.rmtree = die",
    "before it is renamed": "checkpoint._to_disk = die",
    "before others are deleted": "checkpoint._delete_older = die",
}


@pytest.mark.parametrize("moment", AT)
def test_a_kill_at_each_moment_of_a_save_leaves_whole_ones_only(tmp_path, moment):
    save(tmp_path, 1)
    save(tmp_path, 2)
    program = f"""
import os, signal, sys, numpy as np
from rlhf_jax import checkpoint
def die(path, *_, **__):
    if path.exists():
        os.kill(os.getpid(), signal.SIGKILL)
{AT[moment]}
checkpoint.save(sys.argv[1], "sft", 3, {{"w": np.full(3, 3)}}, keep=1)
"""
    assert subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True).returncode == -9
    expected = {"while it is deleted": [2, 3], "before it is renamed": [1, 2], "before others are deleted": [1, 2, 3]}
    assert kept(tmp_path) == expected[moment]
    assert all(one.damage is None for one in checkpoint.checkpoints(tmp_path))
    save(tmp_path, 4, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints" / "sft").iterdir()] == ["4"]
