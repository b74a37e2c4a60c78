"""What the timing scripts read and refuse; the work itself is too large for a test."""

import json
import subprocess
import sys
from contextlib import nullcontext

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import accelerator, beside, programs, rows, shapes, time_by_part
from rlhf_jax.errors import UserError
from rlhf_jax.models import FLOAT32, Transformer, count_weights
from rlhf_jax.sharding import make_mesh, shard_params


def test_the_last_line_of_a_program_is_read():
    program = 'print("hello"); print("RESULT", \'{"tokens_per_s": 8.0, "seconds_per_step": 2.0}\')'
    assert beside.last_line([sys.executable, "-c", program]) == {"tokens_per_s": 8.0, "seconds_per_step": 2.0}


def test_speed_is_tokens_a_second_or_else_steps():
    assert beside.speed({"tokens_per_s": 8.0, "seconds_per_step": 2.0}) == 8.0
    assert beside.speed({"seconds_per_step": 0.5}) == 2.0


@pytest.mark.parametrize(
    "command, message",
    [
        (["no-such-program"], "no-such-program"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "exit status 3"),
        ([sys.executable, "-c", "pass"], "no JSON object"),
        ([sys.executable, "-c", "print('{broken')"], "no JSON object"),
        ([sys.executable, "-c", "print('{}')"], "neither tokens_per_s nor seconds_per_step"),
    ],
)
def test_a_program_that_says_nothing_of_use_is_named(command, message):
    with pytest.raises(UserError, match=message):
        beside.last_line(command)


def test_an_unknown_row_is_refused():
    with pytest.raises(UserError, match="no row 'sftt'; there are sft, sft_lora"):
        rows.Config(rows=("sft", "sftt"))


def test_both_programs_are_run_in_turn_and_the_best_of_each_counts(monkeypatch):
    said = iter([{"tokens_per_s": 3.0, "peak_rss_mib": 10}, {"tokens_per_s": 2.0, "peak_rss_mib": 40}] * 2)
    monkeypatch.setattr(beside, "last_line", lambda command: next(said))
    ratios = beside.main(beside.Config(row="sft", other="other", rounds=2))
    assert ratios == {"speed": 1.5, "peak_rss_mib": 0.25}


@pytest.mark.parametrize("row", ["sft", "reward_model", "dpo"])
def test_a_row_is_of_the_size_that_it_says(row):
    work = rows.build(row, "stories-15m")
    assert work.tokens == {"sft": 8 * 256}.get(row, 16 * 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(work.state.params)) == 15_191_712 + 289 * (row == "reward_model")


def test_the_135m_shape_is_smollm2s():
    """Its published parameters, and its vocabulary's share of them."""
    config = shapes.model_config("smollm2-135m", FLOAT32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert count_weights(params) == 134_515_008 and count_weights(params["embedding"]) == 49_152 * 576


def test_an_operation_is_placed_where_the_program_says_that_it_comes_from():
    """Read from a program that XLA has compiled: a scanned layer, recomputed in its backward pass."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8, name="gate")(nn.RMSNorm(name="attention_norm")(x)), None

    model = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="layers")
    params = model.init(jax.random.key(0), jnp.ones((4, 8)), None)
    step = jax.jit(jax.grad(lambda params: (model.apply(params, jnp.ones((4, 8)), None)[0] ** 2).sum()))
    found = time_by_part.origins([step.lower(params).compile().as_text()])
    assert {program for program, _ in found} == {"jit__lambda"}
    places = {time_by_part.place(path) for path in found.values()}
    directions = {"forward", "recomputed", "backward"}
    assert {direction for part, direction in places if part == "norms"} == directions
    assert {direction for part, direction in places if part == "feed-forward"} >= {"forward", "backward"}
    text = """HloModule jit_f, is_scheduled=true
      %while.1 = f32[] while(%x), body=%b, metadata={op_name="jit(f)/while"}
      ROOT %dot.2 = f32[2,3]{1,0} dot(%a, %b), metadata={op_type="dot" op_name="jit(f)/layers/up/dot"}
      %copy.1 = f32[] copy(%x)"""
    assert time_by_part.origins([text]) == {("jit_f", "dot.2"): "/layers/up/dot", ("jit_f", "copy.1"): ""}
    assert time_by_part.place("/layers/layers.attention/query/dot_general") == ("projections", "forward")
    assert time_by_part.place("/jvp(Model)/trunk/layers/layers.attention/dot_general") == ("attention", "forward")
    assert time_by_part.place("/_generate_queued/layer_0/up/dot_general") == ("rollout", "forward")
    assert time_by_part.place("") == ("optimiser", "forward")


TINY = shapes.QWEN2 | {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64,
    "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)


def test_operations_by_hand(tiny_model, monkeypatch):
    """Two a weight and token; the head for responses only; each token sees half of the others; thrice in training.

    Where the weights have no gradient only their part is done twice.
    """
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 8 + 8 + 16 + 3 * 16 * 32 + 2 * 16)
    weights, attention = 2 * (2 * 8 * layers + 2 * 4 * 16 * 64), 2 * 2 * (2 * 2 * 8 * 8 * 8)
    for experiment, rank, times in [("sft", 0, 3), ("sft", 4, 2), ("dpo", 0, 3)]:
        case = programs.Case(experiment, "tiny", rows=2, prompt=4, response=4, lora_rank=rank)
        assert programs.build(case, jax.eval_shape).flops == times * weights + 3 * attention
    case = programs.Case("ppo", "tiny", rows=2, prompt=4, response=4, minibatches=1)
    forward, scored = weights + attention, weights + attention - 2 * 2 * 4 * 16 * 64
    program = programs.build(case, jax.eval_shape)
    assert program.update_flops == 3 * (forward + scored)
    assert program.flops == forward + 2 * (forward + scored) + program.update_flops
    monkeypatch.setitem(shapes.MODELS, "thin", TINY | {"num_hidden_layers": 1})
    case = programs.Case("ppo", "tiny", rows=2, prompt=4, response=4, minibatches=1, reward_model="thin")
    half = scored / 2  # of the reward model, and of the critic, which has its shape
    assert programs.build(case, jax.eval_shape).flops == forward + 2 * (forward + half) + 3 * (forward + half)
    case = programs.Case("grpo", "tiny", rows=4, prompt=4, response=4)
    assert programs.build(case, jax.eval_shape).flops == 2 * 2 * forward + 2 * (3 * weights + 3 * attention)


@pytest.mark.parametrize(
    "mesh, rows, slots", [("data=2,fsdp=4", 16, None), ("fsdp=4,sequence=2", 16, None), ("fsdp=8", 64, 32)]
)
def test_an_iteration_of_grpo_on_a_mesh_is_that_of_one_device(tiny_model, mesh, rows, slots):
    """With queues, where groups divide over eight copies of the weights, or all answers at once."""
    sizes = {"rows": rows, "slots": slots, "prompt": 5, "response": 7}
    case = programs.Case("grpo", "tiny", precision="float32", attention="reference", **sizes)

    def metrics(mesh):
        with nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
            program = programs.build(case, lambda function, *args: function(*args))
            return jax.device_get(program.function(*shard_params(program.args))[1])

    alone, spread = metrics(None), metrics(mesh)
    assert alone.keys() == spread.keys() and alone["grad_norm"] > 0.1
    for name in alone:
        np.testing.assert_allclose(spread[name], alone[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_decoding_by_hand(monkeypatch, tied):
    """Every weight for each token, but for an embedding that is looked up only; and the cache, half of it written."""
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY | {"tie_word_embeddings": tied})
    case = programs.Case("ppo", "tiny", rows=4, prompt=4, response=8)
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 8 + 8 + 16 + 3 * 16 * 32 + 2 * 16)
    cache = 2 * 2 * 1 * 8 * 4 * (4 + 4)  # keys and values, layers, heads, size, rows, tokens
    assert programs.build(case, jax.eval_shape).decoded == 8 * 2 * (layers + 16 + 16 * 64 + cache)


@pytest.mark.parametrize(
    "rows, slots, copies, at_once, refills",
    [
        (48, 16, 2, 16, 6), (48, 20, 2, 24, 6), (64, 4, 8, 32, 2), (64, 256, 8, 64, 2), (24, 16, 1, 16, 6),
        (48, 8, 8, 48, 1),  # not in a queue
    ],
)  # fmt: skip
def test_a_queue_reads_the_weights_once_for_all_slots(tiny_model, rows, slots, copies, at_once, refills):
    def built(slots):
        case = programs.Case("grpo", "tiny", rows=rows, slots=slots, prompt=4, response=8)
        return programs.build(case, jax.eval_shape, parts=copies)

    whole, program = built(None), built(slots)
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 8 + 8 + 16 + 3 * 16 * 32 + 2 * 16)
    rounds, weights = -(-rows // at_once), 8 * 2 * copies * (layers + 16 + 16 * 64)
    assert program.decoded - whole.decoded == (rounds - 1) * weights
    assert (program.decoding_steps, program.refills) == (rounds * 8, refills)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"experiment": "dpo", "rows": 3}, "rows is 3; answers come in pairs"),
        ({"experiment": "reward_model", "rows": 1}, "rows is 1; answers come in pairs"),
        ({"experiment": "sft", "rows": 0}, "rows is 0; it must be at least 1"),
        ({"experiment": "grpo", "rows": 6}, "rows is 6; groups have 4 answers"),
        ({"experiment": "grpo", "slots": 6}, "--slots 6 are for GRPO, in groups of 4 answers"),
        ({"experiment": "ppo", "slots": 8}, "--slots 8 are for GRPO"),
        ({"experiment": "dpo", "accumulate": 2}, "--accumulate is for ppo and grpo"),
    ],
)
def test_rows_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        programs.Case(model="qwen2.5-7b", **flags)


@pytest.mark.parametrize("work, rank", [("sft", 0), ("ppo_update", 0), ("decode", 4)])
def test_work_on_an_accelerator_runs_and_is_counted(tiny_model, monkeypatch, work, rank):
    monkeypatch.setitem(accelerator.ADAPTED, "tiny", rank)
    cfg = accelerator.Config(rows=2, prompt=4, response=4, steps=1)
    row = accelerator.measure(cfg, "tiny", work, (1e12, 1e9))
    tokens = {"decode": 64 * 4, "ppo_update": 4 * 2 * 8}.get(work, 2 * 8)
    assert row["tokens_per_s"] * row["seconds_per_step"] == pytest.approx(tokens)
    share = row["share_of_bandwidth" if work == "decode" else "mfu"]
    assert 0 < share and row["lora_rank"] == rank
    if work == "sft":
        flops = programs.build(programs.Case("sft", "tiny", rows=2, prompt=4, response=4), jax.eval_shape).flops
        assert share * row["seconds_per_step"] * 1e12 == pytest.approx(flops)


def test_the_devices_row(monkeypatch, capsys):
    accelerator.main(accelerator.Config(work=("device",), matrix=64, steps=1))
    row = json.loads(capsys.readouterr().out)
    assert row["device"] == jax.devices()[0].device_kind and row["flops_per_s"] > 0 and row["bytes_per_s"] > 0


def test_a_row_that_does_not_fit_is_said_and_the_next_one_is_timed(monkeypatch, capsys):
    said = iter([
        (0, '{"flops_per_s": 2.0, "bytes_per_s": 4.0}', ""), (2, "", "RESOURCE_EXHAUSTED: Out of memory"),
        (0, 'a note\n{"work": "decode", "share_of_bandwidth": 0.5}', ""),
    ])  # fmt: skip
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, *next(said))

    monkeypatch.setattr(subprocess, "run", run)
    cfg = accelerator.Config(models=("qwen2.5-7b",), work=("sft", "decode"))
    assert accelerator.main(cfg) == {"qwen2.5-7b_decode": 0.5}
    assert [json.loads(line).get("error") for line in capsys.readouterr().out.splitlines()] == [
        None, "does not fit the device's memory", None
    ]  # fmt: skip
    assert all(command[-3:] == ["--peak", "2.0", "4.0"] for command in commands[1:])


def test_the_device_is_measured_alone_or_first(monkeypatch):
    asked = []
    monkeypatch.setattr(
        accelerator, "apart", lambda cfg, work, **more: asked.append(work) or {"error": "does not fit"}
    )
    with pytest.raises(UserError, match="two matrices of 16384 rows do not fit"):
        accelerator.main(accelerator.Config(work=("device", "sft")))
    assert accelerator.main(accelerator.Config(models=("qwen2.5-7b",), work=("device", "sft"), peak=(1.0, 1.0))) == {}
    assert asked == ["device", "sft"]


def test_an_unknown_shape_is_told_before_anything_is_timed():
    with pytest.raises(UserError, match="model 'gpt-5' is not one of llama3-8b"):
        accelerator.Config(models=("gpt-5",))
