"""Best of n from the command: the file that it writes, that SFT reads it, and a run that was cut short."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from experiments import best_of_n, sft
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.row_file import take_up

REWARD = "def long(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture(scope="module")
def flags(small_world_for_all, small_policy, tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "reward.py"
    file.write_text(REWARD)
    return {"model": small_policy, "reward": f"{file}:long", "n": 4, "eval_batch_size": 64}


@pytest.fixture(scope="module")
def done(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, best_of_n.main(best_of_n.Config(run_dir=str(folder), **flags))


def lines(folder):
    return [json.loads(line) for line in (folder / "best.jsonl").read_bytes().split(b"\n")[:-1]]


def test_the_best_answers_are_written_and_scored_as_the_reward_has_it(done):
    folder, metrics = done
    rows = lines(folder)
    assert 1 < len(rows) and [row["row"] for row in rows] == sorted({row["row"] for row in rows})
    assert all(row["score"] == len(row["completion"]) for row in rows)
    scores = [metrics[f"best_of_{n}_score"] for n in (1, 2, 4)]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    logged = read_metrics(folder)["best_of_n"]
    assert [row["step"] for row in logged] == [1, 2, 4] and [row["score"] for row in logged] == scores
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["best_of_n_score"] >= row["start_score"] and "start_utility" in row for row in examples)


def test_the_best_answer_stands_beside_a_random_one(done):
    """As comparisons, of the prompts where they are two."""
    pairs = [json.loads(line) for line in (done[0] / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [row for row in lines(done[0]) if row["completion"] != row["blind"]]
    assert 0 < len(pairs) == len(wanted)
    for pair, row in zip(pairs, wanted, strict=True):
        assert pair == {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["blind"],
                        "row": row["row"]}  # fmt: skip
        assert len(pair["chosen"]) >= len(pair["rejected"])  # which is what the reward likes


def test_a_run_that_was_cut_short_goes_on_to_the_same_file(flags, done, tmp_path):
    whole, folder = (done[0] / "best.jsonl").read_bytes(), tmp_path / "run"
    shutil.copytree(done[0], folder)
    (folder / "summary.json").unlink()
    (folder / "best.jsonl").write_bytes(whole[: len(whole) * 60 // 100])  # in the middle of a line
    best_of_n.main(best_of_n.Config(run_dir=str(folder), resume=True, **flags))
    assert (folder / "best.jsonl").read_bytes() == whole


def test_a_file_is_taken_up_where_its_last_pool_begins(tmp_path):
    file = tmp_path / "best.jsonl"
    rows = "".join(json.dumps({"row": row}) + "\n" for row in (0, 1, 4, 7, 8, 10))
    odd = json.dumps({"row": 1, "completion": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n"  # ends of lines to some
    for text, first, kept in [
        ("", 0, 0), (rows, 8, 4), (rows[:-3], 8, 4), (rows[:35], 4, 2), (rows[:3], 0, 0), (odd + rows[22:], 8, 3),
    ]:  # fmt: skip
        file.write_text(text, encoding="utf-8")
        assert take_up(file, 4) == first and len(lines(tmp_path)) == kept
    assert take_up(tmp_path / "none", 4) == 0


def test_sft_reads_the_best_answers(done, small_policy, tmp_path):
    metrics = sft.main(
        sft.Config(
            run_dir=str(tmp_path / "run"), model=small_policy, demonstrations=str(done[0] / "best.jsonl"), steps=1,
            max_length=36, max_new_tokens=20, on_bad_row="skip",  # nothing was trained: some say <assistant>
        )
    )  # fmt: skip
    assert np.isfinite(metrics["sft_ended"])


def test_a_watched_scorer_chooses_nothing_and_says_what_the_chosen_ones_are_worth(flags, done, tmp_path):
    file = tmp_path / "short.py"
    file.write_text("def short(prompts, completions, **columns):\n    return [-2.0 * len(c) for c in completions]\n")
    metrics = best_of_n.main(best_of_n.Config(run_dir=str(tmp_path / "run"), watch=f"{file}:short", **flags))
    assert {name: metrics[name] for name in done[1]} == done[1]
    for row in read_metrics(tmp_path / "run")["best_of_n"]:
        assert row["watched"] == row["watch/short"] == metrics[f"best_of_{row['step']}_watch/short"]
    examples = [json.loads(line) for line in open(tmp_path / "run" / "examples.jsonl", encoding="utf-8")]
    for side in ("start", "best_of_n"):
        assert [row[f"{side}_watch/short"] for row in examples] == [-2.0 * len(row[side]) for row in examples]
    figures = [(run / "report.html").read_text(encoding="utf-8").count("<svg") for run in (tmp_path / "run", done[0])]
    assert figures == [4, 3]


def test_two_watched_scorers_of_one_name_are_refused(flags, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_text(REWARD)
    watch = tuple(f"{tmp_path / name / 'x.py'}:long" for name in ("a", "b"))
    with pytest.raises(UserError, match="--watch: two scorers are called 'long'"):
        best_of_n.main(best_of_n.Config(run_dir=str(tmp_path / "run"), watch=watch, **flags))


def test_one_answer_is_nothing_to_choose_from(flags):
    with pytest.raises(UserError, match="n is 1"):
        replace(best_of_n.Config(**flags), n=1)
