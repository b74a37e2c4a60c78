"""The work that stages share, with the flags that they share: open a task and rewards, fill in numbers, run.

In the controlled world a stage that lacks a policy or a reward model runs the stage that makes it (`made_first`).
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.flags import PRECISIONS, names
from experiments.reports import group_report, preference_report
from rlhf_jax.cli import run_with_report
from rlhf_jax.data.order import RankingStream
from rlhf_jax.data.pairs import Examples, paired, singly
from rlhf_jax.errors import UserError
from rlhf_jax.export import export_policy
from rlhf_jax.group_loop import train_groups
from rlhf_jax.groups import Algorithm, Numbers
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.models import count_weights
from rlhf_jax.preference import ImplicitReward, PreferenceLoss, Trained, train_preferences
from rlhf_jax.pretrained import Pretrained, load_policy
from rlhf_jax.rewards.python import CHECKERS, Limits, is_function
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.sampling.sampler import make_sampler
from rlhf_jax.tasks.measure import (
    PolicySampler,
    compare_policies,
    make_policy_measure,
    make_reward_scorer,
    make_token_scorer,
    pass_metrics,
)
from rlhf_jax.tasks.rewards import Rewards, load_reference, load_rewards
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Comparisons, Task
from rlhf_jax.tasks.text import Source, TextTask
from rlhf_jax.train import give_back_freed_memory, keep_freed_memory
from rlhf_jax.types import Params

MEMBERS = 4
"""Reward models of an ensemble that is made first."""


def or_default(cfg: Any, **numbers: Any) -> Any:
    """The flags, with a number wherever they say None."""
    return replace(cfg, **{name: number for name, number in numbers.items() if getattr(cfg, name) is None})


def pretrained_defaults(cfg: Any, base: Pretrained, *, slower: float = 1.0) -> dict[str, Any]:
    """Numbers for a pretrained model where the flags say None: adapters or weights, learning rate, checkpoints.

    The learning rate is 2e-5 for 8 billion weights and falls with the root of their number; adapters take ten times
    that. Both are at most 1e-3. `slower` divides it.
    """
    size = count_weights(base.params)
    rank = cfg.lora_rank if cfg.lora_rank is not None else (16 if size >= 50_000_000 else 0)
    rate = min(1e-3, 2e-5 * (8e9 / size) ** 0.5 * (10 if rank else 1)) / slower
    return {"lora_rank": rank, "learning_rate": float(f"{rate:.1e}"), "keep": 1}


def again_defaults(cfg: Any, base: Pretrained, rows: int) -> Any:
    """The flags of SFT on a policy's own answers. In the controlled world, where it is trained already, there are
    fewer and smaller steps than SFT's."""
    if base.name is not None:
        return cfg
    return or_default(cfg, steps=max(1, math.ceil(cfg.epochs * rows / min(cfg.batch_size, rows))), learning_rate=1e-3)


def say_defaults(run: Run, stage: str, given: Any, filled: Any, base: Pretrained) -> None:
    """Prints the numbers that were chosen for a pretrained model, and why."""
    if base.name is None:
        return
    size = count_weights(base.params)
    chosen = [
        f"--{flag.name.replace('_', '-')} {getattr(filled, flag.name):g}"
        for flag in fields(filled)
        if getattr(given, flag.name) is None and isinstance(getattr(filled, flag.name), int | float)
    ]
    if chosen:
        run.say(f"{stage}: chosen for a pretrained model of {size / 1e6:.3g} million weights: {' '.join(chosen)}")


def open_task(cfg: Any, run: Run, *, first: str | None = None) -> Task:
    """The model and the data that the flags name; without any files the controlled world.

    There a stage that needs a policy to start from has it made by the stage `first`. Raises UserError for a model
    or files that cannot be used.
    """
    files = cfg.sources()
    run.inputs(
        model=cfg.model, reference=getattr(cfg, "reference", None),
        **{kind: source.names for kind, source in files.items()},
    )  # fmt: skip
    if not files:
        refuse_in_the_world(cfg)
        folder = cfg.model or (made_first(cfg, run, first) / "policy" if first else None)
        base = None if folder is None else say_notes(run, load_policy(str(folder), cfg.layout()))
        keep_freed_memory()
        world = World(cfg.seed, base=base, precision=PRECISIONS[cfg.precision])
        world.eval_batch_size = getattr(cfg, "eval_batch_size", None) or world.eval_batch_size
        return world
    if cfg.model is None:
        raise UserError(f"--{next(iter(files))} needs --model: a Hugging Face folder or hub name to start from")
    base = say_notes(run, load_policy(cfg.model, cfg.layout()))
    give_back_freed_memory(base.params)
    return TextTask(
        base, run, files, seed=cfg.seed, max_length=cfg.max_length,
        max_new_tokens=cfg.max_new_tokens, eval_batch_size=cfg.eval_batch_size, limit=cfg.limit,
        heldout=cfg.heldout, on_bad_row=cfg.on_bad_row, streaming=getattr(cfg, "streaming", False),
        stream_prompts=getattr(cfg, "streams_prompts", False),
        shuffle_window=getattr(cfg, "shuffle_window", None), rows_cache=cfg.rows_cache, num_proc=cfg.num_proc,
    )  # fmt: skip


def open_own(
    cfg: Any, task: Task, run: Run, files: Mapping[str, Sequence[Path]], *, columns: tuple[str, ...] = ()
) -> TextTask:
    """Files that this run writes, by their kind, with the user's own of that kind, as a stage on its own reads them.

    They are read when they are asked for, the run's own ones whole. A row that cannot be used is counted. As a run
    writes more, none that was trained on is held out (`split_by_hash`).
    """
    sources = {
        kind: Source(
            kind, (*map(str, some), *names(getattr(cfg, kind, None))), columns=columns, own=len(some),
            clamp=cfg.comparisons_clamp if kind == "comparisons" else None,
        )
        for kind, some in files.items()
    }  # fmt: skip
    return TextTask(
        task.base, run, sources, seed=cfg.seed, max_length=cfg.max_length, max_new_tokens=task.max_new_tokens,
        eval_batch_size=task.eval_batch_size, limit=cfg.limit, heldout=cfg.heldout, on_bad_row="skip", streaming=False,
        growing=True, rows_cache=cfg.rows_cache, num_proc=cfg.num_proc,
    )  # fmt: skip


def say_notes(run: Run, model: Pretrained) -> Pretrained:
    """The same model; the run says what of its folder is not used."""
    for note in model.notes:
        run.say(note)
    return model


def refuse_in_the_world(cfg: Any) -> None:
    """Raises UserError for a flag that is about files, where there are none: nothing is passed over in silence."""
    unused = {"max_length": None, "max_new_tokens": None, "limit": None, "streaming": False, "on_bad_row": "stop",
              "rows_cache": None, "num_proc": None}  # fmt: skip
    for name, default in unused.items():
        if getattr(cfg, name, default) != default:
            raise UserError(f"--{name.replace('_', '-')} is about files, and without files nothing would use it")
    for name in ("scan_layers", "remat"):
        if cfg.model is None and getattr(cfg, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} is about a model that is read, and there is no --model")


def made_first(cfg: Any, run: Run, name: str, **given: Any) -> Path:
    """The folder of another stage inside of this run's. The stage is run now, if it has not been."""
    folder = run.dir / name
    begun, done = from_first(lambda: [(folder / file).exists() for file in ("config.json", "summary.json")])
    if not done:
        stage = importlib.import_module(f"experiments.{name}")
        run.say(f"{name} comes first: {folder}")
        shared = {flag: getattr(cfg, flag) for flag in ("seed", "precision", "mesh")}
        run.keep_folder()
        stage.main(stage.Config(run_dir=str(folder), resume=begun, **shared, **given))
    return folder


def member_names(members: int) -> tuple[str, ...]:
    """The names of reward models that are trained together, in the run and as its folders."""
    if members == 1:
        return ("reward_model",)
    return tuple(f"reward_model_{number}" for number in range(1, members + 1))


def policy_sampler(cfg: Any, task: Task, temperature: float = 1.0) -> PolicySampler:
    """Samples answers; policies are measured at temperature 1."""
    base = task.base
    return make_sampler(
        base.config, seed=cfg.seed, max_new_tokens=task.max_new_tokens, temperature=temperature, eos_id=base.eos_id,
        pad_id=base.pad_id, batch_size=task.eval_batch_size,
    )  # fmt: skip


def open_reference(cfg: Any, run: Run, task: Task) -> Params | None:
    """The parameters of --reference; None where it is what training starts from."""
    if cfg.reference is None:
        return None
    return load_reference(cfg.reference, task.base, cfg.layout(), say=run.say)


@contextmanager
def open_rewards(
    cfg: Any, run: Run, task: Task, *, failed_score: float, verifiable: bool = False
) -> Iterator[Rewards]:
    """The rewards that the flags name, while the `with` lasts.

    In the controlled world without any, a reward model is made first, for an ensemble several; the world's checker if
    `verifiable`. An answer on which a function fails has the `failed_score`.
    Raises UserError without any reward, and for what cannot be read.
    """
    models, functions = names(cfg.reward_model), names(cfg.reward)
    watched = names(cfg.watch)
    # The checkers that are here already are part of the commit.
    own, seen = ([text for text in some if text not in CHECKERS] for some in (functions, watched))
    run.inputs(reward_model=models, reward=[text.rpartition(":")[0] for text in own],
               watch=[text.rpartition(":")[0] if is_function(text) else text for text in seen])  # fmt: skip
    others = []
    if not models and not functions and isinstance(task, World) and verifiable and not cfg.reward_ensemble:
        others = [task.checker()]
    elif not models and not functions and isinstance(task, World):
        members = MEMBERS if cfg.reward_ensemble else 1
        model = cfg.model or str(run.dir / "sft" / "policy")
        folder = made_first(cfg, run, "reward_model", model=model, members=members)
        models = tuple(str(folder / name) for name in member_names(members))
    with load_rewards(
        task, policy_sampler(cfg, task), models=models, functions=functions, weights=cfg.reward_weights,
        watched=watched, layout=cfg.layout(),
        limits=Limits(seconds=cfg.reward_time_limit, jobs=cfg.reward_jobs), failed_score=failed_score,
        max_failed_share=cfg.reward_max_failed, others=others, say=run.say, ensemble=cfg.ensemble(),
    ) as rewards:  # fmt: skip
        yield rewards


def preference_defaults(cfg: Any, base: Pretrained, rows: int | None, learning_rate: float) -> Any:
    """The flags of a preference loss, with numbers where none are given; a stream has no number of rows."""
    if rows is None:
        return or_default(cfg, steps=1000, batch_size=8, **pretrained_defaults(cfg, base, slower=10.0))
    if base.name is None:
        return or_default(cfg, steps=200, batch_size=64, learning_rate=learning_rate, lora_rank=0)
    size = min(rows, cfg.batch_size or 8)
    return or_default(cfg, steps=max(1, rows // size), batch_size=8, **pretrained_defaults(cfg, base, slower=10.0))


def train_preference(
    cfg: Any,
    loss: PreferenceLoss,
    implicit_reward: ImplicitReward,
    base: Pretrained,
    examples: Examples | RankingStream,
    comparisons: Comparisons | None,
    run: Run,
    seed: int,
    *,
    stage: str,
    eval_batch_size: int,
    reference: Params | None = None,
    mismatched: bool = False,
    measure: Callable[[Params, Params, int], dict[str, Any]] | None = None,
) -> Trained:
    """`train_preferences` with the numbers of the flags."""
    filled = preference_defaults(
        cfg, base, None if isinstance(examples, RankingStream) else len(examples.groups), 5e-4
    )
    say_defaults(run, stage, cfg, filled, base)
    show = ("loss", "val_accuracy", "kl_k1", "utility")
    return train_preferences(
        loss, implicit_reward, base, examples, None if comparisons is None else comparisons.heldout,
        filled.make_loop(run, stage, filled.steps, show=show, log_every=20), seed,
        split=filled.split_trainable, optimizer=filled.make_optimizer(filled.steps), batch_size=filled.batch_size,
        accumulate=filled.accumulate, packed=comparisons is None or comparisons.packed,
        eval_batch_size=eval_batch_size, evaluations=filled.evaluations, reference=reference, mismatched=mismatched,
        measure=measure,
    )  # fmt: skip


def preference_stage(
    cfg: Any,
    stage: str,
    who: str,
    loss: PreferenceLoss,
    implicit_reward: ImplicitReward,
    *,
    single: bool = False,
    soft: bool = False,
) -> dict[str, float]:
    """A run of one preference loss: reads, trains, compares the policy with where it started, exports.

    `single`: the loss takes answers one by one (KTO), from `--unpaired` or from comparisons taken apart. `soft`: it
    has soft labels, a doubt of each pair. Raises UserError for a stream of what is not pairs.
    """
    if cfg.streaming and (single or cfg.pairs == "all"):
        what = f"{who} sets answers beside those to other prompts" if single else "--pairs all takes rankings apart"
        raise UserError(f"--streaming is not used here: {what}, and a stream gives each ranking's best and worst")
    with run_with_report(cfg, stage, preference_report(stage, who)) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        alone = single and cfg.unpaired
        comparisons = None if alone else task.comparisons(partial(sampler, task.base.params))
        examples: Examples | RankingStream
        if comparisons is None:
            assert isinstance(task, TextTask)
            examples = task.unpaired()
        else:
            if any(ranking.margin for ranking in comparisons.train):
                run.warn(f"{stage} has no margin between answers: the column 'margin' is not used")
            if not soft and any(ranking.doubt for ranking in comparisons.train):
                run.warn(f"{stage} has no soft labels: the column 'probability' only says which answer is better")
            pairs = paired(comparisons.train, cfg.pairs)
            examples = comparisons.stream or (singly(pairs) if single else pairs)
        trained = train_preference(
            cfg, loss, implicit_reward, task.base, examples, comparisons, run, cfg.seed, stage=stage,
            eval_batch_size=task.eval_batch_size, reference=open_reference(cfg, run, task), mismatched=single,
            measure=make_policy_measure(task, sampler, task.eval_batch_size),
        )  # fmt: skip
        task.finish()
        metrics = {f"{stage}_{name}": value for name, value in trained.metrics.items()}
        metrics |= task.facts | ({} if comparisons is None else comparisons.facts)
        metrics |= compare_policies(
            run,
            task,
            ("start", task.base.params),
            (stage, trained.params),
            sampler,
            make_token_scorer(task, trained.reward),
        )
        run.summary(metrics)
        export_policy(run, task.base, trained.params, algorithm=who, metrics=metrics)
    return metrics


def group_stage(cfg: Any, stage: str, who: str, make_algorithm: Callable[[Numbers], Algorithm]) -> dict[str, float]:
    """A run of one algorithm without a critic: reads, trains, compares the policy with where it started, exports.

    Raises UserError for a reference that the algorithm does not read.
    """
    with run_with_report(cfg, stage, group_report(stage, who)) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        algorithm = make_algorithm(cfg.numbers(task.max_new_tokens))
        if cfg.reference is not None and not (algorithm.kl_in_loss or algorithm.kl_in_reward):
            raise UserError(f"--reference is not used: {who} has no KL to a reference here (no beta, or --beta 0)")
        reference = open_reference(cfg, run, task)
        with open_rewards(cfg, run, task, failed_score=0.0, verifiable=True) as (rewards, _, watch, _):
            policy, metrics = train_without_critic(
                cfg, algorithm, task, task.base, rewards, run, cfg.seed, stage=stage, reference=reference, watch=watch
            )
            task.finish()
            measured = make_policy_measure(task, sampler, task.eval_batch_size)(policy, task.base.params, 100)
            metrics[f"{stage}_heldout_kl"] = float(measured["kl_k1"])
            policies, scorer = (("start", task.base.params), (stage, policy)), make_reward_scorer(task, rewards, None)
            metrics |= task.facts | compare_policies(run, task, *policies, sampler, scorer)
            samples = group_defaults(cfg, task.base).pass_samples
            for name, params in policies if samples else ():
                metrics |= pass_metrics(task, name, params, sampler, rewards, samples)
        run.summary(metrics)
        export_policy(run, task.base, policy, algorithm=who, metrics=metrics)
    return metrics


def train_without_critic(
    cfg: Any,
    algorithm: Algorithm,
    task: Task,
    base: Pretrained,
    rewards: Sequence[Reward],
    run: Run,
    seed: int,
    *,
    stage: str,
    reference: Params | None = None,
    watch: Callable[[Params, int], dict[str, Any]] | None = None,
) -> tuple[Params, dict[str, float]]:
    """`train_groups` with the numbers of the flags."""
    filled = group_defaults(cfg, base)
    say_defaults(run, stage, cfg, filled, base)
    keep_freed_memory(base.params)
    numbers = filled.numbers(task.max_new_tokens)
    return train_groups(
        algorithm, numbers, base, task.prompts(), rewards, filled.make_group_loop(run, stage), seed,
        split=filled.split_trainable, adapters=bool(filled.lora_rank), optimizer=filled.make_group_optimizer(),
        evaluations=filled.evaluations, reference=reference, judge=task.judge, watch=watch,
    )  # fmt: skip


def group_defaults(cfg: Any, base: Pretrained) -> Any:
    """The flags of an algorithm without a critic, with numbers where none are given."""
    if base.name is None:
        return or_default(cfg, steps=60, learning_rate=5e-4, lora_rank=0, pass_samples=8)
    return or_default(cfg, steps=100, pass_samples=0, **pretrained_defaults(cfg, base, slower=10.0))
