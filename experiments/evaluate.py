"""What a model, or a reward model, is worth: each rate with its 95% interval and the number of rows behind it.

    python experiments/evaluate.py --model FOLDER --ifeval FILE --gsm8k FILE --text FILE
    python experiments/evaluate.py --reward-model FOLDER --preferences FILE FILE
    python experiments/evaluate.py --model FOLDER --against FOLDER --prompts FILE --judge FOLDER

What is given is evaluated:
1. preferences: how often the chosen response scores higher, with "pick the longer" beside it. Scores are the reward
   model's, or else β log π(y|x)/π_against(y|x), the reward that DPO trains (Rafailov et al. 2023, eq. 5,
   https://arxiv.org/abs/2305.18290), or, without --against, the model's log-probability of the response.
2. a win rate over --against on prompts: by the reward model, by an AI judge in both orders, and by the true utility
   of the controlled world (--world).
3. IFEval (Zhou et al. 2023), GSM8K (Cobbe et al. 2021): greedy answers, nothing but the question in the prompt.
4. perplexity of documents.
The run's folder gets summary.json, and answers.jsonl with what was sampled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import suites
from experiments.inference import Answers, Loaded, answer, load, logprobs, rewards
from experiments.setting import ANSWER_LENGTH
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.rejects import Place
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import (
    Rate,
    calibration,
    judged_win_rate,
    length_baseline,
    perplexity,
    preference_accuracy,
    wilson_interval,
    win_rate,
)
from rlhf_jax.log import Run
from rlhf_jax.rewards import ifeval, math
from rlhf_jax.rewards.judge import Judge, both_orders, comparison
from rlhf_jax.simulation.world import draw_problems, is_exact, utilities

Metrics = dict[str, float]


@dataclass(frozen=True)
class Config:
    """Evaluation of what the flags name."""

    run_dir: str | None = None
    """Where the run is written; by default the next free runs/evaluate-<n>."""
    seed: int = 0
    mesh: str | None = None
    """Devices as a mesh, such as data=4,tensor=2, as in every experiment; by default one device."""
    hosts: str | None = None
    """One of many processes, as in every experiment."""
    model: str | None = None
    """A Hugging Face folder: the language model that is evaluated."""
    against: str | None = None
    """Another one: whom --model is to beat, and the reference of its implicit reward."""
    reward_model: str | None = None
    """A Hugging Face folder of a …ForSequenceClassification with one label."""
    judge: str | None = None
    """A Hugging Face folder: a language model that is asked which of two answers is better."""
    preferences: tuple[str, ...] = ()
    """jsonl[.gz] of chosen/rejected (perhaps prompt, subset), of LLMBar or of PandaLM's test set."""
    prompts: str | None = None
    """jsonl[.gz] with prompt, or instruction and perhaps input: where --model meets --against."""
    world: int = 0
    """So many problems of the controlled world, judged by true utility."""
    ifeval: str | None = None
    """IFEval's prompts: jsonl[.gz] of prompt, instruction_id_list, kwargs."""
    gsm8k: str | None = None
    """jsonl[.gz] of question, answer."""
    text: str | None = None
    """jsonl[.gz] with text, or one .txt: for perplexity."""
    limit: int | None = None
    """Only so many rows of each file."""
    max_length: int = 2048
    """Tokens of prompt and response together, or the model's own limit if that is less."""
    max_new_tokens: int = 256
    """The longest answer that is sampled."""
    temperature: float = 0.0
    """0 is greedy."""
    beta: float = 0.1
    """β of the implicit reward; only calibration depends on it."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least(self, seed=0, world=0, max_length=16, max_new_tokens=1, temperature=0, beta=0, batch_size=1)
        if self.limit is not None:
            at_least(self, limit=1)


def check(cfg: Config) -> None:
    """Raises UserError when there is nothing to evaluate, or not what it takes."""
    names = ("ifeval", "gsm8k", "text", "world", "prompts", "preferences")
    asked = [name for name in names if getattr(cfg, name)]
    if not asked:
        raise UserError(f"nothing to evaluate: give one or more of {', '.join(f'--{name}' for name in names)}")
    for name in asked:
        if cfg.model is None and not (name == "preferences" and cfg.reward_model):
            raise UserError(f"--{name} needs --model" + (" or --reward-model" if name == "preferences" else ""))
    if cfg.prompts and not (cfg.against and (cfg.reward_model or cfg.judge)):
        raise UserError("--prompts needs --against, and --reward-model or --judge to say who wins")
    stems = [stem(path) for path in cfg.preferences]
    if len(set(stems)) < len(stems):
        raise UserError(f"--preferences has two files of one name ({', '.join(stems)}), which name the results")


def stem(path: str) -> str:
    """What the results of a file are called."""
    return Path(path).name.split(".")[0]


def put(metrics: Metrics, name: str, rate: Rate | Sequence[float], n: int) -> None:
    """A rate with its interval and the number of rows."""
    metrics |= {name: rate[0], f"{name}_low": rate[1], f"{name}_high": rate[2], f"{name}_n": n}


def table(metrics: Metrics) -> list[str]:
    """A line for every number that has an n, those without an interval beside theirs."""
    lines = []
    for name in (key.removesuffix("_n") for key in metrics if key.endswith("_n")):
        value, low, high = (metrics[name + end] for end in ("", "_low", "_high"))
        share = name.startswith("win_rate") or not name.endswith(("perplexity", "utility"))
        shown = "{:8.1%}  ({:.1%} to {:.1%})" if share else "{:8.2f}  ({:.2f} to {:.2f})"
        lines.append(f"{name:<44}{shown.format(value, low, high):<30}  n = {metrics[f'{name}_n']}")
    plain = [key for key in metrics if not key.endswith(("_n", "_low", "_high")) and f"{key}_n" not in metrics]
    return lines + [f"{name:<44}{metrics[name]:8.3f}" for name in plain]


class Models(NamedTuple):
    """What the flags name, loaded."""

    model: Loaded | None
    against: Loaded | None
    reward_model: Loaded | None
    judge: Loaded | None


def load_models(cfg: Config) -> Models:
    """Raises UserError for a folder that cannot be read, and where answers or prompts would have no room."""
    language = [load(folder) if folder else None for folder in (cfg.model, cfg.against, cfg.judge)]
    reward_model = load(cfg.reward_model, reward_model=True) if cfg.reward_model else None
    for model in language[:2]:
        if model and (cfg.ifeval or cfg.gsm8k or cfg.prompts) and context(cfg, model) - cfg.max_new_tokens < 8:
            raise UserError(
                f"--max-new-tokens {cfg.max_new_tokens} leaves no room for prompts: {model.folder} and --max-length "
                f"allow {context(cfg, model)} tokens"
            )
    return Models(language[0], language[1], reward_model, language[2])


def context(cfg: Config, model: Loaded) -> int:
    """Tokens that a sequence may have."""
    return min(cfg.max_length, model.config.max_length)


def respond(cfg: Config, model: Loaded, prompts: Sequence[str], max_new_tokens: int | None = None) -> Answers:
    """The model's answer to each prompt."""
    longest = max_new_tokens or cfg.max_new_tokens
    room = max(1, context(cfg, model) - longest)
    ids = [suites.encode_prompt(prompt, model.tokenizer, room) for prompt in prompts]
    return answer(
        model, ids, max_new_tokens=longest, temperature=cfg.temperature, seed=cfg.seed, batch_size=cfg.batch_size
    )


class Scores(NamedTuple):
    """Of the pairs that fitted: scores and lengths in tokens of either side."""

    chosen: np.ndarray
    rejected: np.ndarray
    lengths: np.ndarray
    kept: list[int]


def score(cfg: Config, models: Models, name: str, pairs: Sequence[suites.Comparison], run: Run) -> Scores:
    """By the reward model, or else by the implicit reward of the language model."""
    scorer = models.reward_model or models.model
    assert scorer is not None
    encoded = suites.encode_pairs(name, pairs, scorer.tokenizer, context(cfg, scorer))
    for note in encoded.notes:
        run.say(note)
    both = [(triple[0], triple[side]) for side in (1, 2) for triple in encoded.triples]
    if models.reward_model:
        scores = rewards(scorer, both, batch_size=cfg.batch_size)
    else:
        scores = logprobs(scorer, both, batch_size=cfg.batch_size)
        if models.against:
            if models.against.tokenizer.get_vocab() != scorer.tokenizer.get_vocab():
                raise UserError("--against has other tokens than --model, so the two cannot be compared on text")
            scores = cfg.beta * (scores - logprobs(models.against, both, batch_size=cfg.batch_size))
    lengths = np.array([len(response) for _, response in both]).reshape(2, -1)
    return Scores(*scores.reshape(2, -1), lengths, encoded.kept)


def evaluate_preferences(cfg: Config, models: Models, name: str, found: suites.Preferences, run: Run) -> Metrics:
    """Accuracy, whole and by subset, beside "pick the longer", and the calibration of rewards."""
    metrics: Metrics = {}
    scores = score(cfg, models, name, found.pairs, run)
    subsets = np.array([found.subsets[number] for number in scores.kept])
    parts = [name] + [f"{name}/{subset}" for subset in sorted(set(subsets.tolist())) if len(set(subsets)) > 1]
    for part in parts:
        rows = np.flatnonzero((subsets == part.removeprefix(f"{name}/")) | (part == name))
        chosen, rejected = scores.chosen[rows], scores.rejected[rows]
        put(metrics, f"{part}_accuracy", preference_accuracy(chosen, rejected), len(rows))
        put(metrics, f"{part}_length_baseline", length_baseline(*scores.lengths[:, rows]), len(rows))
    if models.reward_model or models.against:
        # Half of the pairs turned round, so that outcomes are not all 1.
        signs = np.where(np.arange(len(scores.chosen)) % 2, -1.0, 1.0)
        margins = signs * (scores.chosen - scores.rejected)
        metrics[f"{name}_calibration_error"] = calibration(margins, signs > 0, bins=10).error
    return metrics


def evaluate_win_rate(cfg: Config, models: Models, prompts: Sequence[str], run: Run) -> Metrics:
    """--model against --against on the same prompts, by whoever is there to say."""
    assert models.model and models.against
    metrics: Metrics = {}
    ours, theirs = (respond(cfg, model, prompts) for model in (models.model, models.against))
    columns = {"against": theirs.texts}
    if models.reward_model:
        pairs = [
            suites.pair(Place("answers", line), prompt, a, b)
            for line, (prompt, a, b) in enumerate(zip(prompts, ours.texts, theirs.texts, strict=True), 1)
        ]
        scores = score(cfg, models, str(cfg.prompts), pairs, run)
        put(metrics, "win_rate_reward_model", win_rate(scores.chosen, scores.rejected), len(scores.kept))
    if models.judge:
        verdicts = both_orders(make_judge(cfg, models.judge, run), prompts, ours.texts, theirs.texts)
        rates = judged_win_rate(*verdicts)
        put(metrics, "win_rate_judge", rates.win, len(prompts))
        put(metrics, "judge_consistent", rates.consistent, len(prompts))
        put(metrics, "judge_takes_first", rates.first_shown, len(prompts))
        columns |= {"shown_first": verdicts.shown_first.tolist(), "shown_second": verdicts.shown_second.tolist()}
    save(run, "prompts", prompts, ours, columns)
    return metrics


def make_judge(cfg: Config, judge: Loaded, run: Run) -> Judge:
    """A language model as a judge: σ(log π(A) − log π(B)), as in Bai et al. 2022, https://arxiv.org/abs/2212.08073."""

    def prefer(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        questions = [comparison(*texts) for texts in zip(prompts, first, second, strict=True)]
        pairs = [suites.pair(Place("questions", line), text, "A", "B") for line, text in enumerate(questions, 1)]
        encoded = suites.encode_pairs("the judge", pairs, judge.tokenizer, context(cfg, judge))
        for note in encoded.notes:
            run.say(note)
        # Without the EOS: A or B is all that is asked for.
        both = [(triple[0], triple[side][:-1]) for side in (1, 2) for triple in encoded.triples]
        a, b = logprobs(judge, both, batch_size=cfg.batch_size).reshape(2, -1)
        return 0.5 * (1 + np.tanh((a - b) / 2))

    return prefer


def evaluate_world(cfg: Config, models: Models, run: Run) -> Metrics:
    """New problems of the controlled world: true utility, and by it the win rate."""
    assert models.model
    metrics: Metrics = {}
    problems = draw_problems(np.random.default_rng([cfg.seed, 1]), cfg.world)
    prompts = [problem.prompt for problem in problems]
    found, answers = [], []
    for name, model in (("", models.model), ("_against", models.against)):
        if model is None:
            continue
        answers.append(respond(cfg, model, prompts, ANSWER_LENGTH))
        exact = sum(is_exact(*pair) for pair in zip(problems, answers[-1].texts, strict=True))
        found.append(utilities(problems, answers[-1].texts, answers[-1].ended.tolist()))
        mean, error = found[-1].mean(), 1.96 * found[-1].std() / np.sqrt(cfg.world)
        put(metrics, f"world{name}_utility", (float(mean), float(mean - error), float(mean + error)), cfg.world)
        put(metrics, f"world{name}_exact", wilson_interval(exact, cfg.world), cfg.world)
    if models.against:
        put(metrics, "win_rate_utility", win_rate(*found), cfg.world)
    save(run, "world", prompts, answers[0], {"utility": found[0].tolist()})
    return metrics


def evaluate_ifeval(cfg: Config, model: Loaded, rows: Sequence[suites.Instruction], run: Run) -> Metrics:
    """Prompts all of whose instructions were followed, and single instructions; strictly and loosely."""
    metrics: Metrics = {}
    answers = respond(cfg, model, [row.prompt for row in rows])
    verdicts = [
        ifeval.follow(row.instructions, row.arguments, text) for row, text in zip(rows, answers.texts, strict=True)
    ]
    columns = {}
    for way in ifeval.Followed._fields:
        columns[way] = [list(getattr(verdict, way)) for verdict in verdicts]
        single = [followed for verdict in columns[way] for followed in verdict]
        put(metrics, f"ifeval_prompt_{way}", wilson_interval(sum(map(all, columns[way])), len(rows)), len(rows))
        put(metrics, f"ifeval_instruction_{way}", wilson_interval(sum(single), len(single)), len(single))
    put(metrics, "ifeval_ended", wilson_interval(int(answers.ended.sum()), len(rows)), len(rows))
    save(run, "ifeval", [row.prompt for row in rows], answers, columns)
    return metrics


def evaluate_gsm8k(cfg: Config, model: Loaded, rows: Sequence[suites.Sum], run: Run) -> Metrics:
    """Exact match of the number, strictly and leniently."""
    metrics: Metrics = {}
    answers = respond(cfg, model, [row.question for row in rows])
    grades = [math.grade(text, row.answer) for row, text in zip(rows, answers.texts, strict=True)]
    for way in math.Correct._fields:
        right = sum(getattr(grade, way) for grade in grades)
        put(metrics, f"gsm8k_{way}", wilson_interval(right, len(rows)), len(rows))
    put(metrics, "gsm8k_ended", wilson_interval(int(answers.ended.sum()), len(rows)), len(rows))
    columns = {way: [getattr(grade, way) for grade in grades] for way in math.Correct._fields}
    save(run, "gsm8k", [row.question for row in rows], answers, columns)
    return metrics


def evaluate_text(cfg: Config, model: Loaded, texts: Sequence[str]) -> Metrics:
    """Perplexity; n is the number of tokens."""
    metrics: Metrics = {}
    windows = [suites.encode_document(text, model.tokenizer, context(cfg, model)) for text in texts]
    document = np.repeat(np.arange(len(texts)), [len(some) for some in windows])
    pairs = [pair for some in windows for pair in some]
    if not pairs:
        raise UserError(f"{cfg.text}: no document has two tokens, so there is nothing to predict")
    sums = np.bincount(document, logprobs(model, pairs, batch_size=cfg.batch_size), len(texts))
    counts = np.bincount(document, [len(predicted) for _, predicted in pairs], len(texts))
    found = perplexity(sums[counts > 0], counts[counts > 0])
    put(metrics, "perplexity", found[:3], found.tokens)
    return metrics


def save(run: Run, suite: str, prompts: Sequence[str], answers: Answers, columns: dict[str, list[Any]]) -> None:
    """One line an answer, for people."""
    if not run.first:
        return
    with open(run.dir / "answers.jsonl", "a", encoding="utf-8") as file:
        for row, prompt in enumerate(prompts):
            line = {"suite": suite, "prompt": prompt, "answer": answers.texts[row], "ended": bool(answers.ended[row])}
            line |= {name: values[row] for name, values in columns.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Evaluates what the flags name; returns what is also in the run's summary.json."""
    check(cfg)
    # All files are read before anything is computed: a mistake in the last shows at once.
    preferences = [(stem(path), suites.read_preferences(path, cfg.limit)) for path in cfg.preferences]
    prompts = suites.read_prompts(cfg.prompts, cfg.limit) if cfg.prompts else None
    instructions = suites.read_instructions(cfg.ifeval, cfg.limit) if cfg.ifeval else None
    sums = suites.read_sums(cfg.gsm8k, cfg.limit) if cfg.gsm8k else None
    texts = suites.read_documents(cfg.text, cfg.limit) if cfg.text else None
    models = load_models(cfg)
    metrics: Metrics = {}
    with Run(cfg.run_dir, cfg, name="evaluate") as run:
        for name, found in preferences:
            for note in found.notes:
                run.say(note)
            metrics |= evaluate_preferences(cfg, models, name, found, run)
        if prompts:
            metrics |= evaluate_win_rate(cfg, models, prompts, run)
        if cfg.world:
            metrics |= evaluate_world(cfg, models, run)
        if models.model and instructions:
            metrics |= evaluate_ifeval(cfg, models.model, instructions, run)
        if models.model and sums:
            metrics |= evaluate_gsm8k(cfg, models.model, sums, run)
        if models.model and texts:
            metrics |= evaluate_text(cfg, models.model, texts)
        for line in table(metrics):
            run.say(line)
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
