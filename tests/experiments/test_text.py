"""Real text through the experiments: bad rows stop or are counted, mixtures, streaming, resuming exactly."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments import reward_model, setting, sft
from rlhf_jax import checkpoint
from rlhf_jax.cli import run_main

BAD_ROWS = ["{broken", '{"prompt": "p"}', '{"prompt": "p", "completion": " "}', '{"prompt": "p", "completion": 3}']
REASONS = [
    "not JSON: Expecting property name enclosed in double quotes", "field 'completion' is missing", "empty answer",
    "field 'completion' is int, not text",
]  # fmt: skip


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path, shared_data):
    """Flags of a small run on real text."""
    said = ["yes", "no, never", "perhaps", "so it is"]
    demonstrations = [{"prompt": f"is it {n}?", "completion": f"{said[n % 4]} {n}"} for n in range(60)]
    answers = [[f"good {n}", "bad", f"so so {n}"][: 2 + n % 2] for n in range(40)]
    ranked = [
        {"prompt": f"what of {n}?", "responses": some, "ranks": [0, 2, 1][: len(some)]}
        for n, some in enumerate(answers)
    ]
    return dict(
        model=str(shared_data / "model" / "stories260K-hf"),
        demonstrations=lines(tmp_path / "demonstrations.jsonl", demonstrations),
        comparisons=lines(tmp_path / "comparisons.jsonl", ranked),
        max_length=64,
        max_new_tokens=8,
    )


def train_sft(files, run_dir, **changes):
    cfg = sft.Config(
        **{**files, "steps": 12, "batch_size": 4, "learning_rate": 1e-3, "run_dir": str(run_dir), **changes}
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
    return [part for key, value in {**files, **changes}.items() for part in (f"--{key.replace('_', '-')}", str(value))]


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
    assert [entry["line"] for entry in entries] == [*range(61, 69), 70]
    assert [entry["reason"] for entry in entries] == [*REASONS * 2, "response too long for 64 tokens"]
    shown = "".join(capsys.readouterr())
    name = files["demonstrations"]
    assert f"{name}: demonstrations in the format prompt_completion" in shown
    assert f"{name}: 61 rows used" in shown
    assert f"{name}: empty answer: 2 rows left out (lines 63, 67)" in shown
    assert f"{name}: prompt shortened to fit 64 tokens: 1 rows (lines 69)" in shown
    # The sample: a prompt, and what is learned of it, up to the end of the answer.
    sample = shown.partition("in [[brackets]]:")[2].replace("|", "")
    assert "Human: is it" in sample.partition("[[")[0]
    assert sample.partition("[[")[2].partition("]]")[0].endswith("</s>")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_killed_run_goes_on_to_the_very_same_parameters(files, tmp_path, monkeypatch, streaming):
    flags = dict(streaming=streaming, batch_size=12)
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
    beginning = setting.load_setting(sft.Config(**files, streaming=streaming)).batches(12, 0).get_state()
    inspect = checkpoint.inspect
    monkeypatch.setattr(sft.checkpoint, "inspect", lambda *a, **k: inspect(*a, **k)._replace(data_state=beginning))
    assert again() != straight


def test_the_epoch_whose_parameters_are_damaged_is_trained_again(files, tmp_path, capsys):
    straight = train_sft(files, tmp_path / "run", batch_size=12, save_every=1, keep=12)
    epochs = tmp_path / "run" / "checkpoints" / "sft_epochs"
    steps = sorted(int(path.name) for path in epochs.iterdir())
    assert len(steps) > 2
    (epochs / str(steps[1]) / "manifest.json").unlink()
    written = [json.loads(line)["loss"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    capsys.readouterr()
    assert train_sft(files, tmp_path / "run", batch_size=12, save_every=1, keep=12, resume=True) == straight
    said = capsys.readouterr().out
    assert f"sft_epochs/{steps[1]} is damaged, manifest.json is missing; it is now {steps[1]}.damaged" in said
    assert written == [json.loads(line)["loss"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert sorted(int(path.name) for path in epochs.iterdir() if path.name.isdigit()) == steps


def test_a_mixture_of_conversations_and_plain_text(files, tmp_path):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n}"} for n in range(4)]
    chats = lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    texts = lines(tmp_path / "texts.jsonl", [{"text": f"Once upon a time {n}."} for n in range(20)])
    cfg = sft.Config(**files | {"demonstrations": (chats, texts)}, demonstrations_weights=(3.0, 1.0))
    read = setting.load_setting(cfg)
    assert [note.rsplit(" ", 1)[1] for note in read.notes[:2]] == ["messages", "text"]
    batches = read.batches(4, 0)
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
    from experiments import text

    monkeypatch.setattr(text, "STREAM_HEAD", 20)
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


def test_rankings_and_prompts_of_their_own(files, tmp_path):
    prompts = lines(tmp_path / "prompts.jsonl", [{"question": f"why {n}?"} for n in range(30)])
    cfg = reward_model.Config(
        **files, run_dir=str(tmp_path / "run"), prompts=prompts, prompts_columns=("prompt=question",), epochs=1,
        prompts_per_step=8, sft=sft.SFT(steps=1, batch_size=2),
    )  # fmt: skip
    read = setting.load_setting(cfg)
    asked = read.read(read.prompts) + read.read(read.heldout)
    assert len(asked) == 30 and all("why" in prompt for prompt in asked)
    comparisons = read.compare(None)
    assert comparisons.train.mask.shape == (36, 3) and comparisons.heldout.mask.shape == (4, 2)
    # Every answer of a packed batch is one of the rankings asked for, wherever it was laid.
    packed = comparisons.pack(np.array([3, 5]))
    for p, prompt in enumerate((3, 5)):
        for k in range(3):
            ours = packed.tokens.targets[packed.owner == p * 3 + k]
            row = jax.tree.map(lambda x, at=prompt * 3 + k: np.asarray(x)[at], comparisons.train.responses)
            np.testing.assert_array_equal(ours, row.targets[row.mask])
    metrics = reward_model.main(cfg)
    assert 0 <= metrics["reward_model_val_accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demonstrations_format": "preference"}, "'preference' is no format of demonstrations"),
        ({"demonstrations_columns": "question=prompt"}, "'question=prompt' is not OURS=THEIRS"),
        ({"demonstrations_weights": 0.5}, "2 weights for 1 sources"),
        ({"comparisons": "no.jsonl"}, "no.jsonl: No such file or directory"),
        ({"prompts": "no.jsonl"}, "no.jsonl: No such file or directory"),
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
