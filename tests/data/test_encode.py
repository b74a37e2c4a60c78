"""Rows to token ids: prompt and answers apart, BOS once, EOS learned, prompts shortened from the left and counted."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode, encode_prompt, encode_rows
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
    assert encode_prompt(conversation, tokenizer) == prompt


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
    assert ranking.prompt == encode_prompt(prompt, tokenizer) == encode(Prompt(prompt, PLACE), tokenizer, 200)[0]
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


def test_truncation_takes_the_prompt_from_the_left_and_never_the_response(tokenizer):
    short, long = "yes", "one two three four five " * 20
    whole = encode(pair(user(long), short, "no"), tokenizer, 4000)[0].prompt
    ranking, cut = encode(pair(user(long), short, "no no no"), tokenizer, 64)
    prompt = ranking.prompt
    assert len(prompt) + max(map(len, ranking.responses)) == 64 and cut == len(whole) - len(prompt)
    assert prompt[0] == tokenizer.bos_token_id and prompt[1:] == whole[-len(prompt) + 1 :]
    assert all(response[-1] == tokenizer.eos_token_id for response in ranking.responses)
    with pytest.raises(BadRow, match="response too long for 64 tokens"):
        encode(pair(user("q"), long, short), tokenizer, 64)
    # A response may take three quarters and no more from a long prompt.
    row = Demonstration(user(long), said(long.strip()), PLACE)
    answer = encode(row, tokenizer, 4000)[0][1]
    (given, response), _ = encode(row, tokenizer, len(answer) * 4 // 3 + 2)
    assert response == answer and len(given) + len(response) == len(answer) * 4 // 3 + 2
    with pytest.raises(BadRow, match="response too long"):
        encode(row, tokenizer, len(answer) * 4 // 3 - 2)


def test_a_long_conversation_loses_its_beginning_and_an_answer_that_is_cut_is_not_learned(tokenizer):
    turns = []
    for number in range(6):
        turns += [*user(f"question {number} " * 4), *said(f"answer {number} " * 4)]
    row = Demonstration(tuple(turns[:1]), tuple(turns[1:]), PLACE)
    whole, _ = encode(row, tokenizer, 4000)
    flat = [token for ids in whole for token in ids]
    learned = [part for number, ids in enumerate(whole) for part in [number % 2 == 1] * len(ids)]
    lengths = set()
    for length in range(len(whole[-1]) * 2, len(flat) + 1):
        document, cut = encode(row, tokenizer, length)
        kept = [token for ids in document for token in ids]
        mask = [part for number, ids in enumerate(document) for part in [number % 2 == 1] * len(ids)]
        assert len(kept) + cut == len(flat) and len(kept) <= length and len(document) % 2 == 0
        assert kept[0] == flat[0] and kept[1:] == flat[-len(kept) + 1 :] if cut else kept == flat
        # What is learned is as before, but for the answer through which the cut goes.
        expected = learned[-len(kept) :]
        assert all(now <= before for now, before in zip(mask, expected, strict=True))
        assert mask[-len(whole[-1]) :] == expected[-len(whole[-1]) :]
        whole_answers = sum(len(ids) for ids in document[1::2])
        assert whole_answers in {sum(len(ids) for ids in whole[n::2]) for n in range(1, len(whole), 2)}
        lengths.add(whole_answers)
    assert len(lengths) > 3


def test_what_is_shortened_or_left_out_is_counted(tokenizer):
    long = "one two three four five " * 20
    rows = [pair(user("q"), "yes", "no"), pair(user(long), "yes", "no"), pair(user("q"), long, "no")]
    reads = [Read(n, row._replace(place=Place("f", n + 1)), {"n": n}) for n, row in enumerate(rows)]
    rejects = Rejects("skip")
    encoded = list(encode_rows(reads, tokenizer, 64, rejects))
    assert [read.number for read, _ in encoded] == [0, 1] and rejects.used == {"f": 2}
    assert rejects.notes() == {"prompt shortened to fit 64 tokens": 1}
    assert rejects.counts() == {"response too long for 64 tokens": 1}
    with pytest.raises(UserError, match=r"^f:3: response too long for 64 tokens"):
        list(encode_rows(reads, tokenizer, 64, Rejects()))


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
        asked = encode_prompt(user("How?"), minimind)
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
        "prompts differ", "response too long for 256 tokens",
    }  # fmt: skip
    assert all(len(r.prompt) + max(map(len, r.responses)) <= 256 for r in encoded)
