"""The interface of a task: the model and the data of an experiment, from the controlled world or from files."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from rlhf_jax.batches import Completions, PackedRankings, Prompts, Rankings, Tokens
from rlhf_jax.data.encode import RankedAnswers
from rlhf_jax.data.order import PromptStream, RankingStream
from rlhf_jax.data.tokens import take
from rlhf_jax.pretrained import Pretrained

if TYPE_CHECKING:
    import grain

Sampler = Callable[[Prompts, int], Completions]
"""sampler(prompts, number) -> numpy Completions; other numbers give other answers."""
Judge = Callable[[Prompts, Completions], Float[np.ndarray, " B"]]
"""judge(prompts, completions) -> true utility of each answer; only for measuring."""


class Demonstrations(NamedTuple):
    """Prompts with the answers that SFT imitates, and a part of them that it does not see."""

    train: Tokens
    """Packed rows for PPO-ptx: of a stream the first ones, of a large set as many as make four million tokens."""
    validation: Tokens
    """One demonstration to a row."""
    batches: "Callable[[int, int], grain.DatasetIterator[Tokens]]"
    """batches(batch_size, seed): endless batches of packed rows, each process's own rows of them."""
    rows: int | None
    """Packed rows an epoch; None for a stream, which has no epochs."""


class Comparisons(NamedTuple):
    """Rankings of answers to the same prompts, by people or by simulated annotators."""

    train: Sequence[RankedAnswers]
    """All of them; of a stream the first ones."""
    heldout: Rankings
    """Two answers to each prompt."""
    facts: dict[str, float]
    """Facts about the annotators, where they are simulated: their agreement, and the ceiling that their noise sets."""
    lay: Callable[[Sequence[RankedAnswers]], Rankings | PackedRankings]
    """The batch of some rankings."""
    packed: bool
    """Whether a row of a batch holds several answers."""
    stream: RankingStream | None = None
    """Where the rankings to train on come from when they are not all in `train`."""


class PromptSets(NamedTuple):
    """Prompts to sample answers to: for training, held out, and held out from another distribution."""

    train: Prompts
    """All of them; of a stream the first ones, as wide as the longest that may come."""
    heldout: Prompts
    shifted: Prompts | None = None
    rows: Sequence["PromptRow"] = ()
    """The rows that `train.row` numbers, for rewards that read text."""
    heldout_rows: Sequence["PromptRow"] = ()
    choice: Prompts | None = None
    """Prompts on which one of several policies is chosen; None where a task has none beside those held out."""
    stream: PromptStream | None = None
    """Where the prompts to train on come from when they are not all in `train`."""


def with_choice(sets: PromptSets) -> PromptSets:
    """The same with prompts for a choice, which the last evaluation does not see: where there are none, every second
    held-out prompt, of at least two."""
    count = len(sets.heldout.row)
    if sets.choice is not None or count < 2:
        return sets
    rows = np.arange(count)
    return sets._replace(choice=take(sets.heldout, rows[1::2]), heldout=take(sets.heldout, rows[::2]))


class PromptRow(NamedTuple):
    """A prompt as it stands in its file: a text or a list of messages, and the row's other columns."""

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]

    def asked(self) -> dict[str, Any]:
        """The fields of a row that is to be learned with the prompt: the prompt, and its tools if it has any."""
        return {"prompt": self.prompt} | {
            name: self.columns[name] for name in ("tools", "functions") if self.columns.get(name)
        }


@runtime_checkable
class Task(Protocol):
    """The model and the data of a stage. Each part is read only when it is asked for."""

    base: Pretrained
    """The model that a stage starts from; its parameters are None where it is still to be initialised."""
    max_new_tokens: int
    """The longest answer that is sampled."""
    facts: dict[str, float]
    """Facts about the demonstrators, where they are simulated; else empty."""
    eval_batch_size: int
    """Rows that are sampled or scored at once where nothing is trained."""
    has_demonstrations: bool

    @property
    def judge(self) -> Judge | None:
        """True utility of answers, only for measuring; None where it is not known."""
        ...

    def demonstrations(self) -> Demonstrations:
        """Answers to imitate. Raises UserError where there are none."""
        ...

    def comparisons(self, sampler: Sampler) -> Comparisons:
        """Comparisons from files, or of the answers that `sampler` gives. Raises UserError where there are none."""
        ...

    def prompts(self) -> PromptSets:
        """Prompts to sample answers to. Raises UserError where there are none."""
        ...

    def finish(self) -> None:
        """Reports rows that were read and left out since the start, for files that are read while training goes on."""
        ...
