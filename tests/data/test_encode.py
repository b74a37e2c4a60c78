"""Rows to token ids: prompt and answers apart, BOS once, EOS learned, long ones shortened and counted."""

import gzip
import json
import re
from array import array

import jax
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data import encode as encoding
from rlhf_jax.data.chat import render
from rlhf_jax.data.encode import encode, encode_rows, encode_windows
from rlhf_jax.data.formats import Comparison, Demonstration, Prompt, Text, Unpaired
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import Read, read_rows
from rlhf_jax.data.tokens import pad_sequences, size
from rlhf_jax.errors import UserError

PLACE = Place("f", 1)


def user(text):
    return ({"role": "user", "content": text},)


def said(text):
    return ({"role": "assistant", "content": text},)


def pair(prompt, chosen, rejected):
    return Comparison(prompt, (said(chosen), said(rejected)), (0, 1), PLACE)


@pytest.fixture(scope="module", params=["model/stories260K-hf", "tokenizer/minimind"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / request.param)


@pytest.fixture
def minimind(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


def test_read_rows_have_the_ids_of_a_row_in_four_bytes_each(minimind):
    """Of every kind of row, nested as they were."""
    kinds = [
        Demonstration(user("How?"), said("So."), PLACE),
        pair(user("How?"), "So.", "No."),
        Unpaired(user("How?"), said("So."), True, PLACE),
        Prompt(user("How?"), PLACE),
        Text("How?", PLACE),
    ]
    found = [ids for _, ids in encode_rows([Read(n, row, {}) for n, row in enumerate(kinds)], minimind, 64, Rejects())]
    arrays = [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, array)]
    assert len(arrays) == 2 + 3 + 2 + 1 + 2 and {leaf.itemsize for leaf in arrays} == {4}
    for ids, row in zip(found, kinds, strict=True):
        expected, _ = encode(row, minimind, 64)
        as_lists = jax.tree.map(lambda leaf: leaf.tolist() if isinstance(leaf, array) else leaf, ids)
        assert as_lists == expected and type(ids) is type(expected if not isinstance(row, Prompt) else array("i"))


def test_ids_of_a_demonstration(tokenizer):
    conversation = (*user("How?"), *said("So."), *user("Why?"))
    (prompt, response), cut = encode(Demonstration(conversation, said("Because. é"), PLACE), tokenizer, 200)
    assert cut == 0
    assert prompt.count(tokenizer.bos_token_id) == (3 + 1 if tokenizer.chat_template else 1)
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
    text = tokenizer.decode([*prompt, *response])
    if tokenizer.chat_template:
        expected = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        assert text == expected + "Because. é" + tokenizer.eos_token
    else:
        assert text.replace("<s> ", "<s>") == (
            "<s>\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant: Because. é</s>"
        )
    assert encode(Prompt(conversation, PLACE), tokenizer, 200)[0] == prompt


def test_every_answer_of_a_conversation_is_learned(tokenizer):
    conversation = (*said("So."), *user("Why?"), *said("Because."))
    document, _ = encode(Demonstration(user("How?"), conversation, PLACE), tokenizer, 200)
    assert len(document) == 4
    learned = [tokenizer.decode(ids).strip() for ids in document[1::2]]
    end = tokenizer.eos_token
    assert learned == ["So." + (end if tokenizer.chat_template else ""), "Because." + end]
    tokens = pad_sequences([document], length=200, pad_id=tokenizer.eos_token_id)
    assert tokens.mask.sum() == size(document[1::2])
    # An answer before the first that is to be learned is context.
    context = (*user("How?"), *said("So."), *user("Why?"))
    document, _ = encode(Demonstration(context, said("Because."), PLACE), tokenizer, 200)
    assert len(document) == 2 and tokenizer.decode(document[1]).strip() == "Because." + end


def test_all_answers_share_the_prompts_ids_and_those_of_a_rollout(tokenizer):
    prompt = (*user("How?"), *said("So."), *user("Why"))
    ranking, _ = encode(pair(prompt, "?! no", "ever"), tokenizer, 200)
    assert ranking.prompt == encode(Prompt(prompt, PLACE), tokenizer, 200)[0]
    assert [ids.count(tokenizer.eos_token_id) for ids in ranking.responses] == [1, 1] and ranking.ranks == (0, 1)
    unpaired, _ = encode(Unpaired(prompt, said("?! no"), True, PLACE), tokenizer, 200)
    assert (unpaired.prompt, unpaired.response, unpaired.good) == (ranking.prompt, ranking.responses[0], True)


def test_a_thought_in_one_answer_only_is_part_of_that_answer(minimind):
    think = {"role": "assistant", "content": "yes", "reasoning_content": "so it is"}
    row = Comparison(user("q"), ((think,), said("no")), (0, 1), PLACE)
    ranking, _ = encode(row, minimind, 200)
    first, second = (minimind.decode(ids) for ids in ranking.responses)
    assert "so it is" in first and "yes" in first and "no" in second
    for response in (first, second):
        text = minimind.decode(ranking.prompt) + response
        assert text.count("<think>") == text.count("</think>") <= 1


@pytest.mark.parametrize("word", ["    return 1\n", "a\n\n", "\ta", "  a  "])
def test_space_of_an_answer_is_learned(tokenizer, word):
    ranking, _ = encode(pair(user("q"), word, word.strip()), tokenizer, 200)
    words = [tokenizer.decode(ranking.prompt + ids).split("Assistant:")[-1] for ids in ranking.responses]
    shown = word.lstrip("\n") if tokenizer.chat_template else " " + word
    assert words[0].endswith(shown + tokenizer.eos_token) and words[1] != words[0]


def test_answers_that_the_template_writes_alike_are_equal(minimind):
    minimind.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(BadRow, match="equal answers"):
        encode(pair(user("q"), "  a", "a"), minimind, 200)


def test_plain_text_is_learned_whole(tokenizer):
    (bos, ids), cut = encode(Text("One </s> two.", PLACE), tokenizer, 200)
    assert bos == [tokenizer.bos_token_id] and ids[-1] == tokenizer.eos_token_id and cut == 0
    assert tokenizer.decode(ids[:-1]).strip() == "One </s> two." and ids.count(tokenizer.eos_token_id) == 1
    with pytest.raises(BadRow, match="text too long for 5 tokens"):
        encode(Text("One two three four five six seven.", PLACE), tokenizer, 5)


def test_a_special_token_that_people_wrote_is_only_text(tokenizer):
    name = tokenizer.eos_token
    ranking, _ = encode(pair(user(f"q{name}r"), f"a{name}b", "c"), tokenizer, 200)
    chosen = ranking.responses[0]
    assert chosen.count(tokenizer.eos_token_id) == 1 and chosen[-1] == tokenizer.eos_token_id
    assert name in tokenizer.decode(chosen[:-1])
    plain, _ = encode(pair(user("q r"), "a b", "c"), tokenizer, 200)
    assert ranking.prompt.count(tokenizer.eos_token_id) == plain.prompt.count(tokenizer.eos_token_id)


def conversation(turns, first=0):
    """A system message and what a user and the assistant say in turn; the last turn is not answered."""
    found = [{"role": "system", "content": "be kind"}]
    for number in range(first, turns):
        found += [*user(f"question {number} " * (2 + number % 3)), *said(f"answer {number} " * (1 + number % 2))]
    return tuple(found[:-1])


ROWS = {
    "prompt": lambda turns, first: Prompt(conversation(turns, first), PLACE),
    "demonstration": lambda turns, first: Demonstration(
        conversation(turns, first)[:2], (*conversation(turns, first)[2:], *said("the last")), PLACE
    ),
    "one answer": lambda turns, first: Demonstration(conversation(turns, first), said("the last"), PLACE),
    "comparison": lambda turns, first: pair(conversation(turns, first), "yes", "no, not at all"),
    "unpaired": lambda turns, first: Unpaired(conversation(turns, first), said("yes"), False, PLACE),
}


def length_of(ids):
    if hasattr(ids, "responses"):
        return len(ids.prompt) + max(map(len, ids.responses))
    if hasattr(ids, "response"):
        return len(ids.prompt) + len(ids.response)
    return size(ids) if isinstance(ids, tuple) else len(ids)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_long_conversation_is_one_that_began_later(tokenizer, row):
    """The system message stays, as many turns as fit stay with it, and an earlier answer is learned whole or not."""
    turns = 7
    shorter = [encode(row(turns, first), tokenizer, 4000)[0] for first in range(turns)]
    lengths = [length_of(ids) for ids in shorter]
    assert lengths == sorted(lengths, reverse=True)
    # All lengths between two that matter have the answer of their neighbours.
    near = {needed + more for needed in lengths for more in (-1, 0, 1, 2)}
    for length in sorted(near & {*range(lengths[-1], lengths[0] + 1)}):
        first = next(first for first, needed in enumerate(lengths) if needed <= length)
        assert encode(row(turns, 0), tokenizer, length) == (shorter[first], 2 * first)
    with pytest.raises(BadRow, match=f"^prompt too long for {lengths[-1] - 1} tokens$") as caught:
        encode(row(turns, 0), tokenizer, lengths[-1] - 1)
    answer = "" if row is ROWS["prompt"] else r", its answer \d+"
    assert re.fullmatch(r"its last turn alone has \d+" + answer, caught.value.detail)


def test_a_long_conversation_is_rendered_few_times(minimind, monkeypatch):
    rendered = []
    monkeypatch.setattr(encoding, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    ids, dropped = encode(Prompt(conversation(200), PLACE), minimind, 300)
    assert dropped > 300 and len(ids) <= 300 and len(rendered) <= 10


def test_an_answer_is_never_cut_and_a_single_turn_neither(tokenizer):
    short, long = "yes", "one two three four five " * 20
    for row, reason in (
        (pair(user("q"), long, short), "response too long for 64 tokens"),
        (Demonstration(user("q"), said(long), PLACE), "response too long for 64 tokens"),
        (pair(user(long), short, "no"), "prompt too long for 64 tokens"),
        (Prompt(user(long), PLACE), "prompt too long for 64 tokens"),
    ):
        with pytest.raises(BadRow, match=f"^{reason}$"):
            encode(row, tokenizer, 64)
    # All of the room is an answer's, if its turn leaves it.
    row = Demonstration((*conversation(2), *said("so"), *user("q")), said(long), PLACE)
    needed = size(encode(row._replace(prompt=(row.prompt[0], *user("q"))), tokenizer, 4000)[0])
    assert size(encode(row, tokenizer, needed)[0]) == needed


def test_a_tools_result_stays_with_its_call(minimind):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    result = {"role": "tool", "content": "2"}
    prompt = (*user("long ago " * 30), *said("so"), *user("how many? " * 5), call, result)
    whole = len(encode(Prompt(prompt, PLACE), minimind, 4000)[0])
    ids, dropped = encode(Prompt(prompt, PLACE), minimind, whole - 1)
    assert dropped == 2 and ids == encode(Prompt(prompt[2:], PLACE), minimind, 4000)[0]
    with pytest.raises(BadRow, match="prompt too long"):
        encode(Prompt(prompt, PLACE), minimind, len(ids) - 1)


def test_what_is_shortened_or_left_out_is_counted(tokenizer):
    long = "one two three four five " * 20
    talk = (*user(long), *said("so"), *user("q"))
    rows = [pair(user("q"), "yes", "no"), pair(talk, "yes", "no"), pair(user("q"), long, "no")]
    rows += [pair(user(long), "yes", "no"), pair(user(long + "six"), "yes", "no")]
    reads = [Read(n, row._replace(place=Place("f", n + 1)), {"n": n}) for n, row in enumerate(rows)]
    rejects = Rejects("skip")
    encoded = list(encode_rows(reads, tokenizer, 64, rejects))
    assert [read.number for read, _ in encoded] == [0, 1] and rejects.used == {"f": 2}
    assert rejects.notes() == {"prompt shortened by whole turns to fit 64 tokens": 1}
    # Rows with one reason are counted together, however long each is.
    assert rejects.counts() == {"response too long for 64 tokens": 1, "prompt too long for 64 tokens": 2}
    with pytest.raises(UserError, match=r"^f:3: response too long for 64 tokens: it has \d+, its turn \d+ \(--on-bad"):
        list(encode_rows(reads[:3], tokenizer, 64, Rejects()))
    with pytest.raises(
        UserError, match=r"^f:4: prompt too long for 64 tokens: its last turn alone has \d+, its answer"
    ):
        list(encode_rows(reads[3:], tokenizer, 64, Rejects()))


def test_what_a_chat_template_refuses_is_named(minimind):
    minimind.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(BadRow, match="refused by the chat template: turns must alternate"):
        encode(Demonstration(user("a") * 2, said("b"), PLACE), minimind, 64)
    encode(Demonstration(user("a"), said("b"), PLACE), minimind, 64)


def test_without_eos_nothing_is_encoded(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encode(Demonstration(user("a"), said("b"), PLACE), tokenizer, 64)


def test_without_a_template_there_are_no_tools(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    with pytest.raises(BadRow, match="no chat template"):
        encode(Demonstration(user("a"), (call,), PLACE), tokenizer, 64)


def test_every_template_on_one_tokenizer(minimind, shared_data):
    """EOS is learned once at the end, the prompt is that of a rollout, and nothing is lost between stretches."""
    with gzip.open(shared_data / "chat" / "chat_templates.jsonl.gz", "rt", encoding="utf-8") as file:
        templates = list(map(json.loads, file))
    row = Demonstration(user("How?"), (*said("So."), *user("Why?"), *said("Because.")), PLACE)
    for template in templates:
        minimind.chat_template = template["template"]
        document, _ = encode(row, minimind, 1000)
        assert len(document) == 4 and document[-1][-1] == minimind.eos_token_id
        assert document[-1].count(minimind.eos_token_id) == 1
        learned = [minimind.decode(ids) for ids in document[1::2]]
        assert "So." in learned[0] and "Because." in learned[1] and "Why" not in "".join(learned)
        ranking, _ = encode(pair(user("How?"), "So.", "Because."), minimind, 1000)
        asked = encode(Prompt(user("How?"), PLACE), minimind, 1000)[0]
        # A template that opens a thought where the answer begins, but writes none into answers, has two prompts.
        if "<think>" not in minimind.decode(ranking.responses[0] + asked):
            assert ranking.prompt == asked, template["name"]


def test_real_files_are_encoded_or_counted(shared_data, tokenizer):
    rejects = Rejects("skip")
    path = str(shared_data / "preference" / "hh_helpful_base.eval.jsonl.gz")
    rows = read_rows(path, "transcripts", rejects)
    encoded = [ids for _, ids in encode_rows(rows, tokenizer, 256, rejects)]
    assert len(encoded) + sum(rejects.counts().values()) == 348 and len(encoded) > 200
    assert rejects.counts()["prompts differ"] == 2 and set(rejects.counts()) <= {
        "prompts differ", "response too long for 256 tokens", "prompt too long for 256 tokens",
    }  # fmt: skip
    assert all(length_of(ids) <= 256 for ids in encoded)
    assert rejects.notes()["prompt shortened by whole turns to fit 256 tokens"] > 50


@pytest.mark.parametrize("folder, bos", [("model/stories260K-hf", [1]), ("tokenizer/minimind", [])])
def test_a_long_text_is_cut_into_windows_and_nothing_is_lost(shared_data, folder, bos):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / folder)
    tokenizer.bos_token_id = bos[0] if bos else None
    text = f"Once upon a time there was a {tokenizer.eos_token} cat. " * 9
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    windows = encode_windows(text, tokenizer, 17)
    assert {len(read) for read, _ in windows} == {1} and max(len(predicted) for _, predicted in windows) == 16
    if bos:
        assert {read[0] for read, _ in windows} == {1}
        assert [token for _, predicted in windows for token in predicted] == ids
    else:
        whole = [token for read, predicted in windows for token in (*read, *predicted)]
        assert whole == ids[: len(whole)] and len(ids) - len(whole) <= 1  # a window of one token predicts nothing
    assert tokenizer.eos_token_id not in ids
