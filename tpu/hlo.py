"""Counts the collectives of a compiled TPU program (HLO text) and their bytes, with the turns of loops."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FUSED = "all-reduce-scatter"
"""The beginning of the name of a computation whose all-reduce keeps only a part: a reduce-scatter."""
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
CALLED = re.compile(r"(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
Turns = Callable[[str], int]


class Instruction(NamedTuple):
    """name = shapes kind(rest"""

    name: str
    shapes: str
    kind: str
    rest: str


class Sent(NamedTuple):
    """Totals of a program by kind of collective."""

    times: Counter[str]
    """The number of times that a chip takes part in one."""
    bytes: Counter[str]
    """Bytes that a chip receives in all of them together."""


def sizes(shapes: str) -> list[int]:
    """Bytes of each array in an HLO type, such as (f32[8,128]{1,0}, bf16[4])."""
    found = re.findall(r"\b(pred|[a-z]+\d+(?:e\w+)?)\[([\d,]*)\]", shapes)
    return [WIDTHS.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in found]


def chips_of(rest: str) -> int:
    """How many chips take part together in a collective. Raises ValueError where the text does not say."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    raise ValueError(f"no replica_groups in {rest[:200]}")


def received(kind: str, shapes: str, rest: str) -> float:
    """Bytes that each chip receives when a collective goes round a ring."""
    result = sum(sizes(shapes))
    if kind == "collective-permute":
        return result
    chips = chips_of(rest)
    if kind == "reduce-scatter":
        return result * (chips - 1)
    return (2 if kind == "all-reduce" else 1) * result * (chips - 1) / chips


def parse(program: str) -> tuple[str, dict[str, list[Instruction]]]:
    """(the entry's name, the instructions of each computation)."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in program.splitlines():
        if match := COMPUTATION.match(line):
            current = match[1]
            computations[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif match := INSTRUCTION.match(line):
            computations.setdefault(current, []).append(Instruction(*match.groups()))
    return entry, computations


def turns_of(loop: Instruction, computations: dict[str, list[Instruction]], otherwise: Turns) -> int:
    """The turns of a while loop that counts from 0 to a constant; for any other loop `otherwise(its text)`."""
    (name,) = re.findall(r"condition=%?([\w.\-]+)", loop.rest)
    condition = computations[name]
    constants = {one.name: one.rest for one in condition if one.kind == "constant"}
    for one in condition:
        if one.kind == "compare" and "direction=LT" in one.rest:
            for name in re.findall(r"%([\w.\-]+)", one.rest.partition(")")[0]):
                if name in constants:
                    return int(constants[name].partition(")")[0])
    return otherwise(loop.rest)


def sent(program: str, *, otherwise: Turns = lambda _: 1) -> Sent:
    """The collectives of a program. One that runs in steps, beside others' work, has one channel and counts once.

    Its steps may lie in a loop of that work; how often it runs, its first and last step say, which lie outside.
    """
    entry, computations = parse(program)
    channels: dict[str, tuple[int, str, float]] = {}

    def walk(name: str, turns: int) -> None:
        for one in computations[name]:
            kind = one.kind.removesuffix("-start")
            if kind in KINDS:
                shapes = one.shapes
                if one.kind != kind and kind != "all-reduce":  # (operands, results, …)
                    shapes = max(re.findall(r"\w+\[[\d,]*\]", shapes), key=lambda shape: sizes(shape)[0])
                cost = received(kind, shapes, one.rest)
                if kind == "all-reduce" and name.startswith(FUSED):
                    kind, cost = "reduce-scatter", cost / 2
                channel = re.search(r"channel_id=(\d+)", one.rest)
                key = channel[1] if channel else f"{name}/{one.name}"
                channels[key] = min(channels.get(key, (turns, kind, cost)), (turns, kind, cost))
            inner = turns * (turns_of(one, computations, otherwise) if one.kind == "while" else 1)
            for how, called in CALLED.findall(one.rest):
                if how != "to_apply" or one.kind == "call":
                    walk(called, inner)

    walk(entry, 1)
    total = Sent(Counter(), Counter())
    for turns, kind, cost in channels.values():
        total.times[kind] += turns
        total.bytes[kind] += round(turns * cost)
    return total
