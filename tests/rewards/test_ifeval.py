"""IFEval: each check by hand, and on every published prompt with answers made to fit."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.rewards.ifeval import CHECKS, capital_words, check, count_sentences, follow, variants

# What follows an instruction, and what does not.
BY_HAND = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        ["AND/OR yes A-B no C", "IT'S OK"],
        ["AND OR", "And Or Not"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS A SIMPLE ENGLISH SENTENCE."],
        ["This is a simple english sentence.", "DIES IST EIN GANZ EINFACHER DEUTSCHER SATZ ÜBER NICHTS."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is a simple english sentence."],
        ["This is a simple english sentence.", "dies ist ein ganz einfacher deutscher satz über nichts."],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Say hi. "}, ["say HI. Hi!", "\nSay hi."], ["Hi! Say hi."]),
    (
        "combination:two_responses",
        {},
        ["a ****** b", "******a******b******"],
        ["a ****** a", "a", "a****** ******b", "a******b******c"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] and [b c]", "[][]"],
        ["[a\nb] [c]", "[a"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["So.\nP.S. x", "p. s. x"], ["PS x", "P.P.S x"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S", "p. p. s. x"], ["P.S. x"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B. "}, ["n.b. x"], ["nobody"]),
    (
        "detectable_format:constrained_response",
        {},
        ["Well: My answer is maybe. So."],
        ["My answer is maybe", "my answer is yes."],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', "```json\n[]\n```", "```\n3\n```", " true "],
        ["{'a': 1}", "```json\n{}```x", "a"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1 a Section 2 b", "Section1\nSection\n2\nSection 3"],
        ["Section 1", "SECTION 1 SECTION 2", "Section A Section B"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "x\n\n* a\n\n- b", "*a*\n- b"],
        ["* a", "** a\n** b", "* a\n* b\n* c", "x - a\ny - b"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** *b*"],
        ["*a*", "*a\nb* *c*", "** ** *a*"],
    ),
    ("detectable_format:title", {}, ["<<a poem>>\nx", "<< <b> >>"], ["<a>", "<<\na>>", "<< >>", "<<>>"]),
    ("keywords:existence", {"keywords": ["Cat", "dog "]}, ["A CATALOGUE of dogs"], ["a cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["A catalogue"], ["The Cat!", "cat"]),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, ["cat Catalogue"], ["cat"]),
    ("keywords:frequency", {"keyword": "c.t", "frequency": 1, "relation": "less than"}, ["cat"], ["c.t"]),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "less than"},
        ["q", "a"],
        ["qQ"],
    ),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, ["# a #"], ["#"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Dies ist ein ganz einfacher deutscher Satz über nichts.", "1 2 3"],
        ["This is a simple English sentence."],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["a\n\nweekend b", "a\n\n\"WEEKEND's", "a\n\nweekend.x\n\n "],
        ["weekend\n\na", "a\n\nweekends", "a\n\nweekend\n\nb", "a\n\n\n\nweekend", "weekend"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na***b***"],
        ["a", "a\n\nb", "a****** b", "a***b***c"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two", "Really?! Yes."],
        ["One, two.", "Mr. Smith is at 3.5 now."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["two words", "it's"],
        ["a b c", "a-b's"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "1,000"]),
    (
        "startend:end_checker",
        {"end_phrase": " Bye now. "},
        ["So. bye NOW.", '"Bye now."\n'],
        ["Bye now. Yes.", "Bye now"],
    ),
    ("startend:quotation", {}, ['"a"', ' "" \n'], ['"', '"a" b', "“a”", "'a'"]),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), BY_HAND)
def test_checks_by_hand(name, arguments, good, bad):
    for response in good:
        assert check(name, arguments, response), response
    for response in [*bad, "", " \n"]:
        assert not check(name, arguments, response), response


def test_all_25_instructions_are_known_and_tested():
    assert len(CHECKS) == 25 == len({name for name, *_ in BY_HAND})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no stop", 1),
        ("One. Two! Three? Four", 4),
        ("What?! No...", 2),
        ("Wait... what", 1),
        ("Wait... What", 2),
        ("Dr. No met Mr. J. K. Smith at 10.30 a.m. on Jan. 3.", 1),
        ("In the U.S. alone. Yes.", 2),
        ("No. 5 lives.", 2),
        ("It was I. Then not.", 2),
        ("1. First\n2. Second", 3),
        ('He said "Go." Then he went.', 2),
        ("one line\nand another", 1),
        ("So.\n\nP.S. Not so.", 3),
        ("(What?) he said.", 2),
        ('So. "', 1),
        ("at 5. the", 1),
        ("a.b.c and d.e", 1),
        ("See e.g. this.", 1),
        ("x = a. y = b.", 2),
        ('{"a": "One.", "b": "Two."}', 2),
    ],
)
def test_sentences_by_hand(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("I AM", 2),
        ("I'm", 1),
        ("DON'T", 2),
        ("don't CANNOT", 2),
        ("A,B 1,000", 2),
        ("X--Y...Z", 3),
        ("A.B AND/OR ALL-STAR", 3),
        ("**BOLD** (NEWS)", 2),
        ("DON’T", 2),
        ("Ab 12 ÄÖ", 1),
        ("WE'LL THEY'RE'", 4),
    ],
)
def test_capital_words_by_hand(text, count):
    assert capital_words(text) == count


def test_the_eight_variants():
    assert set(variants("Sure!\n*a*\nb\nBye")) == {
        "Sure!\n*a*\nb\nBye",
        "*a*\nb\nBye",
        "Sure!\n*a*\nb",
        "*a*\nb",
        "Sure!\na\nb\nBye",
        "a\nb\nBye",
        "Sure!\na\nb",
        "a\nb",
    }
    assert len(variants("")) == 8
    quoted = follow(["startend:quotation", "punctuation:no_comma"], [{}, {}], 'Sure, here:\n*"x"*\nBye')
    assert quoted.strict == (False, False) and quoted.loose == (True, True)


def test_none_stands_for_no_argument_and_mistakes_are_named():
    every = {"num_bullets": None, "keywords": None, "num_words": 2, "relation": "at least"}
    assert follow(["length_constraints:number_words"], [every], "a b").strict == (True,)
    for name, arguments, message in [
        ("startend:quote", {}, "'startend:quote' is no instruction"),
        ("keywords:existence", {}, "keywords:existence cannot be checked with"),
        ("keywords:existence", {"keyword": ["a"]}, "keywords:existence cannot be checked with"),
        ("keywords:existence", {"keywords": 3}, "keywords:existence cannot be checked with"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "more"}, "relation 'more'"),
    ]:
        for response in ("a b", ""):
            with pytest.raises(ValueError, match=message):
                check(name, arguments, response)
    with pytest.raises(ValueError, match="2 instructions"):
        follow(["startend:quotation"] * 2, [{}], "a")


TEXT = st.text(st.sampled_from("aB1é*\"'`.?!,-[]{}<>#\n Pp s") | st.characters(), max_size=80)


@settings(deadline=None, max_examples=300)
@given(TEXT, st.sampled_from(BY_HAND), TEXT)
def test_any_text_is_judged_and_strict_implies_loose(response, case, word):
    name, arguments, *_ = case
    arguments = {
        key: word if isinstance(value, str) and "relation" not in key else value for key, value in arguments.items()
    }
    verdict = follow([name], [arguments], response)
    assert verdict.loose[0] or not verdict.strict[0]
    assert verdict.strict == follow([name], [arguments], response).strict
    assert response.strip() or not verdict.strict[0]


GERMAN = "Das ist ein Satz, der auf Deutsch geschrieben wurde und nicht auf Englisch."
IN = {
    "ar": "هذه جملة بسيطة مكتوبة باللغة العربية",
    "bg": "Това е просто изречение, написано на български език.",
    "bn": "এটি বাংলা ভাষায় লেখা একটি সহজ বাক্য",
    "de": GERMAN,
    "fa": "این یک جمله ساده است که به زبان فارسی نوشته شده است",
    "fi": "Tämä on yksinkertainen lause, joka on kirjoitettu suomeksi.",
    "gu": "આ ગુજરાતી ભાષામાં લખાયેલું સરળ વાક્ય છે",
    "hi": "यह हिंदी भाषा में लिखा गया एक सरल वाक्य है",
    "it": "Questa è una frase semplice scritta nella lingua italiana.",
    "kn": "ಇದು ಕನ್ನಡ ಭಾಷೆಯಲ್ಲಿ ಬರೆದ ಸರಳ ವಾಕ್ಯ",
    "ko": "이것은 한국어로 쓴 간단한 문장입니다",
    "mr": "हे मराठी भाषेत लिहिलेले एक साधे वाक्य आहे",
    "ne": "यो नेपाली भाषामा लेखिएको सरल वाक्य हो",
    "pa": "ਇਹ ਪੰਜਾਬੀ ਭਾਸ਼ਾ ਵਿੱਚ ਲਿਖਿਆ ਇੱਕ ਸਰਲ ਵਾਕ ਹੈ",
    "pt": "Esta é uma frase simples que não foi escrita em inglês.",
    "ru": "Это простое предложение, написанное на русском языке.",
    "sw": "Hii ni sentensi rahisi iliyoandikwa kwa Kiswahili.",
    "ta": "இது தமிழ் மொழியில் எழுதப்பட்ட எளிய வாக்கியம்",
    "te": "ఇది తెలుగు భాషలో రాసిన సరళమైన వాక్యం",
    "th": "นี่คือประโยคง่ายๆ ที่เขียนเป็นภาษาไทย",
    "ur": "یہ اردو زبان میں لکھا گیا ایک سادہ جملہ ہے",
    "vi": "Đây là một câu đơn giản được viết bằng tiếng Việt.",
}
ENGLISH = "this is a simple sentence that was written in the english language"


def enough(relation, bound, piece, between=" "):
    """(a text with as many pieces as the relation asks for, one that misses it by one)."""
    good, bad = (bound, bound - 1) if relation == "at least" else (bound - 1, bound)
    return between.join([piece] * good) or ".", between.join([piece] * bad)


MADE = {
    "change_case:capital_word_frequency": lambda capital_frequency, capital_relation: enough(
        capital_relation, capital_frequency, "AB"
    ),
    "change_case:english_capital": lambda: (ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": lambda: (ENGLISH, ENGLISH.capitalize()),
    "combination:repeat_prompt": lambda prompt_to_repeat: (prompt_to_repeat + "\nSo.", "So.\n" + prompt_to_repeat),
    "combination:two_responses": lambda: ("a\n******\nb", "a\n******\na"),
    "detectable_content:number_placeholders": lambda num_placeholders: enough("at least", num_placeholders, "[a]"),
    "detectable_content:postscript": lambda postscript_marker: (f"a\n{postscript_marker} b", "a"),
    "detectable_format:constrained_response": lambda: ("My answer is no.", "No."),
    "detectable_format:json_format": lambda: ('```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:multiple_sections": lambda section_spliter, num_sections: enough(
        "at least", num_sections, f"{section_spliter} 1\na\n"
    ),
    "detectable_format:number_bullet_lists": lambda num_bullets: enough("at least", num_bullets, "* a", "\n"),
    "detectable_format:number_highlighted_sections": lambda num_highlights: enough("at least", num_highlights, "*a*"),
    "detectable_format:title": lambda: ("<<a>>", "a"),
    "keywords:existence": lambda keywords: (" ".join(keywords), " ".join(keywords[1:]) or "."),
    "keywords:forbidden_words": lambda forbidden_words: ("...", f"... {forbidden_words[-1]}!"),
    "keywords:frequency": lambda keyword, frequency, relation: enough(relation, frequency, keyword),
    "keywords:letter_frequency": lambda letter, let_frequency, let_relation: enough(
        let_relation, let_frequency, letter
    ),
    "language:response_language": lambda language: (IN[language], ENGLISH),
    "length_constraints:nth_paragraph_first_word": lambda num_paragraphs, nth_paragraph, first_word: [
        "\n\n".join(word if n == nth_paragraph else "a" for n in range(1, num_paragraphs + 1))
        for word in (f"{first_word.upper()}, b", "b")
    ],
    "length_constraints:number_paragraphs": lambda num_paragraphs: enough("at least", num_paragraphs, "a", "\n***\n"),
    "length_constraints:number_sentences": lambda num_sentences, relation: enough(relation, num_sentences, "Ab cd."),
    "length_constraints:number_words": lambda num_words, relation: enough(relation, num_words, "ab"),
    "punctuation:no_comma": lambda: ("a b", "a, b"),
    "startend:end_checker": lambda end_phrase: (f"a {end_phrase}", f"{end_phrase} a"),
    "startend:quotation": lambda: ('"a"', "a"),
}


def test_every_published_instruction_is_followed_by_what_was_made_to_and_not_by_its_neighbour(shared_data):
    with gzip.open(shared_data / "ifeval" / "ifeval_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    seen = []
    for row in rows:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            good, bad = MADE[name](**arguments)
            assert check(name, arguments, good), (row["key"], name, arguments, good)
            assert not check(name, arguments, bad), (row["key"], name, arguments, bad)
            seen.append(name)
        # The prompt itself, as an answer to itself: nothing but a verdict on each.
        assert len(follow(row["instruction_id_list"], row["kwargs"], row["prompt"]).strict) == len(row["kwargs"])
    assert len(rows) == 541 and len(seen) == 834 and set(seen) == set(CHECKS)
