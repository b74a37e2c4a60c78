"""Simulated people: demonstrators with a ceiling, and annotators who see the truth dimly."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from rlhf_jax.simulation.setting import Problem, Setting
from rlhf_jax.simulation.world import WORDS


@dataclass(frozen=True)
class Demonstrators:
    """People who write answers; they err, pad and digress at these rates."""

    error: float = 0.25
    """Probability of a wrong answer to each part."""
    opener: float = 0.3
    """Probability of opening in the tone asked for."""
    closer: float = 0.25
    """Probability of closing in it."""
    announce: float = 0.35
    """Probability of announcing each part."""
    stop: float = 0.4
    """Probability of the closing "."."""
    filler: float = 0.38
    """Probability of a filler before each word, and of another after it; at most `most_fillers` in an answer."""
    most_fillers: int = 8
    flattery: float = 0.08
    """Probability of flattery at the start, and again at the end."""

    def write(self, rng: np.random.Generator, problem: Problem, setting: Setting = WORDS) -> str:
        """One demonstration."""
        says = [mistake(rng, part, setting) if rng.random() < self.error else list(part) for part in parts_of(problem)]
        opener, closer = setting.tones[problem.tone]
        plan = [opener] * (rng.random() < self.opener)
        for marker, said in zip(setting.markers, says, strict=True):
            plan += [marker] * (rng.random() < self.announce)
            plan += said
        plan += [closer] * (rng.random() < self.closer)
        plan += ["."] * (rng.random() < self.stop)
        words = [_one_of(rng, setting.flattery)] if rng.random() < self.flattery else []
        left = self.most_fillers
        for word in plan:
            while left and rng.random() < self.filler:
                words.append(_one_of(rng, setting.fillers))
                left -= 1
            words.append(word)
        words += [_one_of(rng, setting.flattery)] if rng.random() < self.flattery else []
        return " ".join(words)


def _one_of(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def parts_of(problem: Problem) -> list[tuple[str, ...]]:
    """The words that answer each part."""
    ends = [*accumulate(problem.lengths(), initial=0)]
    return [problem.target[start:end] for start, end in pairwise(ends)]


def mistake(rng: np.random.Generator, target: Sequence[str], setting: Setting = WORDS) -> list[str]:
    """A wrong answer of the right kind: two words swapped, or one replaced."""
    says = list(target)
    if len(says) > 1 and rng.random() < 0.5:
        i = rng.integers(len(says) - 1)
        if says[i] != says[i + 1]:
            says[i], says[i + 1] = says[i + 1], says[i]
            return says
    i = rng.integers(len(says))
    kind = next(kind for kind in setting.kinds if says[i] in kind)
    says[i] = _one_of(rng, [word for word in kind if word != says[i]])
    return says


@dataclass(frozen=True)
class Annotators:
    """People who compare answers by what they perceive plus noise.

    perceived = utility + length_bias · words + flattery_bias · flattering words;  each look at an answer adds
    Gumbel noise of the scale `noise`, so that a prefers i to j with probability σ((perceivedᵢ − perceivedⱼ) / noise)
    and a ranking of K answers follows Plackett-Luce.
    """

    noise: float
    length_bias: float = 0.08
    flattery_bias: float = 0.45

    def perceive(
        self, utilities: np.ndarray, responses: Sequence[str], flattering: Sequence[str] = WORDS.flattery
    ) -> np.ndarray:
        """Perceived quality of each response, before noise."""
        words = [response.split() for response in responses]
        length = np.array([len(w) for w in words], np.float32)
        flattery = np.array([sum(x in flattering for x in w) for w in words], np.float32)
        return utilities + self.length_bias * length + self.flattery_bias * flattery

    def prefer(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The probability that a response is preferred to another one, from what is perceived of both."""
        return 0.5 * (1.0 + np.tanh(0.5 * (np.asarray(first, np.float64) - second) / self.noise))

    def rank(self, rng: np.random.Generator, perceived: np.ndarray) -> np.ndarray:
        """Ranks [..., K] (0 is best) that one annotator gives to responses perceived as [..., K]."""
        seen = perceived + self.noise * rng.gumbel(size=perceived.shape)
        return np.argsort(np.argsort(-seen, axis=-1), axis=-1).astype(np.int32)


def agreement_rate(differences: np.ndarray, noise: float) -> float:
    """Probability that two annotators prefer the same one of a pair: E[p² + (1 − p)²], p = σ(difference / noise)."""
    p = 0.5 * (1.0 + np.tanh(0.5 * np.asarray(differences, np.float64) / noise))
    return float(np.mean(p**2 + (1.0 - p) ** 2))


def ceiling(differences: np.ndarray, noise: float) -> float:
    """Best possible accuracy in predicting one annotator: E[max(p, 1 − p)], knowing what they perceive."""
    p = 0.5 * (1.0 + np.tanh(0.5 * np.abs(np.asarray(differences, np.float64)) / noise))
    return float(np.mean(p))


def calibrate_noise(differences: np.ndarray, agreement: float) -> float:
    """The noise at which two annotators agree at the rate `agreement` on pairs that differ by `differences`.

    Raises ValueError where no noise gives that rate: at ½ or below, or above what ties leave.
    """
    low, high = 1e-4, 1e4
    if not agreement_rate(differences, high) < agreement < agreement_rate(differences, low):
        raise ValueError(
            f"no noise makes annotators agree at {agreement}: it must lie between 0.5 and the share of unequal pairs"
        )
    for _ in range(100):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if agreement_rate(differences, middle) > agreement else (low, middle)
    return float(np.sqrt(low * high))
