"""The estimate of a step's memory is near the compiler's figure, and a run that has too little says so before."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import budget, loop
from rlhf_jax.batches import Tokens
from rlhf_jax.models import BFLOAT16, FLOAT32, MIXED, ModelConfig, Transformer, init_lora, with_lora
from rlhf_jax.optimizers import adafactor, adamw, muon
from rlhf_jax.sampling.generate import generate
from rlhf_jax.scoring import sft_objective
from rlhf_jax.sharding import make_mesh
from rlhf_jax.train import make_state, make_train_step

CONFIG = ModelConfig(
    vocab_size=1024, d_model=128, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384, max_length=256,
    rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True,
    scan_layers=True, remat=True,
)  # fmt: skip
ROWS, LENGTH = 4, 256


def compiled_and_estimated(config, *, lora=False, size=(ROWS, LENGTH), optimizer=adamw, accumulate=1, gradients=1):
    """Bytes of a step of SFT beside its arguments: the compiler's, and the estimate."""
    model = Transformer(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    own, frozen = (
        (init_lora(jax.random.key(1), params, rank=8, alpha=16.0, targets="kernel"), params) if lora else (params, {})
    )
    state = make_state(model, own, optimizer(1e-4, weight_decay=0.0, max_grad_norm=1.0))
    ids = jnp.ones(size, jnp.int32)
    batch = Tokens(ids, ids, ids > 0, jnp.broadcast_to(jnp.arange(size[1]), ids.shape), ids)
    counts = None if accumulate == 1 else lambda batch: {"loss": batch.mask.sum()}
    batch = batch if accumulate == 1 else jax.tree.map(lambda x: jnp.stack([x] * accumulate), batch)
    step = make_train_step(
        lambda trained, batch, frozen: sft_objective(model, with_lora(frozen, trained), batch), counts=counts
    )
    held = (state, frozen)
    needed = budget.step_memory(config, state.params, held, rows=size[0], length=size[1], gradients=gradients)
    assert needed.held == sum(leaf.nbytes for leaf in jax.tree.leaves(held) if isinstance(leaf, jax.Array))
    return step.lower(state, batch, frozen).compile().memory_analysis().temp_size_in_bytes, needed


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "precision"),
    [(adamw, 1, FLOAT32), (adamw, 2, FLOAT32), (adafactor, 1, FLOAT32), (muon, 1, FLOAT32), (adamw, 2, BFLOAT16)],
)
def test_the_estimate_is_near_the_compilers_figure_where_gradients_are_most_of_it(optimizer, accumulate, precision):
    few, gradients = (2, 16), max(accumulate, {adamw: 1, adafactor: 2, muon: 3}[optimizer])
    compiled, needed = compiled_and_estimated(
        replace(CONFIG, precision=precision), size=few, optimizer=optimizer, accumulate=accumulate, gradients=gradients
    )
    assert needed.gradients > 0.6 * needed.more
    assert 0.6 < needed.more / compiled < 1.6, (needed, compiled)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_the_estimate_is_near_the_compilers_figure(remat, lora):
    compiled, needed = compiled_and_estimated(replace(CONFIG, remat=remat), lora=lora)
    assert 0.5 < needed.more / compiled < 2, (needed, compiled)


@pytest.mark.parametrize("precision", [FLOAT32, MIXED])
def test_what_sampling_takes_is_a_copy_in_a_narrower_type_and_the_cache(precision):
    """By hand, on one device and on a mesh; and near the compiler's figure."""
    config = replace(CONFIG, precision=precision)
    model, width = Transformer(config), jnp.dtype(precision.compute).itemsize
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
    kernels = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim == 3)
    others = sum(leaf.size for leaf in jax.tree.leaves(shapes) if leaf.ndim < 3)
    cache, copy = 2 * 6 * 2 * 32 * width * 8 * 96, width * kernels + 4 * others
    alone = budget.sampling_memory(config, shapes, rows=8, length=96)
    narrower = width * kernels if width < 4 else 0
    assert alone == cache + narrower
    # Nothing moves along "data" and "tensor"; along "fsdp" all is gathered. Two heads of keys are not four.
    expected = {
        "data=8": cache / 8 + narrower, "data=4,tensor=2": cache / 8 + narrower / 2,
        "data=2,fsdp=4": cache / 8 + copy, "data=2,tensor=4": cache / 2 + narrower / 4,
    }  # fmt: skip
    for mesh, size in expected.items():
        with jax.set_mesh(make_mesh(mesh)):
            assert budget.sampling_memory(config, shapes, rows=8, length=96) == size
    prompts = jnp.ones((8, 32), jnp.int32)
    sample = partial(generate, model, max_new_tokens=64, temperature=1.0, eos_id=-1, pad_id=0)
    compiled = jax.jit(sample).lower(shapes, prompts, prompts > 0, jax.random.key(0)).compile().memory_analysis()
    if precision is FLOAT32:  # CPUs have no products in bfloat16, and copy both factors
        assert 0.5 < alone / compiled.temp_size_in_bytes < 1.5


def test_a_stage_that_samples_more_than_it_learns_says_so(monkeypatch):
    monkeypatch.setattr(loop, "free_memory", lambda: 1e6)
    stage, x = bare_loop(), jnp.ones((10, 10))
    stage.run, stage.stage = Said(), "ppo"
    shapes = jax.eval_shape(
        lambda: Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    )
    stage.say_memory(CONFIG, x, x, (1, 256), adapters=True, sampled=(shapes, 1000, "--responses"))
    (line,) = stage.run.warned
    cache = 2 * 6 * 2 * 32 * 4 * 1000 * 256 / 1e9
    assert f"a step takes about {cache:.2f} GB more" in line and line.endswith(
        "a smaller --responses, a smaller --max-new-tokens would help"
    )


def test_a_sequence_that_is_cut_takes_its_part():
    """Of activations; the head holds as many columns at once as without."""
    some = [budget.step_memory(replace(CONFIG, vocab_size=1), {}, (), rows=1, length=256).activations]
    with jax.set_mesh(make_mesh("sequence=8")):
        some.append(budget.step_memory(replace(CONFIG, vocab_size=1), {}, (), rows=1, length=256).activations)
    assert some[0] / some[1] == pytest.approx(8, rel=0.01)


def test_shared_arrays_count_once():
    x = jnp.ones((3, 5))
    assert budget.device_bytes([x, {"again": x}, np.ones(7), jax.random.key(0)]) == 60


class Said:
    def __init__(self):
        self.said, self.warned = [], []

    def say(self, line):
        self.said.append(line)

    def warn(self, line):
        self.warned.append(line)


def bare_loop():
    found = loop.Loop.__new__(loop.Loop)
    found._gradients = 1
    return found


@pytest.mark.parametrize(
    ("config", "rows", "adapters", "flags"),
    [
        (replace(CONFIG, remat=False), 8, False, "--remat True, a larger --accumulate, --lora-rank 16 would help"),
        (CONFIG, 1, True, "a smaller --max-length would help"),
    ],
)
def test_a_step_that_does_not_fit_names_the_flags(monkeypatch, config, rows, adapters, flags):
    monkeypatch.setattr(loop, "free_memory", lambda: 1e6)
    stage, x = bare_loop(), jnp.ones((10, 10))
    stage.run, stage.stage = Said(), "sft"
    stage.say_memory(config, x, x, (rows, 256), adapters=adapters)
    (line,) = stage.run.warned
    assert line.startswith("sft: 0.00 GB of weights and optimiser are held; a step takes about 0.")
    assert "and 0.00 GB are free: " in line and line.endswith(flags) and stage.run.said == []


def test_a_step_that_fits_is_said_where_it_is_large(monkeypatch):
    monkeypatch.setattr(loop, "free_memory", lambda: 1e12)
    stage, x = bare_loop(), jnp.ones((10, 10))
    stage.run, stage.stage = Said(), "sft"
    stage.say_memory(CONFIG, x, x, (4, 256), adapters=False)
    assert stage.run.said == []
    stage.say_memory(replace(CONFIG, vocab_size=300_000), x, x, (4, 256), adapters=False)
    assert len(stage.run.said) == 1 and "1000 GB are free" in stage.run.said[0] and stage.run.warned == []


def test_free_memory_is_the_machines_or_the_containers(tmp_path, monkeypatch):
    free = budget.free_memory()
    assert 1e8 < free < 1e13
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1500000")
    (tmp_path / "memory.stat").write_text("anon 900000\ninactive_file 500000\n")
    monkeypatch.setattr(budget, "GROUPS", tmp_path)
    assert budget.free_memory() == 2e6
    (tmp_path / "memory.max").write_text("max")
    assert budget.free_memory() > 1e8
