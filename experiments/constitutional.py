"""Constitutional AI: a model revises its own answers by principles, and prefers by principles between two of them.

Bai et al. 2022 (https://arxiv.org/abs/2212.08073). First stage: answer → critique → revision, a principle drawn each
time; the last revisions, and demonstrations if there are any, are learned by SFT. Second stage: the new policy gives
two answers to each prompt, the feedback model says by a drawn principle how likely the first is better, and these
soft labels, with human comparisons if there are any, are learned by DPO.
Deviation: the model itself learns the last revisions; the paper trains a pretrained model on those of all steps.
    python experiments/constitutional.py
    python experiments/constitutional.py --model FOLDER --prompts FILE --constitution FILE
It takes about 4 minutes on 2 CPU cores. In the controlled world it runs SFT first; assistants that see some of an
answer's faults criticise and revise it, and the judge is the world's annotators. The run's folder has chains.jsonl
(every text), revisions.jsonl, comparisons.jsonl, revised/ and policy/. The paper's second stage is a reward model and
PPO, from the same files:
    python experiments/reward_model.py --model RUN/revised --comparisons RUN/comparisons.jsonl
    python experiments/ppo.py --model RUN/revised --reward-model FOLDER --prompts FILE
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments import dpo, sft
from experiments.dpo import DPO
from experiments.flags import (
    ComparisonFlags,
    DemonstrationFlags,
    Flags,
    JudgeFlags,
    ModelFlags,
    PromptFlags,
    RunFlags,
    SamplingFlags,
    refuse_forms,
    refuse_without_files,
)
from experiments.judging import load_judge, load_watched, open_judge, watch_revisions
from experiments.reports import CONSTITUTIONAL_REPORT
from experiments.sft import SFT
from experiments.stages import again_defaults, open_own, open_task, policy_sampler, train_preference
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.constitution import SHIPPED, Principle, read_constitution
from rlhf_jax.data.pairs import paired
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.preference import Trained
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.revision import (
    Reviser,
    as_conversation,
    asked_in,
    chain_row,
    compared,
    draw_principles,
    make_reply,
    make_reviser,
    read,
    revise_answers,
    texts_of,
)
from rlhf_jax.rewards.judge import both_orders, comparing, in_words
from rlhf_jax.row_file import read_rows, write_parts
from rlhf_jax.simulation import PRINCIPLES, Annotators, Revisers
from rlhf_jax.tasks.measure import PolicySampler, compare_policies, make_policy_measure, make_token_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Task
from rlhf_jax.tasks.text import Source, TextTask
from rlhf_jax.types import Params

NOISE = 0.7
"""The noise of the world's judge."""
CHAINS = 8
"""Chains in the report."""


@dataclass(frozen=True)
class ConstitutionalFlags(Flags):
    """The flags of Constitutional AI alone."""

    constitution: str | None = None
    """A JSON file of principles, in the form of the paper's own; by default a short one of ours."""
    revisions: int = 2
    """Critiques and revisions of each answer; the paper has up to 4."""
    examples: int = 2
    """Conversations of the constitution that show a critique and a revision before each one that is asked for."""
    temperature: float = 1.0
    """The temperature of answers, critiques and revisions; a small model says more sense at 0.5."""
    watch: str | tuple[str, ...] | None = None
    """Folders of reward models that only score: how often each likes a revision better than the answer."""

    def __post_init__(self) -> None:
        at_least(self, revisions=0, examples=0, temperature=1e-3)
        super().__post_init__()


@dataclass(frozen=True)
class Config(
    RunFlags, SamplingFlags, JudgeFlags, PromptFlags, DemonstrationFlags, ComparisonFlags, ModelFlags,
    ConstitutionalFlags,
):  # fmt: skip
    """Constitutional AI: revisions by principles, and preferences of a judge. The judge is by default the model."""

    sft: SFT = field(default_factory=SFT)
    dpo: DPO = field(default_factory=DPO)

    def __post_init__(self) -> None:
        """Raises UserError for flags about the form of files, and for those that nothing here would use."""
        refuse_forms(self, "demonstrations", "comparisons")
        refuse_without_files(self, "constitution", "judge", "watch")
        if self.streaming:
            raise UserError("--streaming is not used here")
        super().__post_init__()

    def sources(self) -> dict[str, Source]:
        """All files that the flags name, by their kind. --comparisons-clamp is for the run's own labels, too."""
        plain = self if self.comparisons_clamp is None else replace(self, comparisons_clamp=None)
        return super(Config, plain).sources()


class Assistant(NamedTuple):
    """A reviser of answers, and a judge that says which of two is better."""

    principles: Sequence[Principle]
    questions: Sequence[str]
    revise: Reviser
    prefer: Callable[[Sequence[str], Sequence[str], Sequence[str], Sequence[str]], np.ndarray]
    """prefer(prompts, first, second, questions) -> [N]: how likely the first is better; NaN where the judge fails."""
    metrics: Callable[[], dict[str, float]] = dict
    """metrics() -> what the judge cost."""


@contextmanager
def open_assistant(cfg: Config, run: Run, task: Task, sampler: PolicySampler) -> Iterator[Assistant]:
    """The assistant of the flags, while the `with` lasts: the model itself and the judge, or the world's.

    Raises UserError for a constitution or a judge that cannot be read.
    """
    if isinstance(task, World):
        yield world_assistant(task, Annotators(noise=NOISE), Revisers())
        return
    constitution = read_constitution(cfg.constitution or SHIPPED)
    run.inputs(constitution=cfg.constitution, judge=cfg.judge)
    for note in constitution.notes:
        run.say(note)
    assert isinstance(task, TextTask)
    examples = constitution.examples[: cfg.examples]
    reply = make_reply(
        task.base, lambda prompts, number: sampler(task.base.params, prompts, 40_000_000 + number),
        max_length=task.longest_prompt, examples=sum(map(len, examples)),
    )  # fmt: skip
    model = load_judge(cfg) if cfg.judge else task.base
    size, length = task.eval_batch_size, task.longest_prompt if model is None else model.config.max_length
    questions = 2 * len(task.prompts().train.row)
    with open_judge(cfg, run, model, batch_size=size, max_length=length, questions=questions) as judge:

        def prefer(
            prompts: Sequence[str], first: Sequence[str], second: Sequence[str], questions: Sequence[str]
        ) -> np.ndarray:
            return np.mean(both_orders(comparing(judge.ask, questions), prompts, first, second), axis=0)

        yield Assistant(
            constitution.principles, constitution.questions, make_reviser(reply, examples), prefer, judge.metrics
        )


def world_assistant(world: World, annotators: Annotators, revisers: Revisers) -> Assistant:
    """Assistants that revise by the world's principles, and annotators as its judge, whatever the question is."""
    judge = world.pair_judge(annotators)
    return Assistant(
        PRINCIPLES, ("",), world.reviser(revisers),
        lambda prompts, first, second, questions: np.asarray(judge(prompts, first, second)),
    )  # fmt: skip


def revise_prompts(
    cfg: ConstitutionalFlags, task: Task, run: Run, sampler: PolicySampler, assistant: Assistant, seed: int
) -> None:
    """Answers all prompts and revises the answers: chains.jsonl."""
    sets, size = task.prompts(), task.eval_batch_size

    def make(part: range) -> list[dict[str, Any]]:
        prompts = take(sets.train, np.asarray(part))
        asked = [sets.rows[row].prompt for row in prompts.row.tolist()]
        answers = read(task.base, sampler(task.base.params, prompts, 30_000_000))
        drawn = draw_principles(seed, part, cfg.revisions, len(assistant.principles))
        chains = revise_answers(
            assistant.revise, [as_conversation(prompt) for prompt in asked], answers, assistant.principles, part,
            drawn,
        )  # fmt: skip
        fields = [sets.rows[row].asked() for row in prompts.row.tolist()]
        return [chain_row(*some) for some in zip(chains, fields, part, strict=True)]

    write_parts(run, "revisions", run.dir / "chains.jsonl", len(sets.train.row), size, make)


def write_revisions(run: Run, chains: Path, revision: int = -1) -> None:
    """Writes the last revision of each whole chain to revisions.jsonl, or one by its number; 0 is the answer.

    Raises UserError where no chain is whole.
    """
    file = run.dir / "revisions.jsonl"

    def write() -> dict[str, int]:
        unlearned: Counter[str] = Counter()
        with open(file, "w", encoding="utf-8") as lines:
            for row in read_rows(chains):
                unlearned[row["unlearned"]] += 1
                if not row["unlearned"]:
                    found = asked_in(row) | {"completion": texts_of(row)[revision], "row": row["row"]}
                    lines.write(json.dumps(found, ensure_ascii=False) + "\n")
        return dict(unlearned)

    counts = from_first(write)
    count, whole = sum(counts.values()), counts.pop("", 0)
    run.say(f"revisions: {file} ({whole} of {count} prompts)")
    for reason, number in counts.items():
        run.say(f"{number} prompts have no revision to learn: {reason}")
    if not whole:
        raise UserError("no answer could be revised, so there is nothing to learn from: " + ", ".join(counts))


def log_revisions(run: Run, world: World, most: int = 2000) -> None:
    """True utility of answers and of each of their revisions, where the chain is whole; logged with its number."""
    rows = [row for row in islice(read_rows(run.dir / "chains.jsonl"), most) if not row["unlearned"]]
    for number, texts in enumerate(zip(*map(texts_of, rows), strict=True)):
        utility = world.utilities([row["prompt"] for row in rows], texts).mean()
        run.log("chains", number, {"utility": utility, "words": np.mean([len(text.split()) for text in texts])})


def own_data(cfg: Config, task: Task, run: Run) -> TextTask:
    """Rows that this run writes, with the user's own, as a stage on its own reads them."""
    kinds = {"demonstrations": "revisions", "comparisons": "comparisons"}
    return open_own(cfg, task, run, {kind: [run.dir / f"{name}.jsonl"] for kind, name in kinds.items()})


def learn_revisions(cfg: Config, task: Task, data: Task, run: Run) -> Params:
    """SFT on the revisions, and on demonstrations if there are any."""
    demonstrations = data.demonstrations()
    flags = again_defaults(cfg.sft, task.base, demonstrations.rows or 0)
    size = task.eval_batch_size
    return sft.train(flags, task.base, demonstrations, run, cfg.seed, eval_batch_size=size, stage="revised").params


def compare_answers(
    task: Task, run: Run, sampler: PolicySampler, policy: Params, assistant: Assistant, seed: int
) -> None:
    """Two answers of the policy to each prompt, and how likely the judge finds the first better: comparisons.jsonl.

    A pair is left out where an answer is missing, where both are equal, and where the judge fails. Raises UserError
    where none is left.
    """
    sets, size, file = task.prompts(), task.eval_batch_size, run.dir / "comparisons.jsonl"

    def make(part: range) -> list[dict[str, Any]]:
        prompts = take(sets.train, np.asarray(part))
        first, second = (read(task.base, sampler(policy, prompts, 60_000_000 + side)) for side in (0, 1))
        asked = [sets.rows[row].prompt for row in prompts.row.tolist()]
        drawn = draw_principles(seed + 1, part, 1, len(assistant.questions))[:, 0]
        going = [
            n
            for n, (a, b) in enumerate(zip(first, second, strict=True))
            if a.ended and b.ended and a.text and b.text and a != b
        ]
        questions = [assistant.questions[drawn[n]] for n in going]
        texts = [in_words(as_conversation(asked[n])) for n in going]
        found = assistant.prefer(texts, [first[n].text for n in going], [second[n].text for n in going], questions)
        rows = [compared(asked[n], first[n].text, second[n].text, float(p)) for n, p in zip(going, found, strict=True)]
        fields = [sets.rows[row].asked() for row in prompts.row.tolist()]
        return [fields[n] | row | {"question": question, "row": part[n]}
                for n, row, question in zip(going, rows, questions, strict=True) if row is not None]  # fmt: skip

    write_parts(run, "comparisons", file, len(sets.train.row), size, make)
    count = from_first(lambda: sum(1 for _ in read_rows(file)))
    run.say(f"comparisons: {file} ({count} of {len(sets.train.row)} prompts; to the others both answers are equal, one"
            " is empty or does not end, or the judge fails or prefers neither)")  # fmt: skip
    if not count:
        raise UserError("no two answers could be compared, so there is nothing to prefer")


def learn_preferences(
    cfg: Config, task: Task, data: Task, run: Run, sampler: PolicySampler, revised: Pretrained
) -> Trained:
    """DPO from the revised policy, on its comparisons and on human ones if there are any."""
    comparisons = data.comparisons(partial(sampler, revised.params))
    return train_preference(
        cfg.dpo, partial(dpo.loss, cfg.dpo), partial(dpo.reward, cfg.dpo), revised,
        paired(comparisons.train, cfg.dpo.pairs), comparisons, run, cfg.seed, stage="dpo",
        eval_batch_size=task.eval_batch_size, measure=make_policy_measure(task, sampler, task.eval_batch_size),
    )  # fmt: skip


def show_chains(run: Run) -> None:
    """Writes the first chains before the other examples, each text beside the next."""
    if not run.first:
        return
    rows = islice((row for row in read_rows(run.dir / "chains.jsonl") if all(texts_of(row))), CHAINS)
    lines = []
    for row in rows:
        chain = {"prompt": in_words(as_conversation(row["prompt"])), "answer": row["answer"]}
        for number, step in enumerate(row["revisions"], 1):
            chain |= {f"critique {number}": f"{step['principle']}: {step['critique']}"}
            chain |= {f"revision {number}": step["revision"]}
        lines.append(json.dumps(chain, ensure_ascii=False) + "\n")
    examples = run.dir / "examples.jsonl"
    examples.write_text("".join(lines) + examples.read_text(encoding="utf-8"), encoding="utf-8")


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Revises, learns, compares, learns again, and exports both policies; returns the metrics."""
    with run_with_report(cfg, "constitutional", CONSTITUTIONAL_REPORT) as run:
        watched = load_watched(cfg, run)
        task = open_task(cfg, run, first="sft")
        sampler, drawing = policy_sampler(cfg, task), policy_sampler(cfg, task, cfg.temperature)
        data = own_data(cfg, task, run)
        measure = make_policy_measure(task, sampler, task.eval_batch_size)
        for kind in ("demonstrations", "comparisons"):  # what is wrong with the user's own is said now
            if getattr(cfg, kind):
                task.demonstrations() if kind == "demonstrations" else task.comparisons(partial(sampler, None))
        with open_assistant(cfg, run, task, drawing) as assistant:
            revise_prompts(cfg, task, run, drawing, assistant, cfg.seed)
            write_revisions(run, run.dir / "chains.jsonl")
            if isinstance(task, World):
                log_revisions(run, task)
            preferred = watch_revisions(cfg, run, watched, task.eval_batch_size)
            revised = task.base._replace(params=learn_revisions(cfg, task, data, run))
            compare_answers(task, run, drawing, revised.params, assistant, cfg.seed)
            metrics = task.facts | preferred | assistant.metrics()
        trained = learn_preferences(cfg, task, data, run, sampler, revised)
        metrics |= {f"dpo_{name}": value for name, value in trained.metrics.items()}
        metrics |= {f"revised_{name}": float(x) for name, x in measure(revised.params, task.base.params, 300).items()}
        metrics |= compare_policies(
            run, task, ("start", task.base.params), ("constitutional", trained.params), sampler,
            make_token_scorer(task, trained.reward),
        )  # fmt: skip
        found = measure(trained.params, task.base.params, 301)
        metrics["constitutional_kl"] = float(found["kl_k1"])
        show_chains(run)
        run.summary(metrics)
        who = "Constitutional AI"
        export_policy(run, task.base, revised.params, algorithm=f"{who}, first stage", metrics={}, folder="revised")
        export_policy(run, task.base, trained.params, algorithm=who, metrics=metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
