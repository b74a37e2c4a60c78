"""The best of n answers to each prompt, as rows of a file that can be learned from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.best_of_n import Pool, prompts_a_pool, sample_pools
from rlhf_jax.data.tokens import take
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.row_file import read_rows, write_parts
from rlhf_jax.tasks.measure import AnswerScorer
from rlhf_jax.tasks.task import Task


def write_picked(
    run: Run, what: str, file: Path, task: Task, sample: Callable[[Prompts], Completions], score: AnswerScorer,
    n: int, *, blind: bool = False,
) -> int:  # fmt: skip
    """Writes the `picked_rows` of all training prompts to a file, as they come; returns how many there are.

    `sample(prompts)` answers each prompt once, by its row. A resumed run goes on after the last rows of the file.
    """
    sets, size = task.prompts(), prompts_a_pool(n, task.eval_batch_size)

    def make(part: range) -> list[dict[str, Any]]:
        some = take(sets.train, np.asarray(part))
        (pool,) = sample_pools(sample, score, some, n, rows=len(part) * n)
        return picked_rows(task, pool, part.start, blind=blind)

    write_parts(run, what, file, len(sets.train.row), size, make)
    return from_first(lambda: sum(1 for _ in read_rows(file)))


def picked_rows(task: Task, pool: Pool, first: int, *, blind: bool = False) -> list[dict[str, Any]]:
    """A row for each prompt whose best answer ends and has words: prompt (and tools), completion, score, and "row".

    That is the prompt's number, counted up from `first`. `blind` adds the first answer to the prompt that ends and has
    words: a random one, for it was drawn without a look at the scores.
    """
    n = pool.scores.shape[1]

    def texts(rows: Int[np.ndarray, " N"]) -> list[str]:
        answers = take(pool.answers, rows)
        found = zip(task.base.read_answers(answers), task.base.ended(answers).tolist(), strict=True)
        return [text if ended and text.strip() else "" for text, ended in found]

    prompts, best = task.prompts().rows, texts(pool.best())
    others = texts(np.arange(pool.scores.size)) if blind else []
    found = []
    for place, (number, text) in enumerate(zip(pool.prompts.row.tolist(), best, strict=True)):
        if text:
            row = prompts[number].asked() | {"completion": text, "score": float(pool.scores[place].max())}
            if blind:
                row["blind"] = next(filter(None, others[place * n : place * n + n]))
            found.append(row | {"row": first + place})
    return found
