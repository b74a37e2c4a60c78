"""Files of rows: where one is taken up, what that costs, and files that people have written."""

import json
import tracemalloc

import pytest

from rlhf_jax.row_file import read_rows, take_up

ROWS = "".join(json.dumps({"row": row}) + "\n" for row in (0, 1, 4, 7, 8, 10))


@pytest.mark.parametrize(
    ("text", "first", "kept"),
    [
        (ROWS + "\n", 8, [0, 1, 4, 7]),
        (ROWS + "\n \r\n", 8, [0, 1, 4, 7]),
        (ROWS + " ", 8, [0, 1, 4, 7]),
        (ROWS + '{"row": 1', 8, [0, 1, 4, 7]),
        (ROWS + '{"row": 99}', 8, [0, 1, 4, 7]),  # whole as it looks, it may be more of a row
        ("\n" + ROWS.replace("\n", "\n\n"), 8, [0, 1, 4, 7]),
        ("\ufeff" + ROWS, 8, [0, 1, 4, 7]),
        ("\n\n", 0, []),
        ('{"row": 0}\n{"row": 3}\n', 0, []),
    ],
)
def test_blank_and_torn_lines_do_not_move_the_place_where_a_file_is_taken_up(tmp_path, text, first, kept):
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8", newline="\n")
    assert take_up(file, 4) == first
    assert [row["row"] for row in read_rows(file)] == kept
    whole = file.read_bytes()
    assert text.encode().startswith(whole) and whole[-1:] in (b"", b"\n")


def test_a_file_is_taken_up_in_the_memory_of_a_few_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"row": row, "text": "x" * 1000}) + "\n" for row in range(3000))
    tracemalloc.start()
    try:
        assert take_up(file, 1000) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.3e6  # of a file of 3 MB
    assert [row["row"] for row in read_rows(file)] == list(range(2000))


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n \r\n"])
def test_rows_that_people_have_written_may_have_a_mark_at_the_start_and_blank_lines(tmp_path, start, end):
    file = tmp_path / "rows.jsonl"
    text = start + '\n{"text": "a\u2028b\\ufeff"}\n\n \n{"text": "ä"}' + end
    file.write_text(text, encoding="utf-8", newline="")
    assert list(read_rows(file)) == [{"text": "a\u2028b\ufeff"}, {"text": "ä"}]
