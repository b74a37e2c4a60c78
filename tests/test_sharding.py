"""Every algorithm's step on a mesh is that of one device; what the compiled programs send; and where things lie."""

import re
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from experiments.bench.meshes import (
    ALGORITHMS,
    IN_ORDER,
    LENGTH,
    MESHES,
    MODEL,
    ROWS,
    collectives,
    stepped,
    tokens,
    weights,
)
from experiments.flags import RunFlags
from rlhf_jax import checkpoint
from rlhf_jax.axes import MESH_AXES
from rlhf_jax.cli import on_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.loop import check_microbatches
from rlhf_jax.models import Transformer, init_cache, init_lora, load_hf, save_hf, with_dropout, with_lora
from rlhf_jax.optimizers import adafactor, adamw, muon
from rlhf_jax.pretrained import hf_shardings
from rlhf_jax.scoring import sft_objective
from rlhf_jax.sharding import create, current_mesh, make_mesh, shard_params, shardings
from rlhf_jax.train import make_pmap_step, make_state, make_train_step, microbatches

TRANSFORMER = Transformer(MODEL)
MIXED, CUT_SEQUENCES = "data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2,tensor=2"
STEPS = [(name, mesh) for name in ALGORITHMS for mesh in MESHES if name != "ppo" or mesh in (MIXED, CUT_SEQUENCES)]
"""PPO compiles for long: here on the meshes that have most axes, on all of them by experiments/bench/meshes.py."""


@pytest.mark.parametrize("name, mesh", STEPS)
def test_a_step_on_a_mesh_is_that_of_one_device(name, mesh):
    """State (so gradients), loss and metrics; what PPO sampled, too."""
    expected, found = stepped(name, None), stepped(name, mesh)
    for field in ("state", "metrics", "rest"):
        chex.assert_trees_all_close(getattr(found, field), getattr(expected, field), rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize("name, mesh", STEPS)
def test_a_state_comes_out_where_it_went_in(name, mesh):
    """Else it is not updated in place, and the second step is another program."""
    step = stepped(name, mesh)
    assert step.after == step.before


def squeezed(shape):
    """Dimensions in order of size, without ones: compilers turn and flatten arrays."""
    return tuple(sorted(size for size in shape if size > 1))


def sent(name, mesh):
    """(kind, shape) of every array that a collective of a step makes."""
    return {
        (kind, squeezed(shape)) for kind, shapes, _ in collectives(stepped(name, mesh).program) for shape in shapes
    }


def predicted(name, mesh):
    """What a step sends, as `sent` has it.

    "fsdp" gathers kernels, a layer at a time. Gradients are added up over all rows, along "fsdp" and then what each
    device keeps of them along "data"; so are the terms of losses and norms. "tensor" adds up the residual stream after
    attention and feed-forward, and its gradient before them; of the head, numbers for each token, no logits. To look
    words up, tokens are gathered, columns of embeddings go to where their rows are, and their gradients come back.
    Losses of pairs bring one number of each row to where its pair is. "sequence" cuts parameters as "fsdp" does, and
    exchanges heads for times: of queries, keys and values before attention, of what was attended after it.
    """
    sizes = make_mesh(mesh).shape
    sequence, tensor = sizes["sequence"], sizes["tensor"]
    fsdp, time = sizes["fsdp"] * sequence, LENGTH // sequence
    rows = ROWS // (sizes["data"] * sizes["fsdp"])
    widths = [width // tensor for width in (32, 16, 40, 96)]
    # A reward model has no head, and to look words up the table stays where it is.
    gathered = {(16, width) for width in widths[: 3 if name == "reward model" else 4]} if fsdp > 1 else set()
    added = {(), (16,)} | {(depth, width) for depth in (16, 16 // fsdp) for width in widths}
    if tensor > 1:
        added |= {(rows * time, 16), (rows, time, 16), (rows, time)}
    copies = ROWS // sizes["data"]
    if tensor > 1:
        added |= {(copies, LENGTH, 16 // fsdp)}
    found = {("all-gather", squeezed(shape)) for shape in gathered} | {("all-reduce", squeezed(s)) for s in added}
    if fsdp > 1:
        found |= {("all-gather", squeezed((copies, LENGTH)))}
    if sizes["fsdp"] > 1:
        found |= {("all-to-all", squeezed((rows, time, 16 // sizes["fsdp"])))}
    if sequence > 1:
        heads = 4 // (tensor * sequence)
        found |= {("all-to-all", squeezed((copies, time, 16 // fsdp)))}
        found |= {("all-to-all", squeezed((rows, time, count, 4))) for count in (heads, 2 * heads)}
        found |= {("all-to-all", squeezed((rows, time, heads, 2, 4)))}
        if name == "reward model":  # a row's last token is found by numbers of its tokens
            found |= {("all-gather", squeezed((rows, LENGTH))), ("collective-permute", squeezed((rows, time)))}
    if name != "sft":
        found |= {(kind, shape) for kind, shape in sent(name, mesh) if len(shape) < 2 and sum(shape) <= ROWS}
    return found


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["sft", "reward model", "dpo"])
def test_a_step_sends_what_the_design_says_and_nothing_else(name, mesh):
    assert sent(name, mesh) - predicted(name, mesh) == set()
    gathered = {some for some in predicted(name, mesh) if some[0] in ("all-gather", "all-to-all")}
    assert gathered <= sent(name, mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_heads_kernel_and_its_gradient_travel_once_and_not_with_each_chunk(name, mesh):
    kernel = squeezed((16, 96 // make_mesh(mesh).shape["tensor"]))
    origins = [
        where for _, shapes, where in collectives(stepped(name, mesh).program) if kernel in map(squeezed, shapes)
    ]
    assert all("while" not in where for where in origins)


def weights_gathered_for_sampling(mesh):
    """Shapes that PPO's sampler gathers before it reads anything; jax 0.12 names them by the program's arguments."""
    found = collectives(stepped("ppo", mesh).program)
    names = re.compile(r".*jit\(_generate\)/sharding_constraint|state\.policy\.params.*")
    return [shape for kind, shapes, where in found if names.fullmatch(where)
            for shape in shapes if kind == "all-gather"]  # fmt: skip


@pytest.mark.parametrize("mesh", [MIXED])
def test_the_sampler_gathers_each_weight_once_and_nothing_of_it_for_a_token(mesh):
    tensor = make_mesh(mesh).shape["tensor"]
    width, outs = MODEL.d_model, (MODEL.head_dim * MODEL.n_heads, MODEL.head_dim * MODEL.n_kv_heads, MODEL.d_ff)
    heads, keys, hidden = (out // tensor for out in outs)
    into = [(width, out) for out in (heads, keys, keys, hidden, hidden)]
    whole = [(MODEL.n_layers, *shape) for shape in (*into, (heads, width), (hidden, width))]
    whole.append((MODEL.vocab_size // tensor, width))
    assert sorted(weights_gathered_for_sampling(mesh)) == sorted(whole)
    # Rows of the slots, and never a weight: all that a token sends is smaller than the smallest one.
    sent_for_a_token = [
        shape for _, shapes, where in collectives(stepped("ppo", mesh).program) for shape in shapes
        if "jit(_generate)/while" in where
    ]  # fmt: skip
    assert sent_for_a_token and all(np.prod(shape) <= ROWS * MODEL.vocab_size for shape in sent_for_a_token)
    assert not {squeezed(shape) for shape in sent_for_a_token} & {squeezed(shape[1:]) for shape in whole[:-1]}


@pytest.mark.parametrize("mesh", [MIXED])
def test_an_iteration_of_ppo_sends_little_more(mesh):
    """To draw, each device gets whole logits of rows of its own; to look words up, columns of all rows' embeddings
    become rows; to shuffle, a few numbers a token are sent."""
    sizes = make_mesh(mesh).shape
    embeddings = ROWS * LENGTH * 16 // (sizes["data"] * sizes["fsdp"] ** 2)
    gathered = {some for some in predicted("sft", mesh) if some[0] == "all-gather"}
    vocabulary, depths = {96, 96 // sizes["tensor"]}, {16, 16 // sizes["fsdp"]}
    placed = {("all-gather", squeezed(shape)) for shape in weights_gathered_for_sampling(mesh)}
    for kind, shape in sent("ppo", mesh) - gathered - placed:
        if vocabulary & set(shape):
            drawn = kind == "all-to-all" and np.prod(shape) <= ROWS * 96
            assert drawn or (kind == "all-reduce" and depths & set(shape)), (kind, shape)
        elif kind != "all-reduce":
            assert np.prod(shape) <= (embeddings if kind == "all-to-all" else ROWS * LENGTH), (kind, shape)


def cut(leaf):
    """Into how many parts an array is cut."""
    return leaf.size // leaf.addressable_shards[0].data.size


def parameters_of(tree):
    """Names and arrays of what is cut along both axes: kernels and tables, and an optimiser's moments of them."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = str(getattr(path[-1], "key", ""))
        if name in ("kernel", "embedding", "head") and leaf.ndim > 1:
            yield jax.tree_util.keystr(path), leaf


@pytest.mark.parametrize("optimizer, moments", [(adamw, 2), (muon, 1), (adafactor, 1)])
def test_no_matrix_of_a_state_is_whole_on_a_device(optimizer, moments):
    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):
        model = Transformer(replace(MODEL, tie_embeddings=False))
        params = create(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
        state = make_state(model, params, optimizer(1e-3, weight_decay=0.1, max_grad_norm=1.0))
    found = list(parameters_of(state))
    assert len(found) >= 9 * (1 + moments)
    assert {name: cut(leaf) for name, leaf in found} == {name: 8 for name, _ in found}


def test_an_initialisation_never_makes_a_whole_parameter():
    def init():
        return TRANSFORMER.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def program(function):
        return jax.jit(function).lower().compile().as_text()

    whole = ["f32[96,16]", "f32[3,16,40]", "f32[3,40,16]", "f32[3,16,32]"]
    assert all(shape in program(init) for shape in whole)
    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):
        assert not [shape for shape in whole if shape in program(lambda: create(init))]
        placed = create(init)
    chex.assert_trees_all_close(placed, jax.jit(init)(), rtol=1e-6)


@pytest.mark.parametrize("mesh", [MIXED, CUT_SEQUENCES, "fsdp=8", None])
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, mesh):
    def state():
        return make_state(TRANSFORMER, weights()[0], adamw(1e-3, weight_decay=0.1, max_grad_norm=1.0))

    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):
        saved = state()
        checkpoint.save(tmp_path, "sft", 1, saved)
    if mesh is None:
        restored = checkpoint.restore(tmp_path, "sft", like=state())
    else:
        with jax.set_mesh(make_mesh(mesh)):
            abstract = jax.eval_shape(state)
            places = shardings(current_mesh(), abstract)
            like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
            restored = checkpoint.restore(tmp_path, "sft", like=like)
        ways = np.prod([make_mesh(mesh).shape[axis] for axis in ("fsdp", "sequence", "tensor")])
        assert {cut(leaf) for _, leaf in parameters_of(restored)} == {ways}
    chex.assert_trees_all_equal(jax.device_get(restored.params), jax.device_get(saved.params))


@pytest.mark.parametrize("scan", [False, True])
def test_each_device_reads_its_slices_of_a_model(tmp_path, scan):
    config = replace(MODEL, scan_layers=scan)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_hf(tmp_path, config, params)
    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):
        _, read = load_hf(tmp_path, shardings=hf_shardings(tmp_path), scan_layers=scan)
    assert {cut(leaf) for _, leaf in parameters_of(read)} == {8}
    chex.assert_trees_all_equal(jax.device_get(read), jax.device_get(params))
    assert hf_shardings(tmp_path) is None


def test_the_table_by_name():
    adapter = init_lora(jax.random.key(0), weights()[0], rank=2, alpha=4.0, targets="(output|gate)/kernel")
    odd = {
        "embedding": np.zeros((95, 16)),
        "other": np.zeros((16, 16)),
        "layer_3": {"up": {"bias": np.zeros(40)}},
    }
    tree = {"trunk": weights()[0] | {"head": np.zeros((16, 96))}, "head": weights()[1]["head"], "odd": odd}
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    places = jax.tree.map(lambda s: s.spec, shardings(mesh, tree | {"adapter": adapter}))
    trunk, adapters = places["trunk"], places["adapter"]["layers"]
    assert trunk["embedding"] == PartitionSpec("tensor", "fsdp") and trunk["head"] == PartitionSpec("fsdp", "tensor")
    assert trunk["layers"]["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert trunk["layers"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert trunk["final_norm"]["scale"] == places["head"]["kernel"] == places["head"]["bias"] == PartitionSpec()
    assert adapters["output"]["lora_a"] == PartitionSpec(None, "tensor")
    assert adapters["output"]["lora_b"] == PartitionSpec(None, None, "fsdp")
    assert adapters["gate"]["lora_scale"] == places["odd"]["other"] == PartitionSpec()
    assert places["odd"]["embedding"] == PartitionSpec(None, "fsdp")  # 95 is odd
    assert places["odd"]["layer_3"]["up"]["bias"] == PartitionSpec("tensor")
    abstract = jax.eval_shape(lambda: tree)
    assert jax.tree.map(lambda s: s.spec, shardings(mesh, abstract)) == {k: places[k] for k in tree}


def test_a_cache_lies_with_rows_and_heads_of_its_own():
    with jax.set_mesh(make_mesh(MIXED)):
        stacked = jax.jit(partial(init_cache, MODEL, ROWS, 8))()
        layers = jax.jit(partial(init_cache, replace(MODEL, scan_layers=False), ROWS, 8))()
    assert stacked.keys.sharding.spec == PartitionSpec(None, ("data", "fsdp"), "tensor")
    assert layers.values[2].sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")


def test_without_a_mesh_nothing_is_asked_for():
    step = make_train_step(partial(sft_objective, TRANSFORMER))
    text = str(step.trace(make_state(TRANSFORMER, weights()[0], optax.sgd(1.0)), tokens(0)).jaxpr)
    assert "sharding_constraint" not in text and "[8,16,96]" not in text


def test_an_adapters_dropout_is_the_same_on_a_mesh():
    params, batch = jax.tree.map(jnp.asarray, (weights()[0], tokens(0)))
    own = init_lora(jax.random.key(0), params, rank=2, alpha=4.0, targets="kernel")
    own = jax.tree.map(lambda x: x + 0.1, own)

    @partial(jax.jit, compiler_options=IN_ORDER)
    def loss(own, rate):
        dropping = with_dropout(own, jax.random.key(3), rate=rate)
        return sft_objective(TRANSFORMER, with_lora(params, dropping), batch)[0]

    expected = loss(own, 0.5)
    assert abs(expected - loss(own, 0.0)) > 1e-3
    with jax.set_mesh(make_mesh("data=2,tensor=4")):
        np.testing.assert_allclose(loss(shard_params(own), 0.5), expected, rtol=1e-5)


def test_pmap_is_jit_with_unequal_masks():
    loss_fn, counts = partial(sft_objective, TRANSFORMER), lambda batch: {"loss": batch.mask.sum()}
    one = stepped("sft", None)

    def stepped_by_pmap(counts):
        state = make_state(TRANSFORMER, weights()[0], optax.sgd(1.0))
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *jnp.shape(x))), state)
        return make_pmap_step(loss_fn, counts=counts)(copies, microbatches(tokens(0), 8))

    for device in (0, 7):
        state, metrics = jax.tree.map(lambda x: np.asarray(x[device]), stepped_by_pmap(counts))  # noqa: B023
        found = jax.tree.leaves(state), metrics
        chex.assert_trees_all_close(found, (one.state, one.metrics), rtol=2e-4, atol=5e-6)
    _, alike = stepped_by_pmap(lambda batch: {"loss": jnp.ones(())})
    assert abs(float(alike["loss"][0]) - one.metrics["loss"]) > 1e-3


@pytest.mark.parametrize(
    "text, sizes",
    [
        ("", (8, 1, 1, 1)),
        ("fsdp=4", (2, 4, 1, 1)),
        (" tensor=2 , fsdp=2,", (2, 2, 1, 2)),
        ("fsdp=8,data=1", (1, 8, 1, 1)),
        ("data=2,fsdp=-1", (2, 4, 1, 1)),
        ("sequence=4,fsdp=2", (1, 2, 4, 1)),
    ],
)
def test_a_mesh_from_a_string(text, sizes):
    assert tuple(make_mesh(text).shape.items()) == tuple(zip(MESH_AXES, sizes, strict=True))


@pytest.mark.parametrize(
    "text, message",
    [
        ("fsdp:8", "'fsdp:8' is not one of data=N, fsdp=N, sequence=N, tensor=N"),
        ("model=8", "'model=8' is not one of"),
        ("fsdp=4,fsdp=2", "each at most once"),
        ("fsdp=two", "'fsdp=two' is not one of"),
        ("fsdp=0", "sizes are positive"),
        ("data=-1,fsdp=-1", "one may be -1"),
        ("data=-2", "sizes are positive"),
        ("fsdp=3", "is for 3 devices each; there are 8"),
        ("data=2,fsdp=2", "is for 4 devices; there are 8"),
    ],
)
def test_what_is_not_a_mesh_is_one_line(text, message):
    with pytest.raises(UserError, match=r"^mesh [^\n]*$") as error:
        make_mesh(text)
    assert message in str(error.value)


def test_a_mesh_of_some_devices():
    assert make_mesh("fsdp=2", devices=jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:]


def test_rows_that_do_not_divide_over_the_mesh_are_one_line():
    check_microbatches(12, 1, "rows")
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
        check_microbatches(12, 1, "rows")
        with pytest.raises(UserError, match="6 rows a microbatch do not divide over data × fsdp = 4 parts"):
            check_microbatches(12, 2, "rows")


def test_the_flag_sets_the_mesh_for_the_run_only():
    seen = on_mesh(lambda cfg: current_mesh())
    assert seen(RunFlags(mesh="fsdp=8")).shape["fsdp"] == 8
    assert seen(RunFlags()) is None and current_mesh() is None
