"""An answer is criticised and revised, by a principle that is drawn each time (Bai et al. 2022, §3.1).

A chain is an answer, and then a critique and a revision for each principle. `reviser(reply, …)` has a language model
say both, in a conversation; a simulation may say them by its own rules.
Reference: https://arxiv.org/abs/2212.08073.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.constitution import Principle
from rlhf_jax.data.conversations import Conversation, message, messages
from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.tokens import bucket, pad_prompts
from rlhf_jax.pretrained import Pretrained

LONG, EMPTY, UNFIT = (
    "the conversation does not fit into the model's length", "a text is empty",
    "the chat template refuses the conversation",
)  # fmt: skip
"""Why a text is missing."""
ENDLESS = "the last text does not end within --max-new-tokens"
"""Why a chain is not learned from, though all of its texts are there."""


class Said(NamedTuple):
    """A reply of the model. Without a text, `missing` says why."""

    text: str = ""
    missing: str = ""
    ended: bool = True
    """False where the text is cut off at the longest that is sampled. It is used all the same, but not learned."""


class Step(NamedTuple):
    """One revision of an answer."""

    principle: Principle
    critique: Said
    revision: Said


Reply = Callable[[Sequence[Conversation], Sequence[int], int], list[Said]]
"""reply(conversations, rows, number) -> the assistant's next turn in each. What it draws depends on the conversation's
row and the number, not on the conversations beside it."""
Reviser = Callable[[Sequence[Conversation], Sequence[str], Sequence[Principle], Sequence[int], int], list[Step]]
"""revise(prompts, answers, principles, rows, number) -> a step for each answer, which is drawn as a reply is."""


class Chain(NamedTuple):
    """An answer to a prompt, and its revisions, one after the other. It ends early where a text is missing."""

    prompt: Conversation
    answer: Said
    steps: tuple[Step, ...]

    @property
    def missing(self) -> str:
        """Why a text of the chain is missing; "" where none is."""
        return next((said.missing for said in self.texts() if said.missing), "")

    @property
    def unlearned(self) -> str:
        """Why the last text is not learned; "" where it is."""
        return self.missing or ("" if self.texts()[-1].ended else ENDLESS)

    def texts(self) -> list[Said]:
        """The answer, and then each critique and revision."""
        return [self.answer, *(said for step in self.steps for said in (step.critique, step.revision))]


def revise_answers(
    revise: Reviser, prompts: Sequence[Conversation], answers: Sequence[Said], principles: Sequence[Principle],
    rows: Sequence[int], drawn: np.ndarray,
) -> list[Chain]:  # fmt: skip
    """A chain for each prompt, whose number is its row. `drawn` [N, revisions] are the numbers of the principles, in
    their order. Revision k of all chains has the number k.
    """
    chains = [Chain(prompt, answer, ()) for prompt, answer in zip(prompts, answers, strict=True)]
    for k in range(drawn.shape[1]):
        going = [place for place, chain in enumerate(chains) if not chain.missing]
        steps = revise(
            [chains[place].prompt for place in going], [chains[place].texts()[-1].text for place in going],
            [principles[drawn[place, k]] for place in going], [rows[place] for place in going], k,
        )  # fmt: skip
        for place, step in zip(going, steps, strict=True):
            chains[place] = chains[place]._replace(steps=(*chains[place].steps, step))
    return chains


def draw_principles(seed: int, rows: Sequence[int], revisions: int, count: int) -> np.ndarray:
    """[N, revisions]: one of `count` principles for each revision, by the row's number alone."""
    return np.stack([np.random.default_rng([seed, 5, row]).integers(count, size=revisions) for row in rows])


def make_reviser(reply: Reply, examples: Sequence[Conversation] = ()) -> Reviser:
    """A language model that criticises and revises: (examples, prompt, answer, request) → critique, and
    (…, critique, request) → revision, as turns of one conversation."""
    shown = tuple(turn for example in examples for turn in example)

    def revise(
        prompts: Sequence[Conversation],
        answers: Sequence[str],
        principles: Sequence[Principle],
        rows: Sequence[int],
        number: int,
    ) -> list[Step]:
        asked = [
            (*system(prompt), *shown, *prompt[len(system(prompt)) :], message("assistant", answer),
             message("user", principle.critique))
            for prompt, answer, principle in zip(prompts, answers, principles, strict=True)
        ]  # fmt: skip
        critiques = reply(asked, rows, 2 * number)
        going = [place for place, critique in enumerate(critiques) if not critique.missing]
        said = reply(
            [
                (
                    *asked[place],
                    message("assistant", critiques[place].text),
                    message("user", principles[place].revision),
                )
                for place in going
            ],
            [rows[place] for place in going],
            2 * number + 1,
        )
        revisions = dict(zip(going, said, strict=True))
        return [
            Step(principle, critique, revisions.get(place, Said(missing=critique.missing)))
            for place, (principle, critique) in enumerate(zip(principles, critiques, strict=True))
        ]

    return revise


def system(prompt: Conversation) -> Conversation:
    """The system's messages that a prompt begins with; chat templates want them first."""
    return tuple(takewhile(lambda turn: turn["role"] == "system", prompt))


def make_reply(
    model: Pretrained, sample: Callable[[Prompts, int], Completions], *, max_length: int, examples: int = 0
) -> Reply:
    """A language model's replies. `sample(prompts, number)` samples one to each prompt, by the prompt's row.

    Prompts have at most `max_length` tokens. One that is longer loses its oldest turns, at most the first `examples`:
    without more than those it would be another question.
    """

    def reply(conversations: Sequence[Conversation], rows: Sequence[int], number: int) -> list[Said]:
        found: list[Said] = []
        ids: list[list[int]] = []
        asked: list[int] = []
        for place, (conversation, row) in enumerate(zip(conversations, rows, strict=True), 1):
            try:
                some, dropped = encode(Prompt(conversation, Place("conversation", place)), model.tokenizer, max_length)
            except BadRow as error:
                found.append(Said(missing=LONG if "too long" in str(error) else UNFIT))
                continue
            found.append(Said(missing=LONG) if dropped > examples else Said())
            if dropped <= examples:
                ids.append(some)
                asked.append(row)
        if ids:
            longest = max(map(len, ids))
            length = bucket(longest, longest=max_length)
            prompts = pad_prompts(ids, length=length, pad_id=model.pad_id, rows=asked)
            replies = iter(read(model, sample(prompts, number)))
            found = [said if said.missing else next(replies) for said in found]
        return found

    return reply


def read(model: Pretrained, answers: Completions) -> list[Said]:
    """Sampled answers as text; one that is empty is missing."""
    return [
        Said(text, ended=ended) if text.strip() else Said(missing=EMPTY)
        for text, ended in zip(model.read_answers(answers), model.ended(answers).tolist(), strict=True)
    ]


def chain_row(chain: Chain, asked: Mapping[str, Any], row: int) -> dict[str, Any]:
    """A chain as a row of chains.jsonl. `asked` has the prompt, a text or a list of messages, and perhaps tools."""
    steps = [
        {"principle": step.principle.name, "critique": step.critique.text, "revision": step.revision.text}
        for step in chain.steps
    ]
    return {
        "row": row, **asked, "answer": chain.answer.text, "revisions": steps, "unlearned": chain.unlearned,
    }  # fmt: skip


def asked_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a row of chains.jsonl, and its tools if it has any."""
    return {name: row[name] for name in ("prompt", "tools", "functions") if name in row}


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """The answer of a row of chains.jsonl, and each of its revisions."""
    return [row["answer"], *(step["revision"] for step in row["revisions"])]


def learnable(answer: Said) -> bool:
    """Whether an answer has words, and an end."""
    return bool(answer.text) and answer.ended


def compared(prompt: Any, first: str, second: str, p: float) -> dict[str, Any] | None:
    """A comparison as a row: the answer that is preferred comes first. None where neither is, or the judge failed."""
    if np.isnan(p) or p == 0.5:
        return None
    better, worse = (first, second) if p >= 0.5 else (second, first)
    return {"prompt": prompt, "chosen": better, "rejected": worse, "probability": max(p, 1 - p)}


def as_conversation(prompt: Any) -> Conversation:
    """A prompt as messages, as the policy was asked it: a text may be a transcript."""
    return messages({"prompt": prompt}, "prompt")
