"""Evaluates a language model or a reward model. Each rate has its 95% interval and its number of rows.

    python experiments/evaluate.py --model FOLDER --ifeval FILE --gsm8k FILE --text FILE
    python experiments/evaluate.py --reward-model FOLDER --preferences FILE FILE
    python experiments/evaluate.py --model FOLDER --against FOLDER --prompts FILE --judge FOLDER
    python experiments/evaluate.py --model FOLDER --against FOLDER --prompts FILE --judge URL --judge-model NAME

The flags choose the evaluations:
1. --preferences: how often the chosen response scores higher, beside "pick the longer". The score is the reward
   model's. Without one it is β log π(y|x)/π_against(y|x), the reward that DPO trains (Rafailov et al. 2023, eq. 5,
   https://arxiv.org/abs/2305.18290); without --against, too, it is the model's log-probability of the response.
2. --prompts, --world: the win rate over --against, by the reward model, by an AI judge in both orders, and in the
   controlled world by the true utility.
3. --ifeval (Zhou et al. 2023), --gsm8k (Cobbe et al. 2021): greedy answers to prompts that are only the question.
4. --text: perplexity of documents.
The metrics are written to summary.json in the run's folder, the sampled answers to answers.jsonl.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from experiments.flags import Flags, JudgeFlags, RunFlags
from experiments.judging import judged, load_judge, open_judge
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data import suites
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.rejects import Place
from rlhf_jax.data.tokens import Document, size
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import (
    clustered_rate,
    margin_calibration,
    pair_metrics,
    perplexity,
    rate_lines,
    rate_metrics,
    share_metrics,
    win_rate,
)
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained, load_policy, load_reward_model
from rlhf_jax.rewards import ifeval, math
from rlhf_jax.rewards.pairs import PairScores, score_pairs
from rlhf_jax.sampling.texts import TextAnswers, answer_texts, answerable
from rlhf_jax.scoring import document_logprobs, document_rewards, text_logprobs
from rlhf_jax.simulation.world import WORDS, draw_problems, is_exact, utilities

Rates = dict[str, float]


@dataclass(frozen=True)
class EvaluationFlags(Flags):
    """The models, the files, and the numbers for sampling."""

    model: str | None = None
    """The language model that is evaluated: a Hugging Face folder."""
    against: str | None = None
    """Another language model: the opponent of --model, and the reference of its implicit reward."""
    reward_model: str | None = None
    """A reward model: a Hugging Face folder of a …ForSequenceClassification with one label."""
    preferences: tuple[str, ...] = ()
    """Comparisons, jsonl[.gz]: chosen and rejected (perhaps prompt, subset), LLMBar, or PandaLM's test set."""
    prompts: str | None = None
    """Prompts for --model and --against, jsonl[.gz]: prompt, or instruction and perhaps input."""
    world: int = 0
    """The number of problems of the controlled world, judged by true utility."""
    ifeval: str | None = None
    """IFEval's prompts: jsonl[.gz] of prompt, instruction_id_list, kwargs."""
    gsm8k: str | None = None
    """GSM8K's problems: jsonl[.gz] of question, answer."""
    text: str | None = None
    """Documents for perplexity: jsonl[.gz] with text, or one .txt."""
    limit: int | None = None
    """The most rows that are read of each file."""
    max_length: int = 2048
    """The most tokens of prompt and response together; the model's own limit if that is less."""
    max_new_tokens: int = 256
    """The most tokens of a sampled answer."""
    temperature: float = 0.0
    """The temperature of sampling; 0 is greedy."""
    no_end_score: float = -3.0
    """The reward model's score of an answer that does not end, as in ppo.py."""
    beta: float = 0.1
    """β of the implicit reward; only calibration depends on it."""
    batch_size: int = 32
    """The most rows that are sampled or scored at once; fewer are scored where they are long."""

    def __post_init__(self) -> None:
        at_least(self, world=0, max_length=16, max_new_tokens=1, temperature=0, beta=0, batch_size=1)
        if self.limit is not None:
            at_least(self, limit=1)
        super().__post_init__()


@dataclass(frozen=True)
class Config(RunFlags, JudgeFlags, EvaluationFlags):
    """Evaluates models."""

    resume: bool = False
    """Evaluate from the start again, in the folder of a run that was stopped. An evaluation has no checkpoints."""


def check(cfg: Config) -> None:
    """Raises UserError when there is nothing to evaluate, or a model that it takes is not named."""
    names = ("ifeval", "gsm8k", "text", "world", "prompts", "preferences")
    asked = [name for name in names if getattr(cfg, name)]
    if not asked:
        raise UserError(
            f"there is nothing to evaluate: give one or more of {', '.join(f'--{name}' for name in names)}"
        )
    for name in asked:
        if cfg.model is None and not (name == "preferences" and cfg.reward_model):
            raise UserError(f"--{name} needs --model" + (" or --reward-model" if name == "preferences" else ""))
    if cfg.prompts and not (cfg.against and (cfg.reward_model or cfg.judge)):
        raise UserError("--prompts needs --against, and --reward-model or --judge to decide who wins")
    stems = [stem(path) for path in cfg.preferences]
    if len(set(stems)) < len(stems):
        raise UserError(
            f"--preferences has two files of the same name ({', '.join(stems)}); results are named by files"
        )


def stem(path: str) -> str:
    """The name of a file's results."""
    return Path(path).name.split(".")[0]


class Models(NamedTuple):
    """The models that the flags name, loaded."""

    model: Pretrained | None
    against: Pretrained | None
    reward_model: Pretrained | None
    judge: Pretrained | None


def load_models(cfg: Config) -> Models:
    """Loads the models that the flags name.

    Raises UserError for a folder that cannot be read, when --max-new-tokens leaves no room for prompts, and when
    --against has another vocabulary than --model.
    """
    model, against = (load_policy(name) if name else None for name in (cfg.model, cfg.against))
    reward_model = load_reward_model(cfg.reward_model) if cfg.reward_model else None
    for some in (model, against):
        if some and (cfg.ifeval or cfg.gsm8k or cfg.prompts) and context(cfg, some) - cfg.max_new_tokens < 8:
            raise UserError(
                f"--max-new-tokens {cfg.max_new_tokens} leaves no room for prompts: {some.name} and --max-length "
                f"allow {context(cfg, some)} tokens"
            )
    if cfg.preferences and model and against and not reward_model:
        if model.tokenizer.get_vocab() != against.tokenizer.get_vocab():
            raise UserError("--against and --model have different vocabularies: implicit rewards need the same one")
    return Models(model, against, reward_model, load_judge(cfg))


def context(cfg: Config, model: Pretrained) -> int:
    """The most tokens of a sequence."""
    return min(cfg.max_length, model.config.max_length)


def respond(
    cfg: Config, model: Pretrained, prompts: Sequence[str], side: int = 0, most: int | None = None
) -> TextAnswers:
    """The model's answer to each prompt, of at most `most` tokens: by default --max-new-tokens.

    Each `side` of a comparison samples with a key of its own.
    """
    key = jax.random.fold_in(jax.random.key(cfg.seed), side)
    return answer_texts(
        model, prompts, key, max_length=context(cfg, model), temperature=cfg.temperature,
        max_new_tokens=most or cfg.max_new_tokens, batch_size=cfg.batch_size,
    )  # fmt: skip


def fitting(
    cfg: Config, models: Sequence[Pretrained], path: str | None, rows: Sequence[Any], texts: Sequence[str], run: Run
) -> list[Any]:
    """The rows of a file whose prompts all of the models can answer. Raises UserError when no row is left."""
    kept, reasons = answerable(models, texts, [context(cfg, model) - cfg.max_new_tokens for model in models])
    notes = suites.tally(str(path), reasons)
    for note in notes:
        run.say(note)
    if not kept:
        raise UserError(f"no prompt can be asked: {'; '.join(notes)}")
    return [rows[place] for place in kept]


def score(cfg: Config, models: Models, name: str, pairs: Sequence[Comparison], run: Run) -> PairScores:
    """Pairs scored by the reward model, or else by the implicit reward of the language model."""
    scorer = models.reward_model or models.model
    assert scorer is not None
    score_documents = partial(document_rewards if models.reward_model else document_logprobs, scorer)

    def score_answers(documents: Sequence[Document]) -> np.ndarray:
        scores = score_documents(documents, batch_size=cfg.batch_size)
        if models.reward_model or models.against is None:
            return scores
        return cfg.beta * (scores - document_logprobs(models.against, documents, batch_size=cfg.batch_size))

    scores = score_pairs(score_answers, name, pairs, scorer.tokenizer, max_length=context(cfg, scorer))
    for note in scores.notes:
        run.say(note)
    return scores


def evaluate_preferences(cfg: Config, models: Models, name: str, found: suites.PreferenceSet, run: Run) -> Rates:
    """Accuracy on all pairs and by subset, beside "pick the longer"; and the calibration of rewards."""
    scores = score(cfg, models, name, found.pairs, run)
    subsets = [found.subsets[number] for number in scores.kept]
    metrics = pair_metrics(name, scores.chosen, scores.rejected, scores.lengths, subsets)
    if models.reward_model or models.against:
        calibration = margin_calibration(scores.chosen - scores.rejected, bins=10)
        metrics[f"{name}_calibration_error"] = calibration.error
        metrics[f"{name}_calibration_floor"] = calibration.floor
    return metrics


def score_answers(
    cfg: Config, models: Models, prompts: Sequence[str], ours: TextAnswers, theirs: TextAnswers, run: Run
) -> tuple[np.ndarray, np.ndarray]:
    """The reward model's scores of both sides' answers, `no_end_score` where an answer does not end.

    It reads the ids that were sampled, or the texts where its tokenizer or its length is another. Then pairs that do
    not fit are left out.
    """
    scorer, rows = models.reward_model, np.arange(len(prompts))
    assert scorer and models.model and models.against
    sides = (models.model, ours), (models.against, theirs)
    if all(reads_ids_of(scorer, model, answers) for model, answers in sides):
        found = [document_rewards(scorer, answers.documents, batch_size=cfg.batch_size) for _, answers in sides]
    else:
        pairs = [
            suites.pair(Place("answers", line), prompt, a, b)
            for line, (prompt, a, b) in enumerate(zip(prompts, ours.texts, theirs.texts, strict=True), 1)
        ]
        scores = score(cfg, models, str(cfg.prompts), pairs, run)
        found, rows = [scores.chosen, scores.rejected], np.array(scores.kept)
    a, b = (
        np.where(answers.ended[rows], some, cfg.no_end_score)
        for some, answers in zip(found, (ours, theirs), strict=True)
    )
    return a, b


def reads_ids_of(scorer: Pretrained, model: Pretrained, answers: TextAnswers) -> bool:
    """Whether the reward model can read the ids that the model was given and sampled."""
    same = scorer.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    same = same and scorer.tokenizer.chat_template == model.tokenizer.chat_template
    return same and max(map(size, answers.documents)) < scorer.config.max_length


def evaluate_win_rate(cfg: Config, models: Models, prompts: Sequence[str], run: Run) -> Rates:
    """The win rate of --model over --against on the same prompts, by the reward model and by the judge."""
    assert models.model and models.against
    metrics: Rates = {}
    ours, theirs = (respond(cfg, model, prompts, side) for side, model in enumerate((models.model, models.against)))
    columns: dict[str, list[Any]] = {"against": theirs.texts}
    if models.reward_model:
        scores = score_answers(cfg, models, prompts, ours, theirs, run)
        metrics |= rate_metrics("win_rate_reward_model", win_rate(*scores), len(scores[0]))
    if models.judge or cfg.judge:
        length = context(cfg, models.judge) if models.judge else 0
        with open_judge(cfg, run, models.judge, batch_size=cfg.batch_size, max_length=length) as judge:
            rates, verdicts = judged(judge, prompts, ours.texts, theirs.texts)
        metrics, columns = metrics | rates, columns | verdicts
    write_answers(run, "prompts", prompts, ours, columns)
    return metrics


def evaluate_world(cfg: Config, models: Models, run: Run) -> Rates:
    """True utility on new problems of the controlled world, and the win rate by it."""
    assert models.model
    metrics: Rates = {}
    problems = draw_problems(np.random.default_rng([cfg.seed, 1]), cfg.world)
    prompts = [problem.prompt for problem in problems]
    both = [("world", models.model)] + ([("world_against", models.against)] if models.against else [])
    answers = [respond(cfg, model, prompts, side, WORDS.answer_length) for side, (_, model) in enumerate(both)]
    found = [utilities(problems, some.texts, some.ended.tolist()) for some in answers]
    for (name, _), some, utility in zip(both, answers, found, strict=True):
        exact = [is_exact(*pair) for pair in zip(problems, some.texts, strict=True)]
        mean, error = float(utility.mean()), float(1.96 * utility.std() / np.sqrt(cfg.world))
        metrics |= rate_metrics(f"{name}_utility", (mean, mean - error, mean + error), cfg.world)
        metrics |= share_metrics(f"{name}_exact", exact)
    if models.against:
        metrics |= rate_metrics("win_rate_utility", win_rate(*found), cfg.world)
    write_answers(run, "world", prompts, answers[0], {"utility": found[0].tolist()})
    return metrics


def evaluate_ifeval(cfg: Config, model: Pretrained, rows: Sequence[suites.Instruction], run: Run) -> Rates:
    """The share of prompts whose instructions were all followed, and of instructions; strictly and loosely."""
    answers = respond(cfg, model, [row.prompt for row in rows])
    verdicts = [
        ifeval.follow(row.instructions, row.arguments, text) for row, text in zip(rows, answers.texts, strict=True)
    ]
    columns = {how: [list(getattr(verdict, how)) for verdict in verdicts] for how in ifeval.Followed._fields}
    metrics: Rates = {}
    for how, prompts in columns.items():
        metrics |= share_metrics(f"ifeval_prompt_{how}", [all(prompt) for prompt in prompts])
        rate = clustered_rate([sum(prompt) for prompt in prompts], [len(prompt) for prompt in prompts])
        metrics |= rate_metrics(f"ifeval_instruction_{how}", rate, sum(map(len, prompts)))
    write_answers(run, "ifeval", [row.prompt for row in rows], answers, columns)
    return metrics | share_metrics("ifeval_ended", answers.ended)


def evaluate_gsm8k(cfg: Config, model: Pretrained, rows: Sequence[suites.MathProblem], run: Run) -> Rates:
    """The share of right numbers, strictly and leniently."""
    answers = respond(cfg, model, [row.question for row in rows])
    grades = [math.grade(text, row.answer) for row, text in zip(rows, answers.texts, strict=True)]
    columns = {how: [getattr(grade, how) for grade in grades] for how in math.Correct._fields}
    write_answers(run, "gsm8k", [row.question for row in rows], answers, columns)
    metrics: Rates = {}
    for how, right in columns.items():
        metrics |= share_metrics(f"gsm8k_{how}", right)
    return metrics | share_metrics("gsm8k_ended", answers.ended)


def evaluate_text(cfg: Config, model: Pretrained, texts: Sequence[str]) -> Rates:
    """The perplexity of documents; n is the number of tokens.

    Raises UserError when no document has two tokens.
    """
    sums, counts = text_logprobs(model, texts, max_length=context(cfg, model), batch_size=cfg.batch_size)
    if not counts.any():
        raise UserError(f"{cfg.text}: no document has two tokens, so there is nothing to predict")
    found = perplexity(sums[counts > 0], counts[counts > 0])
    return rate_metrics("perplexity", found[:3], found.tokens)


def write_answers(
    run: Run, suite: str, prompts: Sequence[str], answers: TextAnswers, columns: dict[str, list[Any]]
) -> None:
    """Appends a line for each answer to answers.jsonl, for people to read."""
    if not run.first:
        return
    with open(run.dir / "answers.jsonl", "a", encoding="utf-8") as file:
        for row, prompt in enumerate(prompts):
            line = {"suite": suite, "prompt": prompt, "answer": answers.texts[row], "ended": bool(answers.ended[row])}
            line |= {name: values[row] for name, values in columns.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Evaluates what the flags name; returns the metrics, which are also in the run's summary.json."""
    check(cfg)
    # All files are read before anything is computed: a mistake in the last shows at once.
    preferences = [(stem(path), suites.read_preferences(path, cfg.limit)) for path in cfg.preferences]
    prompts = suites.read_prompts(cfg.prompts, cfg.limit) if cfg.prompts else None
    instructions = suites.read_instructions(cfg.ifeval, cfg.limit) if cfg.ifeval else None
    problems = suites.read_math_problems(cfg.gsm8k, cfg.limit) if cfg.gsm8k else None
    texts = suites.read_documents(cfg.text, cfg.limit) if cfg.text else None
    models = load_models(cfg)
    metrics: Rates = {}
    with Run(cfg.run_dir, cfg, name="evaluate", resume=cfg.resume) as run:
        read = ("model", "against", "reward_model", "judge", "preferences", "prompts", "ifeval", "gsm8k", "text")
        run.inputs(**{name: getattr(cfg, name) for name in read})
        for model in models:
            for note in () if model is None else model.notes:
                run.say(note)
        if run.first:
            (run.dir / "answers.jsonl").unlink(missing_ok=True)
        for name, found in preferences:
            for note in found.notes:
                run.say(note)
            metrics |= evaluate_preferences(cfg, models, name, found, run)
        if models.model and models.against and prompts:
            prompts = fitting(cfg, (models.model, models.against), cfg.prompts, prompts, prompts, run)
            metrics |= evaluate_win_rate(cfg, models, prompts, run)
        if cfg.world:
            metrics |= evaluate_world(cfg, models, run)
        if models.model and instructions:
            texts_of = [row.prompt for row in instructions]
            instructions = fitting(cfg, [models.model], cfg.ifeval, instructions, texts_of, run)
            metrics |= evaluate_ifeval(cfg, models.model, instructions, run)
        if models.model and problems:
            texts_of = [row.question for row in problems]
            problems = fitting(cfg, [models.model], cfg.gsm8k, problems, texts_of, run)
            metrics |= evaluate_gsm8k(cfg, models.model, problems, run)
        if models.model and texts:
            metrics |= evaluate_text(cfg, models.model, texts)
        for line in rate_lines(metrics):
            run.say(line)
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
