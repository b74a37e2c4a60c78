"""Time and memory of each kind of work, at a shape that is the same for every library one may compare with.

    python experiments/bench/rows.py
A Llama of 15.2M parameters (vocabulary 32000, width 288, 6 layers, tied) in float32; `vocabulary` has 151936 words
instead, at width 256 and 2 layers. Prints a JSON line a row: median seconds a step (an iteration, a call), tokens a
second, and, counted from the start of the row's own process, peak memory and seconds to the end of the first step.
About ten minutes on 2 CPU cores; `--rows sft ppo` for some of them. `beside.py` puts a row beside another program.

    python experiments/bench/rows.py --shape smollm2-135m --rows sft sft_lora reward_model dpo generate generate_32
The same work with smaller batches for SmolLM2's shape of 135M parameters, as the experiments train it.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

TRAINING = ("sft", "sft_lora", "reward_model", "dpo", "vocabulary")
"""Layers scanned and rematerialised: as fast on a CPU, where memory costs time, and half the memory."""
ROWS = (*TRAINING, "generate", "generate_32", "ppo", "grpo", "grpo_long")


Shape = Literal["stories-15m", "smollm2-135m"]


class Sizes(NamedTuple):
    """The sizes of a shape's rows."""

    rows: int
    """A batch of SFT has so many, 256 tokens each."""
    pairs: int
    """The reward model and DPO have so many, 256 tokens an answer."""
    sampled: int
    """Answers of `generate` to prompts of 64 tokens."""
    new: int
    """Tokens of each."""


SIZES = {"stories-15m": Sizes(8, 8, 32, 128), "smollm2-135m": Sizes(2, 2, 8, 64)}


@dataclass(frozen=True)
class Config:
    """Times rows, each in a process of its own."""

    rows: tuple[str, ...] = ROWS
    """Some of sft, sft_lora, reward_model, dpo, vocabulary, generate, generate_32, ppo, grpo, grpo_long."""
    shape: Shape = "stories-15m"
    """The model's."""
    steps: int = 15
    """Steps that count, after 3 that do not (PPO, GRPO: a third as many, after 1)."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range and for an unknown row."""
        from rlhf_jax.errors import UserError, at_least

        at_least(self, steps=1)
        if unknown := set(self.rows) - set(ROWS):
            raise UserError(f"no row {sorted(unknown)[0]!r}; there are {', '.join(ROWS)}")


class Work(NamedTuple):
    """A row: what is done again and again (each call takes and returns the state), and the tokens it counts."""

    state: Any
    step: Callable[[Any, int], Any]
    tokens: int
    few: bool = False


def build(row: str, shape: str) -> Work:
    """The work of a row, nothing of it run yet."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.bench.shapes import model_config
    from rlhf_jax.batches import Prompts, Tokens
    from rlhf_jax.losses import bradley_terry_loss, dpo_loss
    from rlhf_jax.models import FLOAT32, ScalarModel, Transformer, from_language_model, init_lora, with_lora
    from rlhf_jax.optimizers import adamw
    from rlhf_jax.sampling import generate
    from rlhf_jax.scoring import answer_logprobs, response_rewards, sft_objective
    from rlhf_jax.train import give_back_freed_memory, keep_freed_memory, make_state, make_train_step

    large = row == "vocabulary"
    remat: Any = row in TRAINING
    sizes, deep = SIZES[shape], shape != "stories-15m"
    if row == "reward_model" and not deep:  # without logits there is room for the products with weights
        remat = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    config = model_config(shape, FLOAT32)
    config = replace(config, scan_layers=deep or row in TRAINING, remat=remat or deep, apart_when_decoding=True)
    if large:
        config = replace(
            config, vocab_size=151936, d_model=256, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=64
        )  # fmt: skip
    model, scalar = Transformer(config), ScalarModel(config)
    key = jax.random.key(0)
    params = jax.jit(lambda: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])()
    give_back_freed_memory(params)  # as the experiments do with a model of that size

    def ids(seed: int, rows: int, length: int) -> Any:
        return np.random.default_rng(seed).integers(2, config.vocab_size, (rows, length), np.int32)

    def tokens(inputs: Any, prompt: int) -> Tokens:
        """Whole rows of `inputs`; all but `prompt` tokens are the response."""
        rows, length = inputs.shape
        positions: Any = np.broadcast_to(np.arange(length, dtype=np.int32), inputs.shape)
        mask = (positions >= prompt - 1) & (positions < length - 1)
        segment_ids: Any = np.ones((rows, length), np.int32)
        return Tokens(inputs, np.roll(inputs, -1, 1), mask, positions, segment_ids)

    def training(model: Any, params: Any, loss: Callable, batch: Callable[[int], Tokens], *fixed: Any) -> Work:
        step = make_train_step(loss)

        def call(state: Any, i: int) -> Any:
            state, metrics = step(state, batch(i), *fixed)
            float(metrics["loss"])
            return state

        return Work(
            make_state(model, params, adamw(1e-4, weight_decay=0.0, max_grad_norm=1.0)), call, batch(0).mask.size
        )

    if row in ("sft", "vocabulary"):
        size = (4, 512) if large else (sizes.rows, 256)
        return training(model, params, partial(sft_objective, model), lambda i: tokens(ids(i, *size), 64))

    if row == "sft_lora":
        own = init_lora(key, params, rank=16, alpha=32.0, targets="(query|key|value|output|gate|up|down)/kernel")

        def adapter_loss(own: Any, batch: Tokens, frozen: Any) -> Any:
            return sft_objective(model, with_lora(frozen, own), batch)

        return training(model, own, adapter_loss, lambda i: tokens(ids(i, sizes.rows, 256), 64), params)

    pairs = sizes.pairs

    if row == "reward_model":

        def pair_loss(params: Any, batch: Tokens) -> Any:
            rewards = response_rewards(scalar, params, batch)
            return bradley_terry_loss(rewards[:pairs], rewards[pairs:])

        start = from_language_model(params, key, config)
        return training(scalar, start, pair_loss, lambda i: tokens(ids(i, 2 * pairs, 256), 64))

    if row == "dpo":

        def preference_loss(params: Any, batch: Tokens, reference: Any) -> Any:
            ours, theirs = (answer_logprobs(model, some, batch) for some in (params, reference))
            return dpo_loss(ours[:pairs], ours[pairs:], theirs[:pairs], theirs[pairs:], beta=0.1)

        def compared(i: int) -> Tokens:
            asked, answers = np.tile(ids(i, pairs, 64), (2, 1)), ids(1000 + i, 2 * pairs, 192)
            return tokens(np.concatenate([asked, answers], axis=1), 64)

        return training(model, params, preference_loss, compared, params)

    every: Any = np.ones((32, 64), bool)
    if row.startswith("generate"):
        answers = sizes.sampled if row == "generate" else 32

        def sample(state: Any, i: int) -> Any:
            completions = generate(
                model, params, ids(i, answers, 64), every[:answers], jax.random.key(i),
                max_new_tokens=sizes.new, temperature=1.0, eos_id=None, pad_id=0,
            )  # fmt: skip
            assert completions.mask.all()
            return state

        return Work(None, sample, answers * sizes.new)

    # Here, since they bring what reads text, and its memory, along.
    if row.startswith("grpo"):
        return groups(config, params, ids, long=row == "grpo_long")
    from experiments import ppo
    from experiments.bench.programs import ppo_setup
    from rlhf_jax.actor_critic import Frozen, init_state

    keep_freed_memory(params)  # as experiments/ppo.py does

    cfg = ppo.PPO(responses=32, epochs=4, minibatches=4, beta=0.05, learning_rate=1e-4)
    setup = ppo_setup(config, max_new_tokens=64, eos_id=-1, pad_id=0)
    iterate = jax.jit(partial(ppo.iterate, cfg, setup), donate_argnums=0)
    rewards = from_language_model(params, key, config)
    prompts = Prompts(jnp.asarray(ids(0, 32, 64)), jnp.asarray(every), jnp.arange(32))
    frozen = Frozen(params, {"reward_model": rewards}, None)

    def iterate_once(state: Any, i: int) -> Any:
        state, metrics, _ = iterate(state, frozen, prompts, jax.random.key(i))
        float(metrics["loss"])
        return state

    state = init_state(setup, params, rewards, cfg.make_optimizer(1000), cfg.beta)
    return Work(state, iterate_once, 32 * 64, few=True)


def groups(config: Any, params: Any, ids: Callable[[int, int, int], Any], *, long: bool) -> Work:
    """GRPO: 8 answers of 64 tokens to each of 8 prompts of 64, scored by their distinct tokens; one update, β 0.04.

    The update takes 16 rows at a time, which is faster on a CPU, and leaner. `long`: lengths are log-normal, their
    median 8 and their 95th percentile 64, the most; 16 answers are sampled at once.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.grpo import GRPO, algorithm
    from rlhf_jax.batches import Prompts
    from rlhf_jax.groups import Frozen, learn
    from rlhf_jax.models import Transformer
    from rlhf_jax.sampling.queue import generate_queued
    from rlhf_jax.train import keep_freed_memory, make_state

    keep_freed_memory(params)  # as the experiment does
    cfg = GRPO(steps=1000, groups=8, group_size=8, beta=0.04, learning_rate=1e-4, lora_rank=0, accumulate=4)
    numbers, model = cfg.numbers(64), Transformer(config)

    @jax.jit
    def sample(params: Any, prompts: Any, mask: Any, key: Any, limits: Any) -> Any:
        return generate_queued(
            model, params, prompts, mask, key, group_size=8, slots=16 if long else 64, max_new_tokens=64,
            temperature=1.0, eos_id=None, pad_id=0, limits=limits,
        )  # fmt: skip

    learn_fn = jax.jit(partial(learn, algorithm(cfg, numbers), model, numbers, 0), donate_argnums=0)
    frozen, every = Frozen(params, {}, {}), jnp.ones(64, bool)

    def iterate(state: Any, i: int) -> Any:
        prompts: Any = Prompts(*map(jnp.asarray, (ids(i, 8, 64), np.ones((8, 64), bool), np.arange(8))))
        lengths = np.exp(np.log(8) + np.log(8) / 1.645 * np.random.default_rng(i).normal(size=64))
        limits = np.clip(np.round(lengths), 1, 64).astype(np.int32) if long else np.full(64, 64, np.int32)
        completions = jax.device_get(
            sample(state.params, prompts.tokens, prompts.mask, jax.random.key(i), jnp.asarray(limits))
        )
        scores = jnp.asarray([len(set(answer)) / 64 for answer in completions.tokens.tolist()], jnp.float32)
        repeated = jax.tree.map(lambda x: jnp.repeat(x, 8, axis=0), prompts)
        state, metrics = learn_fn(state, frozen, repeated, completions, scores, every, jax.random.key(1000 + i))
        float(metrics["loss"])
        return state

    return Work(make_state(model, params, cfg.make_group_optimizer()), iterate, 64 * 64, few=True)


def measure(row: str, shape: str, steps: int) -> dict[str, Any]:
    """Does the work of a row in this process."""
    work = build(row, shape)
    state, seconds, cold = work.state, [], 0.0
    work = work._replace(state=None)  # it is donated
    dropped, counted = (1, max(1, steps // 3)) if work.few else (3, steps)
    for i in range(dropped + counted):
        began = time.perf_counter()
        state = work.step(state, i)
        seconds.append(time.perf_counter() - began)
        cold = cold or process_age()
    median = statistics.median(seconds[dropped:])
    return {
        "row": row,
        "seconds_per_step": round(median, 4),
        "tokens_per_s": round(work.tokens / median, 1),
        "n": counted,
        "cold_start_s": round(cold, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def process_age() -> float:
    """Seconds since this process was started, imports and all."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main(cfg: Config) -> dict[str, float]:
    """Prints a line a row; returns tokens a second of each."""
    if len(cfg.rows) == 1:
        lines = [measure(cfg.rows[0], cfg.shape, cfg.steps)]
        print(json.dumps(lines[0]), flush=True)
    else:
        lines = []
        for row in cfg.rows:
            command = [sys.executable, __file__, "--rows", row, "--shape", cfg.shape, "--steps", str(cfg.steps)]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(line, end="", flush=True)
            lines.append(json.loads(line))
    return {line["row"]: line["tokens_per_s"] for line in lines}


if __name__ == "__main__":
    from rlhf_jax.cli import run_main

    run_main(main, Config)
