"""What becomes of the rows of a checkpoint's files, made from the tables that the code reads them by.

    python tests/models/checkpoint_rows.py > experiments/results/checkpoint_rows.md
Seconds on a CPU. `test_config_rows.py` holds the page to this, and the tests that it names to be there.
"""

import re
from pathlib import Path

from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.peft import READ as ADAPTER_READ
from rlhf_jax.models.rows import NOT_FOLLOWED, PASSED_OVER, QUANTIZED, READ, REFUSED
from rlhf_jax.models.tokenizer import SETTINGS, VOCABULARIES

TESTS = Path(__file__).resolve().parents[1]
LINES = list[tuple[str, ...]]
ROWS, STORED, PRETRAINED, PEFT = (
    f"{file}.py::" for file in ("models/test_config_rows", "models/test_stored", "test_pretrained", "models/test_peft")
)

ALL = {
    "model_type": ("the family", ROWS + "test_what_cannot_be_read_is_one_line_with_the_row"),
    "architectures": ("policy or reward model", STORED + "test_reward_models_whose_files_say_other"),
    "id2label": ("a reward model has one label", STORED + "test_reward_models_whose_files_say_other"),
    "num_labels": ("where there is no id2label", STORED + "test_reward_models_whose_files_say_other"),
    "reward_bias": ("ours: added to each reward", "models/test_hf.py::test_reward_models_that_have_no_place"),
    "eos_token_id": ("ends answers, after generation_config.json", PRETRAINED + "test_without_a_generation_config"),
    "bos_token_id": (
        "must be in the vocabulary, or −1; the tokenizer's is used",
        PRETRAINED + "test_ids_in_the_configs_that_the_model_lacks",
    ),
    "pad_token_id": (
        "must be in the vocabulary, or −1; the tokenizer's is used",
        PRETRAINED + "test_a_padding_id_of_minus_one_is_none",
    ),
    "auto_map": ("said; its code is not run", PRETRAINED + "test_a_models_own_code_is_never_run_and_that_is_said"),
}
"""The rows of READ: what they are read for, and the test."""

TOKENIZER: LINES = [
    (", ".join(VOCABULARIES), "the first that is there must be readable by transformers; none is an error",
     PRETRAINED + "test_what_cannot_be_read_is_one_line"),
    (", ".join(SETTINGS), "read by transformers where they are there; no JSON is an error",
     PRETRAINED + "test_what_cannot_be_read_is_one_line"),
    ("number of tokens", "more than the model's vocabulary is an error",
     PRETRAINED + "test_a_tokenizer_with_more_tokens_than_the_model"),
    ("special tokens for images and the like beyond the table", "left out, and said",
     PRETRAINED + "test_a_token_for_images_that_the_model_lacks_is_left_out"),
    ("`eos_token`", "read; none is an error", PRETRAINED + "test_what_cannot_be_read_is_one_line"),
    ("`auto_map` with AutoTokenizer", "refused: its code is never run, and nobody is asked",
     PRETRAINED + "test_a_tokenizers_own_code_is_never_run"),
    ("`auto_map` of other classes", "passed over: nothing here asks for them",
     PRETRAINED + "test_a_models_own_code_is_never_run_and_that_is_said"),
    ("`padding_side`, `truncation_side`, `model_max_length`, `processor_class`",
     "passed over: rows are padded, cut and measured here",
     PRETRAINED + "test_rows_of_a_tokenizer_that_change_no_ids"),
]  # fmt: skip

TEMPLATE: LINES = [
    ("`chat_template`, `chat_template.jinja`", "read, in a sandbox; the file before the row, as transformers",
     "data/test_chat.py::test_cases_are_rendered_as_recorded"),
    ("none", "plain text: Human, Assistant", "sampling/test_sampler.py::test_answers_in_text"),
    ("named ones with a default", "the default; `tool_use` where a row has tools",
     PRETRAINED + "test_the_default_of_named_templates_is_read"),
    ("named ones without a default", "refused", PRETRAINED + "test_what_cannot_be_read_is_one_line"),
    ("a template that fails", "a bad row, with the template's words",
     "data/test_chat.py::test_a_template_that_fails_in_any_way_is_a_bad_row"),
]  # fmt: skip


def names(rows: list[str]) -> str:
    return ", ".join(f"`{row}`" for row in rows)


def table(head: tuple[str, ...], lines: LINES) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def by_reason(reasons: dict[str, str]) -> LINES:
    return [(why, names([row for row in reasons if reasons[row] == why])) for why in dict.fromkeys(reasons.values())]


def of_families() -> LINES:
    rows = sorted(set().union(*(family.rows for family in FAMILIES.values())))
    lines = []
    for row in rows:
        readers = [name for name, family in FAMILIES.items() if row in family.rows]
        lines.append((f"`{row}`", "all" if len(readers) == len(FAMILIES) else ", ".join(readers)))
    return lines


def page() -> str:
    usual = {name: [value for value in rule.usual if value not in (None, False, 0, "", [], {})]
             for name, rule in REFUSED.items()}  # fmt: skip
    refused = [
        (f"`{name}`", ", ".join(map(str, usual[name])) or "–", rule.why) for name, rule in sorted(REFUSED.items())
    ]
    read = [(f"`{row}`", *ALL[row]) for row in sorted(READ)]
    return f"""# What becomes of the rows of a checkpoint's files

    python tests/models/checkpoint_rows.py > experiments/results/checkpoint_rows.md

A row is read, refused by its name, or passed over because it changes no number here. A row that nobody here knows is
counted, and said when the model is loaded ({PRETRAINED}test_rows_that_nobody_knows_are_counted_and_said).

## config.json: read by a family's table

A row is looked at by the families named, and by no other ({ROWS}test_a_familys_table_names_the_rows_that_it_looks_at);
left out, it is what it is in transformers
(models/test_families.py::test_what_a_config_leaves_out_is_what_it_is_in_transformers_or_an_error).

{table(("row", "families"), of_families())}

## config.json: read whatever the family is

{table(("row", "for", "test"), read)}

## config.json: quantised

{names(list(QUANTIZED))}: "quantised by …: not supported", before any tensor
({ROWS}test_quantised_checkpoints_are_refused_by_the_methods_name, test_quantised_checkpoints_of_older_forms). So are
quantize_config.json, quant_config.json, hf_quant_config.json, a folder of .gguf files, and tensors of such types
({ROWS}test_quantised_checkpoints_whose_config_is_beside,
{STORED}test_tensors_that_are_more_or_other_than_config_json_says).

## config.json: refused

Unless the family's table reads the row. null, false, 0 and what is empty say nothing
({ROWS}test_rows_that_change_the_arithmetic_are_refused_by_name,
{ROWS}test_rows_that_say_what_is_so_anyway_are_not_refused).

{table(("row", "says nothing at", "why"), refused)}

## config.json: passed over

Every row of the supported models, as published and as transformers writes them, is in one of these lists
({ROWS}test_every_row_of_the_supported_models_is_known_and_none_of_them_is_refused,
{ROWS}test_what_transformers_takes_out_of_config_json_for_sampling_is_known).

{table(("because", "rows"), by_reason(PASSED_OVER))}

## generation_config.json

{table(("row", "what becomes of it", "test"), [
    ("`eos_token_id`", "each of its ids ends an answer; so does the tokenizer's EOS",
     PRETRAINED + "test_the_tokens_that_end_an_answer"),
    ("`bos_token_id`, `pad_token_id`", "must be in the vocabulary, or −1",
     PRETRAINED + "test_ids_in_the_configs_that_the_model_lacks"),
    (names(list(NOT_FOLLOWED)), "not followed, and said",
     PRETRAINED + "test_rows_that_nobody_knows_are_counted_and_said"),
    ("all others", "passed over: flags rule sampling", PRETRAINED + "test_sampling_rows_change_nothing"),
])}

## Tensors

{table(("what lies in the folder", "what becomes of it", "test"), [
    ("a head beside a tied embedding", "the head if it is another, as transformers has it",
     STORED + "test_a_head_that_is_not_the_embedding_is_the_head_whatever_config_json_says"),
    ("a language head in a classifier", "passed over, as transformers has it",
     STORED + "test_a_classifier_does_without_a_language_head_as_in_transformers"),
    ("buffers of older versions", "passed over, as transformers has it",
     "models/test_hf.py::test_buffers_and_copies_of_a_tied_embedding_are_passed_over"),
    ("anything more, other, twice or missing", "an error",
     STORED + "test_tensors_that_are_more_or_other_than_config_json_says"),
    ("an adapter beside the model, or alone", "an error", STORED + "test_adapters_beside_a_model_or_alone"),
])}

## The tokenizer's files

{table(("file or row", "what becomes of it", "test"), TOKENIZER)}

## The chat template

{table(("template", "what becomes of it", "test"), TEMPLATE)}

## adapter_config.json

Read, or known to change nothing: {names(sorted(ADAPTER_READ))}. Any other that is set is refused
({PEFT}test_more_than_lora_is_refused); tensors that the card leaves out are refused
({PEFT}test_modules_that_the_card_leaves_out_are_not_adapted_as_in_peft,
{PEFT}test_a_rank_that_the_card_does_not_say).
"""  # fmt: skip


def missing_tests(text: str) -> list[str]:
    """The tests that a page names and that are not there."""
    missing = []
    for file, test in re.findall(r"([\w/]+\.py)::(test_\w+)", text):
        path = TESTS / file
        if not path.exists() or f"def {test}(" not in path.read_text(encoding="utf-8"):
            missing.append(f"{file}::{test}")
    return missing


if __name__ == "__main__":
    print(page(), end="")
