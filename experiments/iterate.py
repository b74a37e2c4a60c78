"""The pipeline as a loop: the policy's own answers are labelled, the reward model learns on, and the policy again.

Bai et al. 2022, §4.5 (iterated online RLHF, https://arxiv.org/abs/2204.05862); Touvron et al. 2023, §3
(https://arxiv.org/abs/2307.09288). In each round the last policy answers prompts that have no labels yet. Some are
labelled, at random or where the reward model is least certain. The reward model goes on from the last one, on all
labels so far, and another round of PPO starts from SFT or from the last policy.
    python experiments/iterate.py
    python experiments/iterate.py --model FOLDER --prompts FILE --comparisons FILE
    python experiments/iterate.py --model FOLDER --prompts FILE --judge FOLDER
    python experiments/iterate.py --model FOLDER --prompts FILE --people
In the controlled world SFT comes first, and the world's annotators label. On real text a judge does, by default the
model itself. With --people the run writes round-k/to_label.jsonl and stops; put chosen and rejected of each row into
round-k/comparisons.jsonl and --resume. It leaves round-k/policy/ and round-k/reward_model/ in the run's folder.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments import dpo, ppo, reward_model
from experiments.dpo import DPO
from experiments.flags import (
    ComparisonFlags,
    Flags,
    JudgeFlags,
    ModelFlags,
    PromptFlags,
    RunFlags,
    SamplingFlags,
    refuse_forms,
    refuse_without_files,
)
from experiments.judging import load_judge, open_judge
from experiments.ppo import PPO
from experiments.reports import ITERATE_REPORT
from experiments.reward_model import RewardModel, member_seed
from experiments.stages import open_own, open_task, or_default, policy_sampler, train_preference
from rlhf_jax.batches import Prompts
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.pairs import paired
from rlhf_jax.data.tokens import join, take
from rlhf_jax.ensemble import ensemble_reward, label_value
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy, export_reward_model
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.models import ScalarModel, merge_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.revision import Said, as_conversation, compared, learnable, read
from rlhf_jax.rewards.judge import both_orders, comparing, in_words
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.row_file import read_rows
from rlhf_jax.scoring import response_rewards, score_in_batches
from rlhf_jax.tasks.measure import PolicySampler, compare_policies, make_policy_measure, make_reward_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Comparisons, Task
from rlhf_jax.tasks.text import Source
from rlhf_jax.types import Params

Label = Callable[[Sequence[Any], Sequence[Sequence[str]], int], list[dict[str, Any] | None]]
"""label(prompts, answers, number) -> for each prompt the columns of a comparison; None where the judge fails."""


@dataclass(frozen=True)
class IterateFlags(Flags):
    """The flags of the loop alone."""

    rounds: int = 3
    labels: int | None = None
    """Prompts whose answers are labelled in a round. By default 1024 in the controlled world, else 256."""
    answers: int | None = None
    """Answers to each prompt that are ranked together. By default 8 in the controlled world, else 2, which is what a
    judge and people are asked about."""
    choose: Literal["random", "uncertain"] = "random"
    """The prompts that are labelled: at random, or where the members of the reward model disagree most about the
    answers; of one member, where it finds them most alike. In a round without a reward model at random."""
    people: bool = False
    """People label: the run stops in each round and waits for their file."""
    members: int = 1
    """Reward models, trained from seeds of their own; their mean is the reward."""
    learner: Literal["ppo", "dpo"] = "ppo"
    """The algorithm of the policy: PPO against the reward model, or DPO on all labels so far (iterated DPO, Xiong et
    al. 2023, https://arxiv.org/abs/2312.11456), for which the reward model only chooses and measures."""
    start: Literal["sft", "last"] = "sft"
    """The policy starts from the model that was given, or from the last round's. The KL is to the former."""

    def __post_init__(self) -> None:
        at_least(self, rounds=1, members=1)
        if self.labels is not None:
            at_least(self, labels=2)
        if self.answers is not None:
            at_least(self, answers=2)
        super().__post_init__()


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, JudgeFlags, PromptFlags, ComparisonFlags, ModelFlags, IterateFlags):
    """Rounds of labels, reward model and PPO."""

    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)
    dpo: DPO = field(default_factory=DPO)

    def __post_init__(self) -> None:
        """Raises UserError for flags about the form of files, and for those that nothing here would use."""
        refuse_forms(self, "comparisons")
        if self.streaming:
            raise UserError("--streaming is not used here: each round learns from all comparisons so far")
        refuse_without_files(self, "judge", "people")
        if self.people and self.judge:
            raise UserError("--people and --judge are two answers to the question who labels: give one")
        super().__post_init__()

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. --comparisons-clamp is for the run's own labels, too."""
        plain = self if self.comparisons_clamp is None else replace(self, comparisons_clamp=None)
        return super(Config, plain).sources()


def with_defaults(cfg: Any, task: Task) -> Any:
    """The flags, with numbers where none are given. Raises UserError for rankings that nobody is asked for."""
    if isinstance(task, World):
        return or_default(cfg, labels=1024, answers=8)
    filled = or_default(cfg, labels=256, answers=2)
    if filled.answers != 2:
        raise UserError(f"answers is {filled.answers}; a judge and people are asked about 2 on real text")
    return filled


CANDIDATES = 4
"""Prompts that are answered for each one that is labelled, where the reward model chooses."""


def unlabelled(run: Run, task: Task, number: int, seed: int) -> np.ndarray:
    """Rows of the training prompts, in a random order, without those of earlier rounds."""
    files = [
        run.dir / f"round-{k}" / name for k in range(1, number) for name in ("comparisons.jsonl", "to_label.jsonl")
    ]
    used = from_first(
        lambda: [row["row"] for file in files if file.exists() for row in read_rows(file) if "row" in row]
    )
    rows = np.setdiff1d(np.arange(len(task.prompts().train.row)), np.asarray(used, int))
    return np.random.default_rng([seed, 13, number]).permutation(rows)


def different(answers: Sequence[Said]) -> list[int]:
    """The places of answers with words and an end, each text once."""
    places = {answer.text: place for place, answer in reversed(list(enumerate(answers))) if learnable(answer)}
    return sorted(places.values())


def answer_prompts(
    cfg: Any, task: Task, run: Run, sampler: PolicySampler, policy: Params, members: Sequence[Params], number: int,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers of the policy to the prompts of a round that are to be labelled: rows with prompt and responses.

    An answer that is empty, does not end, or was given already is left out, and so is a prompt with fewer than two.
    """
    sets, base, uncertain = task.prompts(), task.base, cfg.choose == "uncertain" and bool(members)
    rows, size = unlabelled(run, task, number, seed), max(1, task.eval_batch_size // cfg.answers)
    score = score_in_batches(partial(response_rewards, ScalarModel(base.config)), task.eval_batch_size)
    found: list[dict[str, Any]] = []
    values: list[float] = []
    wanted = cfg.labels * (CANDIDATES if uncertain else 1)
    for start in range(0, len(rows), size):
        if len(found) >= wanted:
            break
        some = rows[start : start + size]
        prompts = take(sets.train, np.repeat(some, cfg.answers))
        answers = sampler(policy, prompts, 80_000_000 + number)
        said = read(base, answers)
        tokens = join(prompts, answers, pad_id=base.pad_id)
        scores = np.stack([np.asarray(score(params, tokens)) for params in members]) if uncertain else None
        for place, row in enumerate(some.tolist()):
            first = place * cfg.answers
            kept = [first + other for other in different(said[first : first + cfg.answers])]
            if len(kept) < 2:
                continue
            asked = sets.rows[int(sets.train.row[row])].asked()
            found.append({"row": row, **asked, "responses": [said[other].text for other in kept]})
            values.append(0.0 if scores is None else float(label_value(scores[:, None, kept])[0]))
    best = np.argsort(-np.asarray(values[:wanted]), kind="stable")[: cfg.labels]
    return [found[place] for place in best]


def label_round(run: Run, asked: Callable[[], list[dict[str, Any]]], label: Label | None, number: int) -> None:
    """Writes round-<number>/comparisons.jsonl, if it is not there. Raises UserError where people are to write it."""
    folder = run.dir / f"round-{number}"
    file, waiting = folder / "comparisons.jsonl", folder / "to_label.jsonl"
    if from_first(file.exists):
        return
    if label is not None or not from_first(waiting.exists):
        rows = asked()
        if not rows:
            raise UserError(f"round {number}: no prompt has two different answers that end: raise --max-new-tokens")
        labels = label([row["prompt"] for row in rows], [row["responses"] for row in rows], number) if label else rows
        kept = [{name: value for name, value in row.items() if name != "responses"} | found
                for row, found in zip(rows, labels, strict=True) if found is not None]  # fmt: skip
        from_first(lambda: write_lines(waiting if label is None else file, kept))
        if label is not None:
            run.say(
                f"round {number}: {len(kept)} labels in {file}; of {len(rows) - len(kept)} others the judge has none"
            )
            if not kept:
                raise UserError(f"round {number}: the judge has no label for any of {len(rows)} prompts")
            return
    run.keep_folder()
    raise UserError(
        f"round {number}: the rows of {waiting} wait for people: write prompt, chosen and rejected of each to {file},"
        " and --resume"
    )


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a file whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)


class Labels(NamedTuple):
    """A labeller; None where people label. `metrics()` says what it cost."""

    label: Label | None
    metrics: Callable[[], dict[str, float]] = dict


@contextmanager
def open_labels(cfg: Any, run: Run, task: Task, sampler: PolicySampler) -> Iterator[Labels]:
    """The labels of the world's annotators or of the judge, while the `with` lasts; None where people give them."""
    if isinstance(task, World):
        yield Labels(world_labels(task, partial(sampler, task.base.params)))
        return
    if cfg.people:
        yield Labels(None)
        return
    run.inputs(judge=cfg.judge)
    model = load_judge(cfg) if cfg.judge else task.base
    if not cfg.judge:
        run.say("the model itself is the judge; give another one with --judge, or label with --people")
    length = cfg.max_length or 2048 if model is None else model.config.max_length
    asked = {"batch_size": task.eval_batch_size, "max_length": length, "questions": 2 * cfg.rounds * cfg.labels}
    with open_judge(cfg, run, model, **asked) as judge:

        def label(
            prompts: Sequence[Any], answers: Sequence[Sequence[str]], number: int
        ) -> list[dict[str, Any] | None]:
            first, second = ([texts[side] for texts in answers] for side in (0, 1))
            words = [in_words(as_conversation(prompt)) for prompt in prompts]
            p = np.mean(both_orders(comparing(judge.ask), words, first, second), axis=0)
            return [compared(*some) for some in zip(prompts, first, second, p.tolist(), strict=True)]

        yield Labels(label, judge.metrics)


def world_labels(world: World, sampler: Callable[[Prompts, int], Any]) -> Label:
    """The world's annotators, whose noise is set by the answers of the policy that all begins with."""
    annotators = world.annotators(sampler)

    def label(prompts: Sequence[Any], answers: Sequence[Sequence[str]], number: int) -> list[dict[str, Any] | None]:
        ranks = world.rank_texts(annotators, prompts, answers, number)
        return [{"responses": list(texts), "ranks": some} for texts, some in zip(answers, ranks, strict=True)]

    return label


def make_reward(cfg: Any, task: Task, members: Sequence[Params]) -> Reward:
    """The mean of the members' scores."""
    if len(members) == 1:
        return model_reward(task.base.config, members[0], name="reward_model", weight=1.0)
    return ensemble_reward(task.base.config, members, combine="mean", lam=0.0, name="reward_model", weight=1.0)


def run_rounds(
    cfg: Any, task: Task, run: Run, sampler: PolicySampler, label: Label | None, seed: int
) -> Iterator[tuple[int, Params, list[Params], dict[str, float]]]:
    """The rounds, one after the other: (number, policy, members of the reward model, metrics).

    No label that a reward model has learned is held out in a later round, but where `split_by_hash` finds none.
    """
    policy, members = task.base.params, list[Params]()
    sets, size = task.prompts(), task.eval_batch_size
    # Bradley-Terry leaves the mean open: the first policy's answers score 0, in each round.
    zero = join(sets.heldout, sampler(policy, sets.heldout, 70_000_000), pad_id=task.base.pad_id)
    for number in range(1, cfg.rounds + 1):
        asked = partial(answer_prompts, cfg, task, run, sampler, policy, members, number, seed)
        label_round(run, asked, label, number)
        files = [run.dir / f"round-{k}" / "comparisons.jsonl" for k in range(1, number + 1)]
        comparisons = open_own(cfg, task, run, {"comparisons": files}).comparisons(partial(sampler, policy))
        trained = [
            reward_model.train(
                cfg.reward_model, task.base, comparisons, run, member_seed(seed, member), eval_batch_size=size,
                zero=zero, start=members[member] if members else None, stage=reward_stage(number, member),
            )
            for member in range(cfg.members)
        ]  # fmt: skip
        members = [merge_lora(params) for params, _ in trained]
        began = task.base._replace(params=policy if cfg.start == "last" else task.base.params)
        if cfg.learner == "dpo":
            policy, found = learn_by_dpo(cfg, task, began, comparisons, run, seed, number)
        else:
            policy, found = ppo.train(
                cfg.ppo, began, sets, [make_reward(cfg, task, members)], run, seed + number,
                max_new_tokens=task.max_new_tokens, critic=(task.base.config, members[0]), reference=task.base.params,
                judge=task.judge, stage=f"ppo-{number}",
            )  # fmt: skip
        policy = merge_lora(policy)
        labels = float(sum(1 for file in files for _ in read_rows(file)))
        yield number, policy, members, trained[0][1] | found | {"labels": labels}


def learn_by_dpo(
    cfg: Any, task: Task, began: Pretrained, comparisons: Comparisons, run: Run, seed: int, number: int
) -> tuple[Params, dict[str, float]]:
    """A round of DPO on all labels so far; the reference is the model that all began with."""
    stage = f"dpo-{number}"
    trained = train_preference(
        cfg.dpo, partial(dpo.loss, cfg.dpo), partial(dpo.reward, cfg.dpo), began,
        paired(comparisons.train, cfg.dpo.pairs), comparisons, run, seed + number, stage=stage,
        eval_batch_size=task.eval_batch_size, reference=task.base.params,
    )  # fmt: skip
    return trained.params, {f"{stage}_{name}": value for name, value in trained.metrics.items()}


def reward_stage(number: int, member: int) -> str:
    """The stage of a member of a round's reward model."""
    return f"reward_model-{number}" + (f"-member-{member + 1}" if member else "")


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Runs the rounds, measures and exports each one's policy and reward model; returns the last one's metrics."""
    with run_with_report(cfg, "iterate", ITERATE_REPORT) as run:
        task = open_task(cfg, run, first="sft")
        sampler, filled = policy_sampler(cfg, task), with_defaults(cfg, task)
        measure = make_policy_measure(task, sampler, task.eval_batch_size)
        metrics = dict(task.facts)
        if cfg.comparisons:
            task.comparisons(partial(sampler, task.base.params))  # what is wrong with them is said now
        with open_labels(filled, run, task, sampler) as labels:
            for number, policy, members, found in run_rounds(filled, task, run, sampler, labels.label, cfg.seed):
                folder = f"round-{number}"
                scorer = make_reward_scorer(task, [make_reward(filled, task, members)], cfg.ppo.no_end_score)
                after = compare_policies(run, task, ("start", task.base.params), ("policy", policy), sampler, scorer)
                after["policy_kl"] = float(measure(policy, task.base.params, 300)["kl_k1"])
                shown = {"score": "policy_score", "utility": "policy_utility", "kl": "policy_kl"}
                run.log("rounds", number, {
                    "labels": found["labels"], "val_accuracy": found[f"reward_model-{number}_val_accuracy"],
                    **{name: after[theirs] for name, theirs in shown.items() if theirs in after},
                })  # fmt: skip
                metrics |= found | after | labels.metrics()
                export_policy(run, task.base, policy, algorithm="Iterated RLHF", metrics=after,
                              folder=f"{folder}/policy")  # fmt: skip
                for member, params in enumerate(members, 1):
                    export_reward_model(
                        run, task.base, params, algorithm="Bradley-Terry reward model, on all rounds' labels",
                        metrics=found, name=f"{folder}/reward_model" + f"_{member}" * (len(members) > 1),
                    )  # fmt: skip
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
