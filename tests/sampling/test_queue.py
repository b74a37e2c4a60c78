"""A queue of prompts gives the tokens of the static batch, whatever the slots, in fewer steps."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sampling.test_generate import MODEL, NEW, PAD, VOCAB, an_eos, new_params, prompts_of

from experiments.bench.meshes import collectives
from rlhf_jax.models import Transformer, init_lora, quantize_frozen, with_lora
from rlhf_jax.sampling import generate, layout
from rlhf_jax.sampling.decoder import decoder_of
from rlhf_jax.sampling.queue import DECODE, REFILL, _generate_queued, generate_queued
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params

PROMPTS, GROUP = 5, 2


def static(prompts, mask, model=MODEL, params=None, **options):
    prompts, mask = (jnp.repeat(x, GROUP, axis=0) for x in (prompts, mask))
    numbers = {"max_new_tokens": NEW, "temperature": 1.0, "eos_id": None, "pad_id": PAD} | options
    return generate(model, params or new_params(), prompts, mask, jax.random.key(3), **numbers)


def queued(prompts, mask, slots, model=MODEL, params=None, **options):
    numbers = {"max_new_tokens": NEW, "temperature": 1.0, "eos_id": None, "pad_id": PAD} | options
    return generate_queued(
        model, params or new_params(), prompts, mask, jax.random.key(3), group_size=GROUP, slots=slots, **numbers
    )


def assert_same(found, expected):
    assert_array_equal(found.mask, expected.mask)
    assert_array_equal(np.where(found.mask, found.tokens, PAD), expected.tokens)
    assert_allclose(np.where(found.mask, found.logprobs, 0), expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(("slots", "temperature", "ends"), [(2, 0.7, 1), (6, 0.7, 2), (6, 0.0, 1), (40, 0.7, 0)])
def test_the_tokens_are_those_of_the_static_batch(slots, temperature, ends):
    prompts, mask = prompts_of(PROMPTS)
    eos = an_eos(*(jnp.repeat(x, GROUP, axis=0) for x in (prompts, mask)))
    options = {"temperature": temperature, "eos_id": (eos, 1 + eos % (VOCAB - 1))[:ends] or None}
    assert_same(queued(prompts, mask, slots, **options), static(prompts, mask, **options))


def test_the_ring_goes_round_and_nothing_of_another_row_is_seen():
    # 24 prompts through 2 slots: the ring of 10 columns is written many times over.
    prompts, mask = prompts_of(24, seed=1)
    assert_same(queued(prompts, mask, 2, eos_id=4), static(prompts, mask, eos_id=4))


@pytest.mark.parametrize("changes", [{"scan_layers": True}, {"windows": (3, None)}], ids=["stacked", "windows"])
def test_stacked_layers_and_windows(changes):
    model = Transformer(replace(MODEL.config, **changes))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    prompts, mask = prompts_of(PROMPTS)
    options = {"model": model, "params": params, "eos_id": 3}
    assert_same(queued(prompts, mask, 4, **options), static(prompts, mask, **options))


@pytest.mark.parametrize("adapters", [False, True])
def test_layers_apart_when_decoding_sample_as_those_of_a_stack(adapters):
    """Weights, int8 and adapters among them, and the cache of the prompts: whatever was stacked is apart."""
    config = replace(MODEL.config, scan_layers=True)
    params = jax.jit(Transformer(config).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    if adapters:
        own = init_lora(jax.random.key(2), params, rank=2, alpha=4.0, targets="(query|down)/kernel")
        own = jax.tree.map(lambda x: x + 0.1, own)
        params = with_lora(quantize_frozen(params), own)
    prompts, mask = prompts_of(PROMPTS)
    options = {"params": params, "eos_id": 3}
    stacked = static(prompts, mask, model=Transformer(config), **options)
    model = Transformer(replace(config, apart_when_decoding=True, remat=True))
    decoder, apart = decoder_of(model, params)
    assert not decoder.config.scan_layers and "layers" not in apart and "layer_1" in apart
    assert decoder_of(Transformer(config), params)[1] is params
    assert_same(static(prompts, mask, model=model, **options), stacked)
    assert_same(queued(prompts, mask, 4, model=model, **options), stacked)


def test_an_answer_is_cut_at_its_limit():
    prompts, mask = prompts_of(PROMPTS)
    limits = jnp.asarray([1, 2, 3, 4, 5, 6, 1, 9, 2, 6])
    found, whole = queued(prompts, mask, 4, limits=limits), static(prompts, mask)
    assert found.mask.sum(axis=1).tolist() == jnp.minimum(limits, NEW).tolist()
    assert_array_equal(np.where(found.mask, found.tokens, 0), np.where(found.mask, whole.tokens, 0))


@pytest.mark.parametrize("copies", [1, 8])
def test_a_slot_does_not_wait_for_the_longest_answer(copies):
    # Nine answers of four tokens and one of 40, in 2 slots: static batches of 2 would take 40 + 4 · 4 steps.
    prompts, mask = prompts_of(10 * copies)
    limits = jnp.tile(jnp.asarray([40, *[4] * 9]), copies)
    numbers = dict(max_new_tokens=40, greedy=False, top_k=None, eos_id=(), pad_id=PAD)
    with nullcontext() if copies == 1 else jax.set_mesh(make_mesh("fsdp=8")):
        _, steps = _generate_queued(
            MODEL, shard_params(new_params()), *shard_batch((prompts, mask)), jax.random.key(3), jnp.float32(1), None,
            limits, group_size=1, slots=2 * copies, **numbers,
        )  # fmt: skip
    # One slot is busy for 39 steps after the first token; the other gives the rest, 9 · 3 steps, meanwhile.
    assert steps == 39


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_slots_that_cannot_be_are_refused(slots):
    with pytest.raises(ValueError, match=f"{slots} slots are not a multiple of the group size, 2"):
        queued(*prompts_of(PROMPTS), slots)


def test_answers_are_put_as_they_end_each_once():
    prompts, mask = prompts_of(24, seed=1)
    put = []
    found = queued(prompts, mask, 4, eos_id=4, put=put.append)
    jax.effects_barrier()
    assert len(put) > 6  # not all together
    rows = np.concatenate([ended.rows for ended in put])
    assert sorted(rows) == list(range(24 * GROUP))
    assert_array_equal(np.concatenate([ended.mask for ended in put]), found.mask[rows])
    assert_array_equal(np.concatenate([ended.tokens for ended in put]), found.tokens[rows])
    assert_same(found, static(prompts, mask, eos_id=4))


HEADS = replace(MODEL.config, d_model=16, n_heads=4, n_kv_heads=4, head_dim=4, d_ff=32)
"""Dimensions that four devices divide."""
LENGTHS = np.random.default_rng(2).integers(1, NEW + 1, 16 * GROUP)
"""Unequal ones, so that copies have room at different times."""


@pytest.mark.parametrize(
    "mesh, tensor, scan, slots",
    [
        ("data=8", 1, False, 16), ("fsdp=8", 1, True, 24), ("data=2,fsdp=2,tensor=2", 2, True, 8),
        ("fsdp=8", 4, False, 4), ("fsdp=4,sequence=2", 1, False, 100),
    ],
)  # fmt: skip
def test_on_a_mesh_the_copies_of_the_weights_have_queues_of_their_own(monkeypatch, mesh, tensor, scan, slots):
    model = Transformer(replace(HEADS, scan_layers=scan))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    prompts, mask = prompts_of(16, seed=2)
    options = {"model": model, "limits": jnp.asarray(LENGTHS), "eos_id": 3}
    expected = queued(prompts, mask, 4, params=params, **options)
    monkeypatch.setattr(layout, "device_memory", lambda mesh: 1.0 if tensor == 4 else None)
    with jax.set_mesh(make_mesh(mesh)):
        placed = shard_params(params)
        assert layout.sampling_copies(model.config, placed) == 8 // tensor
        found = queued(*shard_batch((prompts, mask)), slots, params=placed, **options)
        assert found.tokens.sharding.mesh.shape == make_mesh(mesh).shape  # it comes back on the mesh that is set
    assert_same(found, expected)
    assert_array_equal(found.tokens, expected.tokens)
    assert len(set(expected.mask.sum(axis=1).tolist())) > 3


@pytest.mark.parametrize("mesh, tensor", [("fsdp=8", 1), ("fsdp=4,tensor=2", 2)])
def test_copies_send_each_other_four_numbers_a_step(mesh, tensor):
    """The devices of one copy send more: an all-reduce where attention and where a layer ends, and what is drawn."""
    prompts, mask = prompts_of(16, seed=2)
    model = Transformer(HEADS)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    with jax.set_mesh(make_mesh(mesh)):
        rows = shard_batch((prompts, mask))
        sample = jax.jit(partial(queued, slots=16, eos_id=3, model=model))
        program = sample.lower(*rows, params=shard_params(params)).compile().as_text()
    found = collectives(program)
    for loop in (REFILL, DECODE):
        inside = [(kind, shapes) for kind, shapes, name in found if loop in name]
        assert inside.count(("all-reduce", [(4,)])) == 1
        others = [(kind, math.prod(shape)) for kind, shapes in inside for shape in shapes if shape != (4,)]
        if tensor == 1:
            assert not others
        else:
            assert {kind for kind, _ in others} == {"all-reduce", "all-gather"}
            assert max(size for kind, size in others if kind == "all-gather") <= 2 * 2 * 11, others


@pytest.mark.parametrize(
    "copies, prompts, slots, most",
    [
        (1, 9, 9, 11), (1, 13, 13, 11), (8, 72, 72, 11),  # all at once, the last prompts, too
        (8, 64, 16, 26), (8, 64, 8, 38),  # no copy waits until all are idle: one alone has 38 steps to do in one slot
    ],
)  # fmt: skip
def test_how_long_copies_wait_for_each_other(copies, prompts, slots, most):
    rows, mask = prompts_of(prompts)
    limits = jnp.full(prompts, 12)
    if slots < prompts:
        limits = jnp.where(np.random.default_rng(0).random(prompts) < 0.2, 12, 2)
    numbers = dict(max_new_tokens=12, greedy=False, top_k=None, eos_id=(), pad_id=PAD)
    with nullcontext() if copies == 1 else jax.set_mesh(make_mesh("fsdp=8")):
        _, steps = _generate_queued(
            MODEL, shard_params(new_params()), *shard_batch((rows, mask)), jax.random.key(3), jnp.float32(1), None,
            limits, group_size=1, slots=slots, **numbers,
        )  # fmt: skip
    assert steps <= most


def test_answers_are_put_by_one_copy():
    said = "by one copy of the weights, and there are 8"
    with jax.set_mesh(make_mesh("fsdp=8")), pytest.raises(ValueError, match=said):
        queued(*prompts_of(16), 4, params=shard_params(new_params()), put=print)


def test_prompts_that_do_not_divide_over_the_copies_are_refused():
    said = "6 prompts do not divide over the 8 copies of the weights"
    with jax.set_mesh(make_mesh("fsdp=8")), pytest.raises(ValueError, match=said):
        queued(*prompts_of(6), 4, params=shard_params(new_params()))
