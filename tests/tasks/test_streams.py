"""Comparisons and prompts read while training goes on: all but those held out, resumed exactly, scored on the way."""

import json
import shutil
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import dpo, grpo, kto, pipeline, ppo, reward_model
from experiments.stages import open_task
from rlhf_jax import checkpoint, loop
from rlhf_jax.data.formats import Text
from rlhf_jax.data.iterators import Pass
from rlhf_jax.data.preferences import pack_answers
from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.drawn import DrawnRankings
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.models import Transformer
from rlhf_jax.models.tokenizer import read_tokenizer
from rlhf_jax.preference import batch_logprobs, stream_batches
from rlhf_jax.tasks import streams, text

pytestmark = pytest.mark.usefixtures("undrawn")

ROWS, ANSWERS = 60, ("good", "bad", "so so")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ranked(number, answers):
    """A ranking whose answers say which prompt they are of, and how good they are."""
    said = [f"{word} {number}" for word in ANSWERS[:answers]]
    return {"prompt": f"what of {number}?", "responses": said, "ranks": [0, 2, 1][:answers]}


@pytest.fixture
def files(tmp_path, stories):
    comparisons = lines(tmp_path / "comparisons.jsonl", [ranked(n, 2 + n % 2) for n in range(ROWS)])
    return dict(model=stories, comparisons=comparisons, streaming=True, max_length=64, max_new_tokens=8)


def task_of(tmp_path, module=reward_model, **flags):
    with Run(tmp_path / "task", cfg := module.Config(**flags), name="task") as run:
        return open_task(cfg, run)


def at_step(first):
    """A loop of four steps at that one, whose checkpoint has no position in the data."""
    found = object.__new__(loop.Loop)
    found.first, found.steps, found.data_state = first, 4, lambda: None
    return found


def said(task, ranking):
    """(number of the prompt, the words of its answers from the best to the worst)."""
    read = [task.base.tokenizer.decode(ids, skip_special_tokens=True).split() for ids in ranking.responses]
    order = np.argsort(ranking.ranks)
    (number,) = {words[-1] for words in read}
    assert str(number) in task.base.tokenizer.decode(ranking.prompt)
    return int(number), [" ".join(read[i][:-1]) for i in order]


def test_every_ranking_comes_but_those_held_out_and_none_of_their_openings(files, tmp_path):
    twice = lines(tmp_path / "twice.jsonl", [ranked(n % ROWS, 2 + n % 2) for n in range(2 * ROWS)])
    task = task_of(tmp_path, **{**files, "comparisons": twice}, shuffle_window=16)
    comparisons = task.comparisons(None)
    heldout = {said(task, one)[0] for one in task._compared()[1].ids}
    assert heldout
    batches = comparisons.stream.batches(4, 0)
    drawn = [ranking for batch in islice(batches, 60) for ranking in batch]
    found = [said(task, ranking) for ranking in drawn]
    assert {number for number, _ in found} == set(range(ROWS)) - heldout
    for number, words in found:
        assert words == [["good", "bad"], ["good", "so so", "bad"]][number % 2]
    firsts = {ranking.ranks[0] for ranking in drawn}
    assert len(firsts) == 3  # nothing may learn the place
    again = [said(task, one) for batch in islice(comparisons.stream.batches(4, 0), 60) for one in batch]
    other = [said(task, one) for batch in islice(comparisons.stream.batches(4, 1), 60) for one in batch]
    assert again == found != other


def test_of_a_ranking_with_more_answers_than_there_is_room_for_the_ends_are_used(files, tmp_path, monkeypatch, capsys):
    """The first rows say how many answers a batch has room for; a later one with more stops nobody."""
    monkeypatch.setattr(streams, "STREAM_HEAD", 30)
    monkeypatch.setattr(text, "STREAM_HEAD", 30)
    rows = [ranked(n, 2) for n in range(30)] + [ranked(n, 2 + n % 2) for n in range(30, 40)]
    path = lines(tmp_path / "more.jsonl", rows)
    task = task_of(tmp_path, **{**files, "comparisons": path}, shuffle_window=16)
    batches = task.comparisons(None).stream.batches(2, 0)
    found = [said(task, ranking) for batch in islice(batches, 60) for ranking in batch]
    assert {number for number, _ in found} >= set(range(30, 40))
    assert all(words == ["good", "bad"] for _, words in found)
    task.finish()
    shown = capsys.readouterr().out
    assert "only 2 answers used, as many as the first rows have: 5 rows (lines 32, 34, 36, 38, 40)" in shown


def test_rows_are_counted_once_however_many_read_them(files, tmp_path, monkeypatch, capsys):
    """Members of an ensemble each read the stream from its beginning, and other hosts tell what they met once."""
    task = task_of(tmp_path, **files, shuffle_window=16)
    stream = task.comparisons(None).stream
    for _ in range(2):
        for _ in islice(stream.batches(4, 0), 40):
            pass
        task.finish()
    assert f"{ROWS} rows used" in (shown := capsys.readouterr().out) and f"{2 * ROWS} rows used" not in shown
    elsewhere = Rejects()
    elsewhere.use(Place("other", 1))
    task._elsewhere = elsewhere
    monkeypatch.setattr(text, "gather", lambda told: [told, {**told}])
    task.finish()
    task.finish()
    assert task._rejects.used["other"] == 1


def test_a_demonstration_that_is_held_out_is_known_in_whatever_order_the_files_come(stories):
    """The rows of a set on the Hub are numbered as they come."""
    tokenizer = read_tokenizer(Path(stories))
    texts = [f"row number {n}" for n in range(40)]

    def rows(rejects, *, start=0, order=None, shard=(0, 1)):
        places = np.arange(40) if order is None else np.random.default_rng(order).permutation(40)
        for number in range(start, 40):
            row = Text(texts[places[number]], Place("hub", number + 1))
            yield Read(number, row, {})

    source = streams.StreamedSource(rows, tokenizer, 64, budget=8, counted=Rejects(), in_order=False)
    heldout = {tokenizer.decode(ids[-1]) for ids in source.validation}
    trained = {tokenizer.decode(ids[-1]) for _, ids in source.open(0, Pass(0, 5, (0, 1)))}
    assert len(heldout) == 4 and len(trained) == 36 and not heldout & trained


def test_probabilities_of_a_stream_are_clamped(files, tmp_path):
    rows = [{"prompt": f"what of {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "probability": 0.9}
            for n in range(40)]  # fmt: skip
    path = lines(tmp_path / "soft.jsonl", rows)
    for clamp, doubt in ((None, 0.1), (0.6, 0.4)):
        task = task_of(tmp_path / str(clamp), **{**files, "comparisons": path}, comparisons_clamp=clamp)
        batch = next(task.comparisons(None).stream.batches(8, 0))
        np.testing.assert_allclose([ranking.doubt for ranking in batch], doubt, atol=1e-6)


REWARD = """
def own_number(prompts, completions, number, **columns):
    for prompt, own in zip(prompts, number):
        assert prompt.split()[2] == f"{own}?", (prompt, own)
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def asking(tmp_path, stories):
    """Flags of a stage that samples answers to a stream of prompts, each with its number, scored by a function."""
    rows = [{"prompt": f"what of {n}?" + " and so" * (n % 2), "number": n} for n in range(ROWS)]
    reward = tmp_path / "reward.py"
    reward.write_text(REWARD)
    return dict(
        model=stories, prompts=lines(tmp_path / "prompts.jsonl", rows), streaming=True, max_length=64,
        max_new_tokens=8, reward=f"{reward}:own_number", shuffle_window=16,
    )  # fmt: skip


STAGES = {
    "reward_model": (reward_model, dict(prompts_per_step=4, accumulate=2)),
    "dpo": (dpo, dict(batch_size=4, accumulate=2)),
    "ppo": (ppo, dict(responses=4, epochs=1, minibatches=1, save_every=2)),
    "grpo": (grpo, dict(groups=2, group_size=2)),
}


def test_every_prompt_comes_but_those_held_out_with_its_own_row(asking, tmp_path):
    for changes in ({}, {"prompt_suffix": "Be short."}):
        task = task_of(tmp_path / str(len(changes)), grpo, **{**asking, **changes})
        sets = task.prompts()
        heldout = {row.columns["number"] for row in sets.heldout_rows}
        assert len(heldout) == 6 and {row.columns["number"] for row in sets.rows} == set(range(ROWS)) - heldout
        assert sets.train.tokens.shape[1] == 56  # whatever comes later fits
        numbers = []
        for prompts, rows in islice(sets.stream(4, 0), 60):
            for ids, mask, row in zip(prompts.tokens, prompts.mask, prompts.row, strict=True):
                text = task.base.tokenizer.decode(ids[mask])
                number = rows[row].columns["number"]
                assert f"what of {number}?" in text and ("Be short." in text) == bool(changes)
                assert rows[row].prompt.startswith(f"what of {number}?")
                numbers.append(number)
        assert set(numbers) == set(range(ROWS)) - heldout
        counts = np.bincount(numbers)
        assert counts[counts > 0].min() >= 3 and counts.max() <= 6  # passes, of 4.4 in all
        other = [row.columns["number"] for _, rows in islice(sets.stream(4, 1), 15) for row in rows]
        assert other != numbers[:60]


def test_prompts_of_streamed_comparisons_are_all_of_them_and_their_rows_are_counted_once(files, tmp_path, capsys):
    task = task_of(tmp_path, pipeline, **files, shuffle_window=16)
    heldout = {said(task, one)[0] for one in task._compared()[1].ids}
    drawn = [row.prompt for _, rows in islice(task.prompts().stream(4, 0), 60) for row in rows]
    assert set(drawn) == {f"what of {n}?" for n in set(range(ROWS)) - heldout}
    for _ in islice(task.comparisons(None).stream.batches(4, 0), 40):
        pass
    task.finish()
    shown = capsys.readouterr().out
    path = files["comparisons"]
    assert f"\n{path}: {ROWS} rows used" in shown
    assert f"prompts to answer: {path}: {ROWS - len(heldout)} rows used" in shown


def drawn_numbers(sets, batches=60):
    return [row.columns["number"] for _, rows in islice(sets.stream(4, 0), batches) for row in rows]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out_and_said(asking, tmp_path, monkeypatch, capsys):
    """It stops nobody, as in memory; and held-out prompts are no wider than they need."""
    monkeypatch.setattr(streams, "STREAM_HEAD", 30)
    monkeypatch.setattr(text, "STREAM_HEAD", 30)
    with open(asking["prompts"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "what of this?" + " and so" * 40, "number": 99}) + "\n")
    task = task_of(tmp_path, grpo, **asking)
    sets = task.prompts()
    assert 99 not in drawn_numbers(sets) and sets.heldout.tokens.shape[1] == 32
    task.finish()
    assert "prompts to answer: prompt too long for 56 tokens: 1" in capsys.readouterr().out
    assert not (tmp_path / "task" / "rejected.jsonl").exists()


def test_a_file_without_prompts_to_train_on_is_left_out_and_said(asking, tmp_path, capsys):
    chats = [{"prompt": f"what of {n}?", "completion": "it is good", "number": n} for n in range(ROWS)]
    texts = lines(tmp_path / "texts.jsonl", [{"text": f"once upon a time there were {n}"} for n in range(20)])
    bad = lines(tmp_path / "chats.jsonl", [*chats, {"prompt": 3, "completion": "it is good"}])
    flags = {name: value for name, value in asking.items() if name != "prompts"}
    task = task_of(tmp_path, ppo, **flags, demonstrations=(bad, texts), on_bad_row="skip")
    assert len(set(drawn_numbers(task.prompts()))) == ROWS - 6
    task.finish()
    assert f"{texts}: no prompt to train on among its first rows" in (shown := capsys.readouterr().out)
    assert f"prompts to answer: {bad}: 54 rows used" in shown
    (entry,) = map(json.loads, (tmp_path / "task" / "rejected.jsonl").read_text().splitlines())
    assert entry["line"] == ROWS + 1


def test_prompts_of_streamed_comparisons_have_their_weights(files, tmp_path):
    other = lines(tmp_path / "other.jsonl", [ranked(n, 2) for n in range(100, 100 + ROWS)])
    sources = {"comparisons": (files["comparisons"], other), "comparisons_weights": (9.0, 1.0)}
    task = task_of(tmp_path, pipeline, **{**files, **sources}, shuffle_window=16)
    drawn = [row.prompt for _, rows in islice(task.prompts().stream(4, 0), 60) for row in rows]
    with pytest.raises(UserError, match="1 weights for 2 sources"):
        task_of(tmp_path / "one", pipeline, **{**files, **sources, "comparisons_weights": (1.0,)}).prompts()
    assert 0.85 < np.mean([int(prompt.split()[2][:-1]) < 100 for prompt in drawn]) < 0.95


def test_prompts_that_are_only_measured_on_are_read_as_a_whole(files, asking, tmp_path, capsys):
    with open(asking["prompts"], "a", encoding="utf-8") as file:
        file.write('{"prompt": 3}\n')
    task = task_of(tmp_path, dpo, **files, prompts=asking["prompts"], on_bad_row="skip")
    sets = task.prompts()
    assert sets.stream is None and len(sets.rows) + len(sets.heldout_rows) == ROWS
    assert "prompts: 54 to train on, 6 held out" in capsys.readouterr().out
    assert (tmp_path / "task" / "rejected.jsonl").exists()


def test_bad_rows_of_streamed_prompts_are_counted(asking, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "STREAM_HEAD", 30)
    monkeypatch.setattr(text, "STREAM_HEAD", 30)
    with open(asking["prompts"], "a", encoding="utf-8") as file:
        file.write('{"prompt": 3}\n')
    task = task_of(tmp_path, grpo, **asking, on_bad_row="skip")
    for _ in islice(task.prompts().stream(4, 0), 40):
        pass
    task.finish()
    assert "1 rows left out (lines 61)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prompts\.jsonl:61"):
        for _ in islice(task_of(tmp_path / "stop", grpo, **asking).prompts().stream(4, 0), 40):
            pass


def test_a_checkpoint_without_a_position_in_a_stream_is_refused(files, tmp_path):
    stream = task_of(tmp_path, **files).comparisons(None).stream

    with pytest.raises(UserError, match="the checkpoint's position in the data is none in these data"):
        DrawnRankings((), stream, 4, 0, at_step(2))


def test_the_pipeline_refuses_epochs_of_a_stream_before_it_trains():
    with pytest.raises(UserError, match=r"give --reward-model\.steps, not --reward-model\.epochs"):
        pipeline.Config(streaming=True, reward_model=reward_model.RewardModel(epochs=1.0))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_on_a_stream_goes_on_to_the_very_same_parameters(files, asking, tmp_path, monkeypatch, stage):
    module, flags = STAGES[stage]
    flags = flags | (asking if stage in ("ppo", "grpo") else files | {"evaluations": 3})

    def train(**changes):
        cfg = module.Config(**flags, steps=6, learning_rate=1e-3, keep=3, run_dir=str(tmp_path / "run"), **changes)
        module.main(cfg)
        return checkpoint.inspect(tmp_path / "run", stage, 6).sha256

    straight = train()
    folder = tmp_path / "run" / "checkpoints" / stage

    def again():
        for step in (4, 6):
            shutil.rmtree(folder / str(step))
        return train(resume=True)

    assert again() == straight
    # It is the stream's position that does it: from the beginning on, the end is another.
    if "prompts" in flags:
        batches = task_of(tmp_path, grpo, **asking).prompts().stream(4, 0)
    else:
        batches = task_of(tmp_path, **files).comparisons(None).stream.batches(4, 0)
    beginning = batches.get_state()
    inspect = checkpoint.inspect
    monkeypatch.setattr(loop.checkpoint, "inspect", lambda *a, **k: inspect(*a, **k)._replace(data_state=beginning))
    assert again() != straight


def test_answers_of_a_stream_are_scored_by_the_reference_as_they_come(files, tmp_path):
    task = task_of(tmp_path, **files)
    model, base = Transformer(task.base.config), task.base
    score = jax.jit(lambda packed: batch_logprobs(model, base.params, packed))

    drawn = DrawnRankings((), task.comparisons(None).stream, 4, 0, at_step(0))
    batch = stream_batches(drawn, score, accumulate=1, length=64, pad_id=base.pad_id)(0)
    rankings = next(task.comparisons(None).stream.batches(4, 0))
    assert batch.good.tolist() == [True] * 4 + [False] * 4
    for number, ranking in enumerate(rankings):
        for place, rank in ((number, min(ranking.ranks)), (number + 4, max(ranking.ranks))):
            answer = ranking.responses[ranking.ranks.index(rank)]
            alone = score(pack_answers([(ranking.prompt, answer)], length=64, pad_id=base.pad_id))
            np.testing.assert_allclose(batch.ref_logprobs[place], alone[0], rtol=2e-5)
            assert batch.lengths[place] == len(answer)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (kto, {}, "--streaming is not used here: KTO sets answers beside those to other prompts"),
        (dpo, {"pairs": "all"}, "--streaming is not used here: --pairs all"),
        (reward_model, {"epochs": 1.0}, "a stream has no passes to count: give --steps instead of --epochs"),
        (reward_model, {"epochs": 1.0, "steps": 1}, "--epochs and --steps both say how long to train"),
        (reward_model, {"comparisons_weights": (1.0, 2.0)}, "2 weights for 1 sources"),
    ],
)
def test_what_a_stream_cannot_give_is_one_line(files, tmp_path, module, flags, message):
    with pytest.raises(UserError, match=message):
        module.main(module.Config(**files, **flags, run_dir=str(tmp_path / "run")))
