"""The controlled world as a task: demonstrators with a ceiling, annotators who agree 73% of the time, true utility."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rlhf_jax.batches import Completions, Prompts, Rankings
from rlhf_jax.constitution import Principle
from rlhf_jax.data.conversations import Conversation
from rlhf_jax.data.encode import RankedAnswers
from rlhf_jax.data.epochs import EpochBatches
from rlhf_jax.data.preferences import join_rankings
from rlhf_jax.data.tokens import pack_sequences, pad_prompts, pad_sequences, take
from rlhf_jax.errors import UserError
from rlhf_jax.models import FLOAT32, ModelConfig, Precision
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.revision import Reviser, Said, Step
from rlhf_jax.rewards.judge import Judge as PairJudge
from rlhf_jax.rewards.reward import Columns, Completion, HostScores, Part, Prompt, Reward
from rlhf_jax.simulation import Annotators, Demonstrators, Revisers, agreement_rate, calibrate_noise, ceiling
from rlhf_jax.simulation.setting import Problem, Setting
from rlhf_jax.simulation.world import WORDS
from rlhf_jax.tasks.task import Comparisons, Demonstrations, PromptRow, PromptSets, Sampler

AGREEMENT = 0.73
"""How often two annotators prefer the same of two answers, as in InstructGPT."""


class Sizes(NamedTuple):
    """How many rows of each kind the world draws, and the layers of a new model."""

    demonstrations: int = 32_000
    validation: int = 1024
    compared: int = 12_000
    """Prompts with ranked answers to train on."""
    ranked: int = 8
    """Answers to each of them."""
    heldout_pairs: int = 4096
    prompts: int = 8192
    heldout: int = 512
    layers: int = 3


SIZES = Sizes()


EVAL_BATCH_SIZE = 1024


class World:
    """A `Task` whose text is drawn when it is made. The same seed draws the same text."""

    has_demonstrations, eval_batch_size = True, EVAL_BATCH_SIZE

    def __init__(
        self,
        seed: int,
        *,
        base: Pretrained | None = None,
        precision: Precision = FLOAT32,
        sizes: Sizes | None = None,
        setting: Setting = WORDS,
        demonstrators: Demonstrators | None = None,
        annotators: Annotators | None = None,
    ) -> None:
        """`base` is the model to start from, by default a new one. `annotators` have their biases; their noise follows
        from how often two of them agree.

        Raises UserError for a model whose vocabulary is not that of the world.
        """
        sizes = SIZES if sizes is None else sizes
        self._seed, self.rng = seed, np.random.default_rng([seed, 0])
        self._demonstrators = Demonstrators() if demonstrators is None else demonstrators
        self._annotators = replace(Annotators(noise=0.0) if annotators is None else annotators, noise=0.0)
        rng = self.rng
        self.setting = setting
        self.base = _new_model(setting, sizes.layers, precision) if base is None else _with_words_of(setting, base)
        self.max_new_tokens = setting.answer_length
        self.sizes = sizes

        pairs, written = self._demonstrate(setting.draw_problems(rng, sizes.demonstrations))
        self._demonstrations = pack_sequences(pairs, length=setting.packed_length, pad_id=self.base.pad_id)
        pairs, _ = self._demonstrate(setting.draw_problems(rng, sizes.validation))
        self._validation = pad_sequences(
            pairs, length=setting.prompt_length + setting.answer_length, pad_id=self.base.pad_id
        )
        self.facts = {
            "demonstrators_utility": float(written.mean()),
            "demonstrators_utility_se": float(written.std() / np.sqrt(len(written))),
            "demonstrators_utility_std": float(written.std()),
        }
        counts = [sizes.compared, sizes.heldout_pairs, sizes.prompts, sizes.heldout]
        self._problems = setting.draw_problems(rng, sum(counts))
        self._problems += setting.draw_problems(rng, sizes.heldout, shifted=True)
        self._problems += setting.draw_problems(np.random.default_rng([seed, 3]), sizes.heldout)
        counts.append(sizes.heldout)
        everything = self._encode(self._problems)
        rows = np.split(np.arange(len(self._problems)), np.cumsum(counts))
        parts = [take(everything, some) for some in rows]
        self._compared, self._compared_heldout, train, heldout, shifted, choice = parts
        texts = [PromptRow(problem.prompt, {}) for problem in self._problems]
        self._prompts = PromptSets(train, heldout, shifted, texts, texts, choice)

    def demonstrations(self) -> Demonstrations:
        """The demonstrators' answers."""
        tokens = self._demonstrations
        return Demonstrations(
            tokens, self._validation, lambda size, seed: EpochBatches(tokens, size, seed), len(tokens.mask)
        )

    def prompts(self) -> PromptSets:
        """Prompts that were not compared, and those of longer lists as `shifted`."""
        return self._prompts

    def finish(self) -> None:
        """Does nothing: the world reads no files."""

    def judge(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """True utility of answers: [B]."""
        problems = [self._problems[row] for row in np.asarray(prompts.row)]
        return self.setting.utilities(
            problems, self.base.read_answers(completions), self.base.ended(completions).tolist()
        )

    def checker(self) -> Reward:
        """A verifiable reward: 1 for an answer that says just what its problem asks for, in order, else 0.

        Form, tone and length are nothing to it. A problem is known by its text.
        """
        problems = self._by_prompt()

        def score(
            prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Columns, part: Part | None = None
        ) -> HostScores:
            pairs = zip(prompts, completions, strict=True)
            return HostScores(np.array([float(self.setting.is_exact(problems[str(p)], str(c))) for p, c in pairs]))

        return Reward("correct", 1.0, on_texts=score, streams=True)

    def utilities(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """True utility of whole answers, by their texts: [B]."""
        problems = self._by_prompt()
        return self.setting.utilities([problems[prompt] for prompt in prompts], answers, [True] * len(answers))

    def reviser(self, revisers: Revisers) -> Reviser:
        """Simulated assistants that criticise and revise answers to the world's problems, by its principles."""
        problems = self._by_prompt()

        def revise(
            prompts: Sequence[Conversation],
            answers: Sequence[str],
            principles: Sequence[Principle],
            rows: Sequence[int],
            number: int,
        ) -> list[Step]:
            steps = []
            for prompt, answer, principle, row in zip(prompts, answers, principles, rows, strict=True):
                rng = np.random.default_rng([self._seed, 7, number, row])
                said = revisers.revise(rng, problems[prompt[-1]["content"]], answer, principle)
                steps.append(Step(principle, *map(Said, said)))
            return steps

        return revise

    def pair_judge(self, annotators: Annotators) -> PairJudge:
        """A simulated judge of two whole answers, which has the annotators' bias, and their noise as its doubt.

        P(first is better) = σ((perceived₁ − perceived₂) / noise)
        """
        problems = self._by_prompt()

        def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
            asked = [problems[prompt] for prompt in prompts]
            seen = (
                annotators.perceive(self._truth(asked, some), some, self.setting.flattery) for some in (first, second)
            )
            return annotators.prefer(*seen)

        return judge

    def annotators(self, sampler: Sampler) -> Annotators:
        """Annotators two of whom agree 73% of the time on pairs of the sampler's answers."""
        prompts = take(self._compared_heldout, np.repeat(np.arange(len(self._compared_heldout.row)), 2))
        answers = sampler(prompts, 2)
        texts = self.base.read_answers(answers)
        seen = self._annotators.perceive(self.judge(prompts, answers), texts, self.setting.flattery)
        return replace(self._annotators, noise=calibrate_noise(seen.reshape(-1, 2) @ np.array([1.0, -1.0]), AGREEMENT))

    def rank_texts(
        self, annotators: Annotators, prompts: Sequence[str], answers: Sequence[Sequence[str]], number: int
    ) -> list[list[int]]:
        """One annotator's ranks of each prompt's whole answers, 0 the best; other numbers give other noise."""
        rng, problems = np.random.default_rng([self._seed, 9, number]), self._by_prompt()
        found = []
        for prompt, texts in zip(prompts, answers, strict=True):
            truth = self._truth([problems[prompt]] * len(texts), texts)
            found.append(annotators.rank(rng, annotators.perceive(truth, texts, self.setting.flattery)).tolist())
        return found

    def _truth(self, problems: Sequence[Problem], texts: Sequence[str]) -> np.ndarray:
        return self.setting.utilities(problems, texts, [True] * len(texts))

    def _by_prompt(self) -> dict[str, Problem]:
        return {problem.prompt: problem for problem in self._problems}

    def comparisons(self, sampler: Sampler) -> Comparisons:
        """The annotators' rankings of the sampler's answers. Each call asks annotators of their own."""
        train, noise, _ = self._rank(sampler, 0, self._compared, self.sizes.ranked, None)
        heldout, _, facts = self._rank(sampler, 1, self._compared_heldout, 2, noise)
        return Comparisons(train, self.lay(heldout), facts, self.lay, packed=False)

    def _rank(
        self, sampler: Sampler, number: int, prompts: Prompts, count: int, noise: float | None
    ) -> tuple[list[RankedAnswers], float, dict[str, float]]:
        repeated = take(prompts, np.repeat(np.arange(len(prompts.row)), count))
        answers = sampler(repeated, number)
        texts = self.base.read_answers(answers)
        truth = self.judge(repeated, answers)
        perceived = self._annotators.perceive(truth, texts, self.setting.flattery).reshape(-1, count)
        differences = perceived[:, 0] - perceived[:, 1]
        if noise is None:
            noise = calibrate_noise(differences, AGREEMENT)
        annotators = replace(self._annotators, noise=noise)
        ranks, again = (annotators.rank(self.rng, perceived) for _ in range(2))
        facts = {
            "annotator_noise": noise,
            "annotator_agreement_expected": agreement_rate(differences, noise),
            "annotator_agreement": float(np.mean((ranks[:, 0] < ranks[:, 1]) == (again[:, 0] < again[:, 1]))),
            "ceiling": ceiling(differences, noise),
        }
        ids = [row[real].tolist() for row, real in zip(answers.tokens, answers.mask, strict=True)]
        asked = [row[real].tolist() for row, real in zip(prompts.tokens, prompts.mask, strict=True)]
        rankings = [
            RankedAnswers(prompt, ids[p * count : (p + 1) * count], tuple(ranks[p].tolist()), 0.0)
            for p, prompt in enumerate(asked)
        ]
        return rankings, noise, facts

    def lay(self, rankings: Sequence[RankedAnswers]) -> Rankings:
        """The batch of some rankings."""
        return join_rankings(
            rankings,
            prompt_length=self.setting.prompt_length,
            answer_length=self.setting.answer_length,
            pad_id=self.base.pad_id,
        )

    def _encode(self, problems: list[Problem]) -> Prompts:
        ids = self._ids([p.prompt for p in problems], self._opened)
        return pad_prompts(ids, length=self.setting.prompt_length, pad_id=self.base.pad_id)

    @cached_property
    def _opened(self) -> str:
        """A conversation up to its answer, {} for the prompt: rendered once, as all others differ in that alone."""
        messages = [{"role": "user", "content": "{}"}]
        return str(self.base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, texts: Sequence[str], frame: str = "{}") -> list[list[int]]:
        encoder = self.base.tokenizer.backend_tokenizer
        rows = encoder.encode_batch_fast([frame.format(text) for text in texts], add_special_tokens=False)
        return [row.ids for row in rows]

    def _demonstrate(self, problems: list[Problem]) -> tuple[list[tuple[list[int], list[int]]], np.ndarray]:
        """(prompt, answer) in ids, and the true utility of each answer."""
        prompts = self._encode(problems)
        texts = [self._demonstrators.write(self.rng, problem, self.setting) for problem in problems]
        tokenizer = self.base.tokenizer
        answers = self._ids(texts)
        pairs = [
            (ids[mask].tolist(), [*answer, tokenizer.eos_token_id])
            for ids, mask, answer in zip(prompts.tokens, prompts.mask, answers, strict=True)
        ]
        return pairs, self.setting.utilities(problems, texts, [True] * len(texts))


def _new_model(setting: Setting, layers: int, precision: Precision) -> Pretrained:
    """130 thousand parameters, still to be initialised."""
    tokenizer = setting.make_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer), d_model=64, n_layers=layers, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128,
        rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True,
        max_length=setting.prompt_length + setting.answer_length, precision=precision,
    )  # fmt: skip
    return Pretrained(config, None, tokenizer)


def _with_words_of(setting: Setting, model: Pretrained) -> Pretrained:
    tokenizer = setting.make_tokenizer()
    if model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{model.name} does not have the vocabulary of the controlled world, and without files there is nothing"
            " else to learn from: give some (--help names their flags)"
        )
    return model._replace(tokenizer=tokenizer, name=None)
