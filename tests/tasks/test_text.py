"""Real text through the experiments: bad rows stop or are counted, mixtures, streaming, resuming exactly."""

import json
import shutil
import sys

import numpy as np
import pytest

from experiments import ppo, reward_model, sft
from experiments.stages import open_own, open_task
from rlhf_jax import checkpoint, loop
from rlhf_jax.cli import run_main
from rlhf_jax.data.heldout import split_by_hash
from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.tasks import streams, text

pytestmark = pytest.mark.usefixtures("undrawn")

BAD_ROWS = ["{broken", '{"prompt": "p"}', '{"prompt": "p", "completion": " "}', '{"prompt": "p", "completion": 3}']
REASONS = [
    "not JSON: Expecting property name enclosed in double quotes", "field 'completion' is missing", "empty answer",
    "field 'completion' is int, not text",
]  # fmt: skip


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path, stories):
    """Flags of a small run on real text."""
    said = ["yes", "no, never", "perhaps", "so it is"]
    demonstrations = [{"prompt": f"is it {n}?", "completion": f"{said[n % 4]} {n}"} for n in range(60)]
    answers = [[f"good {n}", "bad", f"so so {n}"][: 2 + n % 2] for n in range(40)]
    ranked = [
        {"prompt": f"what of {n}?", "responses": some, "ranks": [0, 2, 1][: len(some)]}
        for n, some in enumerate(answers)
    ]
    return dict(
        model=stories,
        demonstrations=lines(tmp_path / "demonstrations.jsonl", demonstrations),
        comparisons=lines(tmp_path / "comparisons.jsonl", ranked),
        max_length=64,
        max_new_tokens=8,
    )


def task_of(cfg, folder):
    """What the flags name, and what was said of it."""
    with Run(folder, cfg, name="task") as run:
        return open_task(cfg, run)


SFT_FILES = ("model", "demonstrations", "max_length", "max_new_tokens")


def train_sft(files, run_dir, **changes):
    given = {name: files[name] for name in SFT_FILES}
    cfg = sft.Config(
        **{**given, "steps": 12, "batch_size": 4, "learning_rate": 1e-3, "run_dir": str(run_dir), **changes}
    )
    sft.main(cfg)
    # The last checkpoint's digest is that of parameters and optimiser.
    last = checkpoint.latest(run_dir, "sft")
    return last, checkpoint.inspect(run_dir, "sft", last).sha256


def exits(monkeypatch, capsys, main, config, flags):
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(main, config)
    shown = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(shown.splitlines()) == 1
    return shown


def flags_of(files, **changes):
    given = {name: files[name] for name in SFT_FILES}
    return [part for key, value in {**given, **changes}.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def test_a_bad_row_stops_the_run_before_it_begins(files, tmp_path, monkeypatch, capsys):
    for bad, reason in zip(BAD_ROWS, REASONS, strict=True):
        path = lines(tmp_path / "bad.jsonl", ['{"prompt": "p", "completion": "c"}', bad])
        monkeypatch.chdir(tmp_path)
        shown = exits(monkeypatch, capsys, sft.main, sft.Config, flags_of(files, demonstrations=path))
        assert f"{path}:2: {reason} (--on-bad-row=skip leaves such rows out and counts them)" in shown
    assert not (tmp_path / "runs").exists()


def test_bad_rows_are_skipped_counted_and_written_down(files, tmp_path, capsys):
    with open(files["demonstrations"], "a") as file:
        file.write("\n".join(BAD_ROWS * 2) + "\n")
    long = {"prompt": "p " * 200, "completion": "c"}, {"prompt": "p", "completion": "c " * 200}
    with open(files["demonstrations"], "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in long)
    train_sft(files, tmp_path / "run", on_bad_row="skip", steps=2)
    entries = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [*range(61, 71)]
    long = ["prompt too long for 64 tokens", "response too long for 64 tokens"]
    assert [entry["reason"] for entry in entries] == [*REASONS * 2, *long]
    shown = "".join(capsys.readouterr())
    name = files["demonstrations"]
    assert f"{name}: demonstrations in the format prompt_completion" in shown
    assert f"{name}: 60 rows used" in shown
    assert f"{name}: empty answer: 2 rows left out (lines 63, 67)" in shown
    assert f"{name}: prompt too long for 64 tokens: 1 rows left out (lines 69)" in shown
    # The sample: a prompt, and what is learned of it, up to the end of the answer.
    sample = shown.partition("in [[brackets]]:")[2].replace("|", "")
    assert "Human: is it" in sample.partition("[[")[0]
    assert sample.partition("[[")[2].partition("]]")[0].endswith("</s>")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_goes_on_to_the_very_same_parameters(files, tmp_path, monkeypatch, streaming):
    flags = dict(streaming=streaming, batch_size=12, keep=3)
    straight = train_sft(files, tmp_path / "run", **flags)
    folder = tmp_path / "run" / "checkpoints" / "sft"
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert len(steps) > 2 and steps[-1] == 12

    def again():
        for step in steps[1:]:
            shutil.rmtree(folder / str(step))
        return train_sft(files, tmp_path / "run", **flags, resume=True)

    assert again() == straight
    # It is the data's position that does it: from the beginning on, the end is another.
    cfg = sft.Config(**{name: files[name] for name in SFT_FILES}, streaming=streaming)
    beginning = task_of(cfg, tmp_path / "task").demonstrations().batches(12, 0).get_state()
    inspect = checkpoint.inspect
    monkeypatch.setattr(loop.checkpoint, "inspect", lambda *a, **k: inspect(*a, **k)._replace(data_state=beginning))
    assert again() != straight


def test_a_runs_own_files_are_read_whole_and_what_was_trained_on_stays_there(files, tmp_path):
    """--limit is about the user's files."""
    own, cfg = tmp_path / "own.jsonl", sft.Config(**{name: files[name] for name in SFT_FILES}, limit=5)
    said = [{"prompt": f"what {n}?", "completion": f"that {n}"} for n in range(200)]
    train = []
    with Run(tmp_path / "run", cfg, name="task") as run:
        task = open_task(cfg, run)
        for count in (100, 200):
            lines(own, said[:count])
            with_own = open_own(cfg, task, run, {"demonstrations": [own]})
            rows, _ = with_own._read("demonstrations"), with_own.demonstrations()
            assert [len(some.ids) for some in rows] == [count, 5]
            prompts = [row["prompt"] for row in said[:count]]
            train.append(set(split_by_hash(prompts, rows[0].openings, budget=512)[0]))
            assert with_own._demonstrations().validation.mask.shape[0] == count - len(train[-1]) + 1
    assert train[0] < train[1]


def test_a_mixture_of_conversations_and_plain_text(files, tmp_path, capsys):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(4)]
    chats = lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    texts = lines(tmp_path / "texts.jsonl", [{"text": f"Once upon a time {n}."} for n in range(20)])
    given = {name: files[name] for name in SFT_FILES} | {"demonstrations": (chats, texts)}
    cfg = sft.Config(**given, demonstrations_weights=(3.0, 1.0))
    batches = task_of(cfg, tmp_path / "task").demonstrations().batches(4, 0)
    said = "".join(capsys.readouterr())
    assert "in the format messages" in said and "in the format text" in said
    learned = []
    for _ in range(30):
        batch = next(batches)
        for row in range(4):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                inside = batch.segment_ids[row] == segment
                learned.append(bool(batch.mask[row][inside][0]))  # plain text: all but the BOS
    np.testing.assert_allclose(np.mean(learned), 0.25, atol=0.05)
    losses = train_sft(files | {"demonstrations": (chats, texts)}, tmp_path / "run", steps=2)
    assert losses[0] == 2


def test_a_stream_counts_bad_rows_as_it_meets_them(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "STREAM_HEAD", 20)
    with open(files["demonstrations"], "a") as file:
        file.write("\n".join(BAD_ROWS) + "\n")
    train_sft(files, tmp_path / "run", on_bad_row="skip", streaming=True, steps=20)
    entries = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in entries] == list(zip(range(61, 65), REASONS, strict=True))
    assert "empty answer: 1 rows left out (lines 63)" in "".join(capsys.readouterr())
    # Met in the middle of the run, it stops there.
    monkeypatch.chdir(tmp_path)
    flags = flags_of(files, run_dir=tmp_path / "stopped", steps=20, batch_size=4)
    shown = exits(monkeypatch, capsys, sft.main, sft.Config, [*flags, "--streaming"])
    assert f"{files['demonstrations']}:61: not JSON" in shown.splitlines()[-1]


def test_a_stream_of_a_folder_holds_out_the_same_rows_whatever_the_order_of_its_files(files, tmp_path):
    """And what other hosts have left out of their shares is counted at the end."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(4):
        rows = [{"prompt": f"is it {n}?", "completion": f"yes {n}"} for n in range(10 * part, 10 * part + 10)]
        lines(folder / f"{part}.jsonl", [*rows, {"prompt": "p", "completion": " "}])
    cfg = sft.Config(**{**{name: files[name] for name in SFT_FILES}, "demonstrations": str(folder)}, streaming=True,
                     on_bad_row="skip", run_dir=str(tmp_path / "task"))  # fmt: skip
    with Run(tmp_path / "task", cfg, name="task") as run:
        task = open_task(cfg, run)
        data, tokenizer = task.demonstrations(), task.base.tokenizer

        def texts(tokens):
            return {tokenizer.decode(row[segments == s]).split("is it ")[1].split("?")[0]
                    for row, segments in zip(tokens.inputs, tokens.segment_ids, strict=True)
                    for s in range(1, segments.max() + 1)}  # fmt: skip

        heldout, seen, batches = texts(data.validation), set(), data.batches(2, 0)
        for _ in range(40):
            seen |= texts(next(batches))
        assert len(heldout) == 4 and seen == {str(n) for n in range(40)} - heldout
        other = Rejects("skip")
        other.reject(Place(str(folder / "0.jsonl"), 4), "too long", {})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "gather", lambda told: [told, other.told()])
            task.finish()
    assert task._rejects.counts() == {"empty answer": 4, "too long": 1}


def test_rankings_and_prompts_of_their_own(files, tmp_path):
    prompts = lines(tmp_path / "prompts.jsonl", [{"question": f"why {n}?"} for n in range(30)])
    cfg = ppo.Config(
        **{name: files[name] for name in ("model", "max_length", "max_new_tokens")}, prompts=prompts,
        prompts_columns=("prompt=question",), reward="unread.py:length",
    )  # fmt: skip
    task = task_of(cfg, tmp_path / "task")
    sets = task.prompts()
    asked = task.base.read_prompts(sets.train) + task.base.read_prompts(sets.heldout)
    assert len(asked) == 30 and all("why" in prompt for prompt in asked)
    for row, number in enumerate(sets.train.row):
        assert sets.rows[number].prompt in asked[row] and sets.rows[number].columns["question"].startswith("why")
    files = {name: files[name] for name in ("model", "comparisons", "max_length", "max_new_tokens")}
    cfg = reward_model.Config(**files, run_dir=str(tmp_path / "run"), epochs=1, prompts_per_step=8)
    comparisons = task_of(cfg, tmp_path / "other").comparisons(unasked)
    assert len(comparisons.train) == 36 and comparisons.heldout.mask.shape == (4, 2)
    assert max(len(ranking.ranks) for ranking in comparisons.train) == 3
    # Every answer of a packed batch is one of the rankings asked for, wherever it was laid.
    some = [comparisons.train[3], comparisons.train[5]]
    packed = comparisons.lay(some)
    for p, ranking in enumerate(some):
        for k, response in enumerate(ranking.responses):
            assert packed.tokens.targets[packed.owner == p * 3 + k].tolist() == response.tolist()
    metrics = reward_model.main(cfg)
    assert 0 <= metrics["reward_model_val_accuracy"] <= 1


def unasked(prompts, number):
    """Files have answers of their own."""


def soft_task(files, folder, rows, **changes):
    comparisons = lines(folder.with_suffix(".jsonl"), rows)
    given = {name: files[name] for name in ("model", "max_length", "max_new_tokens")}
    return task_of(reward_model.Config(**given, comparisons=comparisons, **changes), folder)


def test_probabilities_reach_the_batch_and_are_clamped(files, tmp_path, capsys):
    rows = [{"prompt": f"is it {n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(30)]
    given = [0.9, 0.1, 0.55, None, 1.0, 0.5]
    soft = [row | ({} if p is None else {"probability": p}) for row, p in zip(rows, given * 5, strict=True)]
    task = soft_task(files, tmp_path / "soft", soft)
    expected = {0: 0.1, 1: 0.1, 2: 0.45, 3: 0.0, 4: 0.0, 5: 0.5}
    # A label is clamped to 40 to 60%, and a row without a probability keeps its own.
    clamped = expected | {0: 0.4, 1: 0.4, 4: 0.4}
    for some, doubts in (
        (task, expected),
        (soft_task(files, tmp_path / "clamped", soft, comparisons_clamp=0.6), clamped),
    ):
        comparisons = some.comparisons(unasked)
        sides = some.base.tokenizer
        for ranking in comparisons.train:
            number = int(sides.decode(ranking.prompt).split("is it ")[1].split("?")[0])
            best = sides.decode(ranking.responses[ranking.ranks.index(0)])
            assert ("no" in best) == (number % 6 == 1)  # turned round
            np.testing.assert_allclose(ranking.doubt, doubts[number % 6], atol=1e-7)
        packed = comparisons.lay(comparisons.train[:4])
        np.testing.assert_allclose(packed.doubt, [ranking.doubt for ranking in comparisons.train[:4]])
        assert comparisons.heldout.doubt.shape == (3,)
    said = "".join(capsys.readouterr())
    # Files without the column give the arrays that they gave, and no doubt.
    hard = soft_task(files, tmp_path / "hard", rows).comparisons(unasked)
    assert "chosen and rejected change places: the probability of chosen is below one half: 5 rows" in said
    sure = soft_task(files, tmp_path / "sure", [row | {"probability": 1} for row in rows]).comparisons(unasked)
    assert list(hard.train) == list(sure.train) and all(ranking.doubt == 0 for ranking in hard.train)
    with pytest.raises(UserError, match=r"comparisons-clamp 0\.6: no row of .* has a probability"):
        soft_task(files, tmp_path / "none", rows, comparisons_clamp=0.6).comparisons(unasked)
    with pytest.raises(UserError, match="comparisons-clamp is about the files of --comparisons, and there are none"):
        reward_model.Config(comparisons_clamp=0.6).sources()
    for clamp in (0.5, 1.0):
        with pytest.raises(UserError, match="it must be between"):
            reward_model.Config(comparisons_clamp=clamp)


def test_problems_with_a_suffix_and_an_answer_under_another_name(files, tmp_path):
    rows = [{"question": f"why {n}?", "prompt_id": n, "Right": str(n)} for n in range(30)]
    cfg = ppo.Config(
        **{name: files[name] for name in ("model", "max_length", "max_new_tokens")},
        prompts=lines(tmp_path / "problems.jsonl", rows), prompts_columns=("answer=Right",), prompt_suffix="Think.",
        reward="unread.py:length",
    )  # fmt: skip
    sets = (task := task_of(cfg, tmp_path / "task")).prompts()
    for row, asked in zip(sets.train.row, task.base.read_prompts(sets.train), strict=True):
        given = sets.rows[row]
        # A reward gets the prompt as the model reads it, and the answer by the name it asks for.
        assert given.prompt in asked and given.prompt == f"why {given.columns['answer']}?\n\nThink."
        assert given.columns["Right"] == given.columns["answer"]


def test_prompts_without_room_for_an_answer_lose_turns_and_keep_their_place(files, tmp_path, capsys):
    """The others are read as they were encoded; each row still has its own prompt and columns."""
    chat = [{"role": role, "content": "long ago"} for role in ("user", "assistant")]
    rows = [
        {"prompt": [*(chat if n % 3 == 1 else []), {"role": "user", "content": f"why {n}?"}], "number": n}
        for n in range(30)
    ]
    cfg = ppo.Config(
        **{name: files[name] for name in ("model", "max_length")}, max_new_tokens=30,
        prompts=lines(tmp_path / "chats.jsonl", rows), reward="unread.py:length", run_dir=str(tmp_path / "task"),
    )  # fmt: skip
    sets = (task := task_of(cfg, tmp_path / "task")).prompts()
    numbers = set()
    for prompts, given in ((sets.train, sets.rows), (sets.heldout, sets.heldout_rows)):
        for row, asked in zip(prompts.row, task.base.read_prompts(prompts), strict=True):
            assert f"why {given[row].columns['number']}?" in asked and "long ago" not in asked
            numbers.add(given[row].columns["number"])
    assert numbers == set(range(30))
    assert "prompts to answer: prompt shortened by whole turns to fit 34 tokens: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demonstrations_format": "preference"}, "'preference' is no format of demonstrations"),
        ({"demonstrations_columns": "query=prompt"}, "'query=prompt' is not OURS=THEIRS"),
        ({"demonstrations_weights": 0.5}, "2 weights for 1 sources"),
        ({"demonstrations": "no.jsonl"}, "no.jsonl"),
        ({"max_length": 100_000}, "is more than the model's"),
        ({"max_new_tokens": 60}, "leaves no room for prompts"),
    ],
)
def test_a_users_mistake_in_the_data_is_one_line(files, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    flags = flags_of(files, **changes)
    if "demonstrations_weights" in changes:
        flags.insert(flags.index("--demonstrations-weights") + 1, "1.0")
    assert message in exits(monkeypatch, capsys, sft.main, sft.Config, flags)
    assert not (tmp_path / "runs").exists()


def test_each_streamed_source_has_a_tokenizer_of_its_own(files, tmp_path, monkeypatch):
    """A thread reads each, and a call of a tokenizer sets how it reads: two threads would change it for each other."""
    used = []
    encode = streams.encode_rows
    monkeypatch.setattr(streams, "encode_rows", lambda rows, own, *more: used.append(own) or encode(rows, own, *more))
    again = lines(tmp_path / "again.jsonl", [{"prompt": f"who {n}?", "completion": f"he {n}"} for n in range(30)])
    given = {name: files[name] for name in SFT_FILES} | {"demonstrations": (files["demonstrations"], again)}
    task = task_of(sft.Config(**given, streaming=True), tmp_path / "task")
    batches = task.demonstrations().batches(4, 0)
    used.clear()
    next(batches)
    assert len({id(tokenizer) for tokenizer in [*used, task.base.tokenizer]}) == 3
