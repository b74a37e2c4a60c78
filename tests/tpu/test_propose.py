"""Proposed meshes: the equations by hand, and beside what the TPU compiler said (experiments/results/tpu.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def propose():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tpu"))
        patch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
        import propose

        yield propose
    del sys.modules["propose"]


def case(propose, experiment, **sizes):
    return propose.Config(experiment, "llama3-8b", topology="v5e:8x16", **sizes)


def sent(propose, experiment, mesh, rows, trained=8.03e9, **sizes):
    some = case(propose, experiment, **sizes)
    load = propose.Load(propose.model_config(some.model, propose.PRECISIONS[some.precision]), 8.03e9, trained)
    return propose.sent(some, load, load, mesh, rows) / 1e9


def test_what_is_sent_by_hand(propose):
    # Two gathers of the weights and a scatter of the gradients, 16 GB each but for what a chip has.
    assert sent(propose, "sft", (1, 128, 1, 1), 128) == pytest.approx(3 * 16.06 * 127 / 128)
    assert sent(propose, "sft", (1, 128, 1, 1), 128, trained=0) == pytest.approx(2 * 16.06 * 127 / 128)
    # Copies of the model add up gradients in float32, twice but for their own.
    assert sent(propose, "sft", (8, 1, 1, 1), 128) == pytest.approx(2 * 4 * 8.03 * 7 / 8)
    # 32 layers, two sums of 16,384 tokens of width 4,096 in bfloat16, forward, again, and backward.
    assert sent(propose, "sft", (8, 1, 1, 8), 128, trained=0) == pytest.approx(
        3 * 32 * 2 * 16_384 * 4_096 * 2 * 2 * 7 / 8 / 1e9
    )
    # Parts of 128 sequences, 1,024 tokens each: of 32 heads of queries, as many attended, 8 of keys and 8 of values,
    # seven eighths change places. Weights are gathered along it, too.
    alone = sent(propose, "sft", (1, 128, 1, 1), 128, trained=0)
    assert sent(propose, "sft", (1, 16, 8, 1), 128, trained=0) - alone == pytest.approx(
        3 * 32 * 1_024 * (32 + 32 + 8 + 8) * 128 * 2 * 7 / 8 / 1e9
    )


@pytest.mark.parametrize(
    "experiment, mesh, rows, compiled, within",
    [
        ("sft", (1, 128, 1, 1), 128, 49.4, 0.1),
        ("dpo", (1, 128, 1, 1), 256, 47.9, 0.1),
        ("ppo", (1, 32, 1, 4), 128, 277, 0.4),
    ],
)  # fmt: skip
def test_what_is_sent_is_about_what_the_compiler_says(propose, experiment, mesh, rows, compiled, within):
    assert sent(propose, experiment, mesh, rows) == pytest.approx(compiled, rel=within)


def test_a_smaller_reward_model_and_critic_are_sent_as_such(propose):
    """Nothing but the policy and its reference is left where the others have no weights."""
    some = case(propose, "ppo")
    config = propose.model_config("llama3-8b", propose.PRECISIONS["mixed"])
    load, none = propose.Load(config, 8.03e9, 8.03e9), propose.Load(config, 0.0, 0.0)
    mesh = (1, 128, 1, 1)
    # A gather to sample; for each of four minibatches two to score, two and a scatter to update.
    assert propose.sent(some, load, none, mesh, 128) / 1e9 == pytest.approx((1 + 4 * 5) * 16.06 * 127 / 128)
    assert propose.sent(some, load, load, mesh, 128) / 1e9 == pytest.approx((1 + 2 * 4 * 5) * 16.06 * 127 / 128)
    small = propose.model_config("qwen3-0.6b", propose.PRECISIONS["mixed"])
    assert all(s * t <= 16 for *_, s, t in propose.meshes(64, [config, small], 2, 131_072))


def test_meshes_divide_rows_and_heads(propose):
    config = propose.model_config("llama3-8b", propose.PRECISIONS["mixed"])
    found = set(propose.meshes(16, [config], 8, 1024))
    assert found == {(d, f, 1, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (2, 4, 8) if d * f * t == 16}
    long = set(propose.meshes(64, [config], 1, 131_072))
    assert long == {(1, 1, s, t) for s in (8, 16, 32) for t in (2, 4, 8) if s * t == 64 and 32 % (s * t) == 0}
    assert set(propose.meshes(64, [config], 2, 131_072)) == {
        (d, f, s, t) for d in (1, 2) for f in (1, 2) for s in (1, 2, 4, 8, 16, 32) for t in (1, 2, 4, 8)
        if d * f * s * t == 64 and d * f <= 2 and s * t <= 32
    }  # fmt: skip


def run(*flags):
    command = [sys.executable, str(ROOT / "tpu" / "propose.py"), "--experiment", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_names_the_fastest_mesh_that_fits_first():
    done = run("ppo", "--model", "llama3-8b", "--topology", "v5e:8x16", "--rows", "128")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    seconds, memory = ([float(row[place].split()[0]) for row in rows] for place in (4, 2))
    assert seconds == sorted(seconds) and max(memory) <= 16 and "tensor=8" in rows[0][1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("sft", "--model", "llama3-70b", "--topology", "v5e:2x2"), "no mesh of v5e:2x2 holds sft of llama3-70b"),
        (("sft", "--model", "llama3-8b", "--topology", "v9:4x4"), "topology 'v9:4x4' is not one of v5e, v5p, v6e"),
        (
            ("sft", "--model", "llama3-8b", "--topology", "v5e:8x8", "--rows", "3"),
            "--rows 3 and the heads of llama3-8b do not divide over v5e:8x8",
        ),
        (("sft", "--model", "llama3-8b", "--topology", "v5e:64x64"), "slices of at most 2048 chips"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, words):
    done = run(*flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
