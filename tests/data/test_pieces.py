"""The ids that a model is given are those of transformers' `apply_chat_template`, parted."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data import pieces
from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Comparison, Demonstration, Prompt
from rlhf_jax.data.pieces import stretches
from rlhf_jax.data.rejects import BadRow, Place

PLACE = Place("f", 1)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NAMED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
text = st.text(st.sampled_from("ab c\n\tÄ"), min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def templates(shared_data):
    with gzip.open(shared_data / "chat" / "chat_templates.jsonl.gz", "rt", encoding="utf-8") as file:
        return [LLAMA2, NAMED, *(json.loads(line)["template"] for line in file)]


@pytest.fixture(scope="module", params=["model/stories260K-hf", "tokenizer/minimind"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / request.param)


def theirs(tokenizer, turns, **options):
    return tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=True, return_dict=False, **options)


def parted(text, cuts, tokenizer):
    return [i for part in stretches(text, cuts, tokenizer, {}) for i in part]


COUNTED = {"same": 0, "rows": 0}


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(words=st.lists(text, min_size=2, max_size=4), which=st.integers(0, 18), system=st.booleans())
def test_ids_are_those_of_transformers(tokenizer, templates, words, which, system):
    """Exactly, for prompts; for rows with answers, too, but where a token would reach from given into learned text."""
    words = words[: len(words) // 2 * 2]
    turns = tuple({"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words))
    turns = ({"role": "system", "content": "be kind"}, *turns) if system else turns
    tokenizer.chat_template = templates[which]
    try:
        expected = theirs(tokenizer, turns)
        asked = theirs(tokenizer, turns[:-1], add_generation_prompt=True)
        document, _ = encode(Demonstration(turns[: 1 + system], turns[1 + system :], PLACE), tokenizer, 4000)
        prompt, _ = encode(Prompt(turns[:-1], PLACE), tokenizer, 4000)
    except (BadRow, TemplateError):
        return
    assert prompt == asked
    ids = [i for part in document for i in part]
    ids = ids[:-1] if expected[: len(ids)] != ids else ids  # the EOS that no template wrote
    assert tokenizer.decode(expected)[: len(tokenizer.decode(ids))] == tokenizer.decode(ids)
    COUNTED["rows"] += 1
    COUNTED["same"] += expected[: len(ids)] == ids


def test_nearly_all_were_the_same():
    assert COUNTED["rows"] > 60 and COUNTED["same"] > 0.85 * COUNTED["rows"], COUNTED


def test_a_space_that_a_tokenizer_puts_first_stands_there_only(shared_data):
    """SentencePiece-like tokenizers begin a text with a space; an answer after a line break has none."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "One"})
    document, _ = encode(Demonstration(turns[:1], turns[1:], PLACE), tokenizer, 400)
    assert [*document[0], *document[1]][:-1] == theirs(tokenizer, turns)[: len(document[0]) + len(document[1]) - 1]
    assert tokenizer.convert_ids_to_tokens(document[1])[0] == "O"
    other = {**turns[1], "content": "Two"}
    for answer in ("One", " One", "  One"):
        row = Comparison(turns[:1], (({**turns[1], "content": answer},), (other,)), (0, 1), PLACE)
        ranking, _ = encode(row, tokenizer, 400)
        assert tokenizer.decode([*ranking.prompt, *ranking.responses[0]]).endswith("\n" + answer + "</s>")


def greedy():
    """A tokenizer whose merges reach over any boundary: "ab" is one token, and so is "bc"."""
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", "a", "b", "c", "ab", "bc", "abc"])}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("ab", "c")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("|", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("text", "cuts", "expected"),
    [
        ("abc", [3], [["abc"]]),
        ("abc", [1, 3], [["a"], ["bc"]]),  # a token would reach over the cut
        ("abc", [2, 3], [["ab"], ["c"]]),
        ("abcc", [3, 4], [["abc"], ["c"]]),
        ("aabc", [1, 4], [["a"], ["abc"]]),
        ("abcabc", [2, 3, 5, 6], [["ab"], ["c"], ["ab"], ["c"]]),
        ("abc", [0, 3], [[], ["abc"]]),
        ("abc</s>abc", [3, 7, 10], [["abc"], ["</s>"], ["abc"]]),
    ],
)
def test_where_a_token_would_reach_over_a_cut_both_sides_are_apart(text, cuts, expected):
    tokenizer = greedy()
    assert [tokenizer.convert_ids_to_tokens(part) for part in stretches(text, cuts, tokenizer, {})] == expected


words = st.sampled_from(["a", "b ", " c", "\n", "\t", "Ä", "é", "😀", "1.", "<|im_end|>", "</s>", "  "])
anything = st.lists(words, max_size=20).map("".join)


@settings(max_examples=80, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(text=anything, shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_the_quick_way_cuts_as_the_pieces_do(tokenizer, text, shares):
    """By the tokenizer's index of characters, and by the characters of every token: the same stretches."""
    cuts = sorted(round(share * len(text)) for share in shares)
    quick = stretches(text, cuts, tokenizer, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "backend", lambda _: None)
        assert quick == stretches(text, cuts, tokenizer, {})


def test_the_quick_way_is_not_for_tokenizers_with_a_call_of_their_own(tokenizer):
    class Own(type(tokenizer)):
        def __call__(self, *args, **options):
            return super().__call__(*args, **options)

    assert pieces.backend(tokenizer) is not None
    assert pieces.backend(Own(tokenizer_object=tokenizer.backend_tokenizer)) is None
