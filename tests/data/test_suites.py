"""The published files that evaluation reads."""

import gzip
import json

import pytest

from rlhf_jax.data import suites
from rlhf_jax.errors import UserError


def test_pandalm_and_llmbar_in_their_published_form(shared_data):
    llmbar = suites.read_preferences(str(shared_data / "preference" / "llmbar.jsonl.gz"), None)
    assert len(llmbar.pairs) == 419 and len(set(llmbar.subsets)) == 5 and llmbar.subsets.count("Natural") == 100
    path = str(shared_data / "preference" / "pandalm_testset.jsonl.gz")
    pandalm = suites.read_preferences(path, None)
    # 422 and 472 majorities for either side; 105 ties, or three of three minds.
    assert len(pandalm.pairs) == 894 and any("105 rows" in note for note in pandalm.notes)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides = []
    for pair in pandalm.pairs:
        row = rows[pair.place.line - 1]
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        sides.append(max((1, 2), key=votes.count))
        assert pair.responses[0][0]["content"] == str(row[f"response{sides[-1]}"])
        assert pair.responses[1][0]["content"] == str(row[f"response{3 - sides[-1]}"])
        assert row["instruction"].strip() in pair.prompt[0]["content"]
        assert row["input"].strip() in pair.prompt[0]["content"]
    assert (sides.count(1), sides.count(2)) == (422, 472)
    with gzip.open(shared_data / "preference" / "llmbar.jsonl.gz", "rt", encoding="utf-8") as file:
        for pair, row in zip(llmbar.pairs, map(json.loads, file), strict=True):
            assert tuple(answer[0]["content"] for answer in pair.responses) == (
                row[f"output_{row['label']}"],
                row[f"output_{3 - row['label']}"],
            )


def test_columns_that_mean_something_are_used_refused_or_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "system": "be kind"}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1: column 'system' cannot be used in this format"):
        suites.read_prompts(str(path), None)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "be kind", "subset": "x", "id": 3}
    path.write_text(json.dumps(pair) + "\n")
    found = suites.read_preferences(str(path), None)
    assert found.pairs[0].prompt[0] == {"role": "system", "content": "be kind"}
    assert found.notes[1:] == [f"{path}: columns not read: id: 1 rows (lines 1)"]


def test_other_files_are_read_whole(shared_data):
    hh = suites.read_preferences(str(shared_data / "preference" / "hh_helpful_base.eval.jsonl.gz"), None)
    assert len(hh.pairs) == 346 and set(hh.subsets) == {"helpful-base"}
    assert len(suites.read_preferences(str(shared_data / "preference" / "raschka_dpo_1100.jsonl.gz"), 9).pairs) == 9
    assert len(suites.read_math_problems(str(shared_data / "math" / "gsm8k.test.jsonl.gz"), None)) == 1319
    assert len(suites.read_instructions(str(shared_data / "ifeval" / "ifeval_prompts.jsonl.gz"), None)) == 541
    assert len(suites.read_prompts(str(shared_data / "sft" / "alpaca_8k.jsonl.gz"), 5)) == 5
