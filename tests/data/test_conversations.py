"""Where a conversation may begin later, and what goes with it."""

import pytest

from rlhf_jax.data.conversations import messages, turn_starts, without_oldest

ROLES = {"s": "system", "u": "user", "e": "user", "a": "assistant", "t": "tool"}


def talk(roles):
    """One message a letter; "e" is a user who says nothing."""
    return tuple(
        {"role": ROLES[letter], "content": "" if letter == "e" else f"{letter}{number}"}
        for number, letter in enumerate(roles)
    )


@pytest.mark.parametrize(
    ("roles", "starts"),
    [
        ("u", []),
        ("su", []),
        ("sua", []),
        ("uau", [2]),
        ("suauaua", [3, 5]),
        ("ssuau", [4]),
        ("au", [1]),  # an assistant who greets
        ("uuauu", [3]),  # two messages of a user are one turn
        ("uatatauat", [6]),  # calls and results belong to the turn
        ("uautua", [4]),  # the call of the result at 3 stands before 2
        ("uasua", [2]),  # a later system message opens a turn
        ("uasa", []),  # and is none
        ("uaea", []),  # nor are no words
        ("uaeua", [2]),
    ],
)
def test_turns(roles, starts):
    assert turn_starts(talk(roles)) == starts


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("system", "developer", "System"), "system"),
        (("user", "human", "Human", "prompter", "USER"), "user"),
        (("assistant", "gpt", "model", "bot", "Chatbot", "chatgpt", "ai", "bing", "bard"), "assistant"),
        (
            (
                "tool",
                "function",
                "ipython",
                "observation",
                "tool_response",
                "tool-response",
                "tool_result",
                "function response",
            ),
            "tool",
        ),
    ],
)
def test_names_of_speakers(names, role):
    for name in names:
        assert messages({"x": [{"from": name, "value": "a"}]}, "x") == ({"role": role, "content": "a"},)
        assert messages({"x": [{"role": name, "content": "a"}]}, "x") == ({"role": role, "content": "a"},)


def test_system_messages_stay():
    for roles, start, kept in (("suau", 3, "su"), ("suasuau", 6, "ssu"), ("uau", 2, "u"), ("suasu", 3, "ssu")):
        found = without_oldest(talk(roles), start)
        assert "".join(turn["content"][0] for turn in found) == kept
        assert found[-1] == talk(roles)[-1]
