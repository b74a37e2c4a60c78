"""The ahead-of-time compile: what it reads from a program, its shapes, and one small run with the real compiler."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import MIXED, Transformer, count_weights
from rlhf_jax.sampling.queue import DECODE, REFILL
from rlhf_jax.scoring import HEAD_COLUMNS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tpu"))
import hlo  # noqa: E402

from experiments.bench.programs import Program  # noqa: E402
from experiments.bench.shapes import model_config  # noqa: E402

PROGRAM = """HloModule step

%less (p: (s32[], f32[8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}

%ended (p: (s32[], f32[8])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%start (a: bf16[4,8]) -> bf16[16,8] {
  ROOT %g = bf16[16,8]{1,0} all-gather(%a), channel_id=1, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
}

%all-reduce-scatter.1 (a: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%a), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r), dynamic_slice_sizes={4}
}

%beside (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %step = bf16[16,8] fusion(%x), kind=kCustom, calls=%start
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = bf16[16,8] fusion(%x), kind=kCustom, calls=%start
  %other = (s32[], f32[8]) while(%t), condition=%less, body=%beside
  %again = bf16[16,8] fusion(%x), kind=kCustom, calls=%start
  %rs = f32[4] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

%sample (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = f32[10]{0} all-reduce(%z), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%less, body=%body
  %v = (s32[], f32[8]) while(%t), condition=%ended, body=%sample, metadata={op_name="jit(generate)/while"}
  %c = f32[6]{0} collective-permute(%a), channel_id=4, source_target_pairs={{0,1}}
}
"""


def test_what_is_sent_by_hand():
    """A gather in steps of one channel counts once, also with steps in a loop of other work; a loop as often as it
    turns; each ring by its equation."""
    found = hlo.sent(PROGRAM, otherwise=lambda loop: 7 if "generate" in loop else 1000)
    assert found.times == {"all-gather": 5, "reduce-scatter": 5, "all-reduce": 7, "collective-permute": 1}
    assert found.bytes == {
        "all-gather": 5 * 16 * 8 * 2 * 3 // 4,  # three quarters come from the three others
        "reduce-scatter": 5 * 16 * 4 * 3 // 4,
        "all-reduce": 7 * 10 * 4 * 2 // 2,  # twice what is not one's own of two halves
        "collective-permute": 6 * 4,
    }


@pytest.mark.parametrize(
    "groups, chips",
    [
        ("{{0,1,2},{3,4,5}}", 3), ("[2,4]<=[8]", 4), ("mesh['x'=4,'y'=2] {'x'}", 4),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8), ("mesh['x'=1,'y'=4,'z'=2], device_ids=([4,2]T(1,0)) {'y'}", 4),
    ],
)  # fmt: skip
def test_chips_that_take_part_together(groups, chips):
    assert hlo.chips_of(f"%a), channel_id=1, replica_groups={groups}, use_global_device_ids=true") == chips


def test_a_collective_whose_chips_are_not_said_is_an_error():
    with pytest.raises(ValueError, match="no replica_groups"):
        hlo.received("all-gather", "f32[8]", "%a), dimensions={0}")


@pytest.mark.parametrize(
    "name, published",  # parameters as the checkpoints have them, tied embeddings once
    [
        ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512),
        ("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360), ("qwen3-32b", 32_762_123_264), ("gemma3-1b", 999_885_952),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name, published):
    model = Transformer(model_config(name, MIXED))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    assert count_weights(shapes) == published


@pytest.fixture(scope="module")
def environment():
    """With libtpu; CI has it in a folder of its own, away from all other tests."""
    folder = os.environ.get("LIBTPU_FOLDER")
    if folder is None and importlib.util.find_spec("libtpu") is None:
        message = "libtpu is not installed: pip install -e '.[tpu]', or leave the ahead-of-time compile out"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    paths = [str(ROOT), *filter(None, [folder, os.environ.get("PYTHONPATH")])]
    # The compiler does all that it does for a user: tests/conftest.py has told that of this process to hurry.
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": ""}


def compile_for_tpu(environment, *flags):
    command = [
        sys.executable,
        str(ROOT / "tpu" / "compile.py"),
        "--experiment",
        "sft",
        "--model",
        "qwen3-0.6b",
        *flags,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_a_small_one_with_the_real_compiler(environment):
    done = compile_for_tpu(
        environment, "--topology", "v5e:2x2", "--rows", "4", "--prompt", "64", "--response", "64", "--lora-rank", "4"
    )
    assert done.returncode == 0, done.stderr
    assert "'fsdp': 4" in done.stdout
    # The frozen trunk in bfloat16, a quarter on each chip, and little else.
    arguments = float(re.search(r"arguments ([\d.]+)", done.stdout)[1])
    assert 2 * 0.596 / 4 < arguments < 2 * 0.596 / 4 + 0.05
    # Each layer's weights are gathered at least twice: forward and backward.
    assert int(re.search(r"all-gather: (\d+) times", done.stdout)[1]) >= 2 * 28


def test_a_mesh_may_cut_a_slices_own_axes(environment):
    """8 × 8 of 4 × 4 × 4: by itself jax.make_mesh refuses."""
    code = """
from jax.experimental import topologies
from rlhf_jax.sharding import make_mesh
slice = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
mesh = make_mesh("fsdp=8,sequence=8", devices=slice.devices)
print(len(set(mesh.devices.flat)), mesh.devices.shape)
"""
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": ""}
    settings |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | settings, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "64 (1, 8, 8, 1)", done.stderr


def test_loops_of_the_samplers_turn_as_often_as_answers_of_full_length_need(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    turns, program = importlib.import_module("compile").turns, Program(None, (), 0.0, decoding_steps=24, refills=6)
    loops = {
        "jit(step)/while": 3, "jit(_generate)/while": 8, "jit(_generate_queued)/while": 6,
        f"jit(_generate_queued)/while/body/{REFILL}/while": 1, f"jit(_generate_queued)/while/body/{DECODE}/while": 4,
    }  # fmt: skip
    assert {loop: turns(program, 8, 3 * HEAD_COLUMNS, loop) for loop in loops} == loops


def test_a_mistake_is_one_line(environment):
    done = compile_for_tpu(environment, "--topology", "v5e:2x2", "--mesh", "fsdp=3")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "mesh 'fsdp=3' is for 3 devices" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"topology": "v9:2x2"}, "topology 'v9:2x2' does not begin with one of v5e, v5p, v6e"),
        ({"model": "gpt-5"}, "model 'gpt-5' is not one of llama3-8b"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_compiled(monkeypatch, flags, message):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = importlib.import_module("compile").Config
    with pytest.raises(UserError, match=re.escape(message)):
        config(**{"experiment": "sft", "model": "llama3-8b", "topology": "v5e:2x2"} | flags)


@pytest.mark.parametrize(
    "said, told",
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.15G of 15.75G hbm. Exceeded", "20.15GB of the 15.75GB a chip"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.85G) "
            "exceeds available HBM (15.75G).",
            "33.85GB of the 15.75GB a chip",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_helps(monkeypatch, said, told):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    module = importlib.import_module("compile")
    error = module.too_large(module.Config(experiment="ppo", model="llama3-8b", topology="v5e:2x2"), said)
    assert told in str(error)
    assert "--lora-rank" in str(error)
