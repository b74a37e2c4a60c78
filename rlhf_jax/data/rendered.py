"""Text that a chat template has written already: told by the sign with which a turn begins, and not written again."""

import re
from functools import lru_cache
from typing import Any

from rlhf_jax.data.chat import generation_prompt, stop_sign, template_spans
from rlhf_jax.data.conversations import Conversation, message
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase, specials_of

HEADERS = (
    r"<\|im_start\|>\s*\w+", r"<\|start_header_id\|>\s*\w+", r"<\|header_start\|>\s*\w+", r"<start_of_turn>\s*\w+",
    r"<\|turn>\s*\w+", r"<\|START_OF_TURN_TOKEN\|>", r"<｜(?:User|Assistant)｜>", r"<\|start\|>\s*\w+",
    r"<\|(?:user|assistant|system|observation|User|Assistant|System)\|>", r"\[INST\]", r"\[gMASK\]", r"<\|im_user\|>",
    r"<\|im_system\|>", r"<\|start_of_role\|>\s*\w+", r"<start_of_role>\s*\w+",
)  # fmt: skip
"""How a turn begins in the templates of ChatML, Llama 3 and 4, Gemma, Command R, DeepSeek, gpt-oss, Phi, Llama 2, …"""
OWN = re.compile(r"[^\w\s]\w+[^\w\s]")
"""A sign among words, as in <|user|>."""


def header(text: str, tokenizer: PreTrainedTokenizerBase, *, anywhere: bool = False) -> str | None:
    """The sign of a turn with which a text begins, also behind a BOS, or which is anywhere in it; None without one."""
    begins, holds = _signs(_own_headers(tokenizer))
    found = holds.search(text) if anywhere else begins.match(text)
    return found["sign"] if found else None


@lru_cache(maxsize=64)
def _signs(own: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A text that begins with a sign, and a sign anywhere."""
    signs = "|".join([*map(re.escape, own), *HEADERS])
    return re.compile(rf"\s*(?:<[^<>\s]{{1,40}}>\s*)?(?P<sign>{signs})"), re.compile(rf"(?P<sign>{signs})")


def is_own(sign: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own template writes that sign, or the sign is a token of the tokenizer."""
    first = re.match(r"<[^>]*>|\[[^\]]*\]", sign)
    token = first[0] if first else sign
    known = {str(each) for each in tokenizer.added_tokens_encoder} | set(tokenizer.all_special_tokens)
    return token in known or any(token in each for each in _own_headers(tokenizer))


def refuse_rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises BadRow for a message that begins as a turn does: the chat template would be written twice."""
    for number, turn in enumerate(conversation, 1):
        sign = header(turn["content"], tokenizer)
        if sign is not None:
            raise BadRow(
                f"message {number} is rendered by a chat template already, it begins with {sign!r}: give messages, or"
                " the whole text in a column 'text'"
            )


def without_stop(answer: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, Any], bool]:
    """An answer without the EOS, or the template's end of turn, that its writer put at its end, and whether it had."""
    content = answer["content"]
    bare = content.rstrip()
    stop = next((sign for sign in end_signs(tokenizer) if bare.endswith(sign)), None)
    if stop is None or not bare[: -len(stop)].strip():
        return answer, False
    return {**answer, "content": bare[: -len(stop)]}, True


def end_signs(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """EOS, and the chat template's end of turn where that is a special token."""
    signs = [tokenizer.eos_token]
    if tokenizer.chat_template:
        stop = stop_sign(tokenizer.get_chat_template(), specials_of(tokenizer))
        signs += [stop] if stop in tokenizer.all_special_tokens else []
    return tuple(sign for sign in signs if sign)


def _own_headers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    if not tokenizer.chat_template:
        return ()
    return _headers(tokenizer.get_chat_template(), specials_of(tokenizer))


@lru_cache(maxsize=64)
def _headers(template: str, specials: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """How the template begins the turns of the assistant and of the user, where it does so with a sign."""
    found = [generation_prompt(template, specials).strip().split("\n")[0]]
    turns = [message(role, word) for role, word in (("user", "73101"), ("assistant", "73102"), ("user", "73103"))]
    try:
        text, spans = template_spans(template, turns, dict(specials))
        found.append(text[spans[1][1] :].partition("73103")[0])
    except BadRow:
        pass
    return tuple(sign.strip() for sign in found if OWN.search(sign))
