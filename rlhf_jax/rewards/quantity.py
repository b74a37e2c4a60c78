"""Numbers as people write them: $1,800.50, -3/4, 1 1/2, 50%, 12 cm, \\frac{1}{2}. Exact, as fractions."""

import re
from fractions import Fraction
from typing import NamedTuple

DIGITS = r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+"
# A minus belongs to the number unless it stands after something to be subtracted from.
NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w.)\]}}])[-−+])?(?:(?P<currency>[$€£¥])\s?(?P<after>[-−])?)?
    (?:(?P<whole>\d+)[ ](?P<top>\d+)/(?P<under>\d+)(?![\d/]|\.\d)
    | (?<!/)(?P<numerator>{DIGITS})\s?/\s?(?P<denominator>\d+(?:\.\d+)?)(?![\d/])
    | (?P<digits>{DIGITS})(?:[eE](?P<power>[-+]?\d{{1,3}})\b)?)
    (?P<percent>\s?(?:%|per\s?cent\b|percentage\b|pct\b))?""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
# Possessive (`++`, `*+`), so that no text takes a time that grows exponentially with its length.
UNIT = re.compile(r"\s*(?P<unit>(?:[A-Za-z°€£¥¢]++\.?(?:\^\{?[23]\}?|[²³])?(?:/[A-Za-z]++)?\s*+)*+)\.?\s*", re.ASCII)
GOES_ON = re.compile(r"[.,;:]?(?:\s*$|\s+(?!(?:or|and|to)\b)[(]?[A-Za-z]{2}|\n)")
WORD = re.compile(r"[A-Za-z]+|[°€£¥¢]", re.ASCII)
NOT_UNITS = frozenset("or and to of plus minus times not but if is sqrt sin cos tan log".split())
UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimeters millimetre millimetres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "m": "m meter meters metre metres",
        "km": "km kilometer kilometers kilometre kilometres",
        "in": "inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles",
        "mg": "mg milligram milligrams", "g": "g gram grams", "kg": "kg kilogram kilograms",
        "oz": "oz ounce ounces", "lb": "lb lbs pound pounds",
        "ml": "ml milliliter milliliters", "l": "l liter liters litre litres",
        "s": "s sec second seconds", "min": "min minute minutes", "h": "h hr hrs hour hours",
        "d": "day days", "wk": "week weeks", "mo": "month months", "y": "year years",
        "dollar": "dollar dollars usd", "euro": "€ euro euros eur", "cent": "¢ cent cents", "£": "£", "¥": "¥",
        "°": "° degree degrees",
    }.items()
    for name in names.split()
}  # fmt: skip
MOST_DIGITS = 1000
"""Characters of a number; what is longer is none. (Python reads at most 4300 digits.)"""
CURRENCIES = {"$": "dollar", "€": "euro", "£": "£", "¥": "¥"}
FRACTION = re.compile(r"(\d)?\s*\\[dtc]?frac\s*(?:\{(-?[\d.]+)\}|(\d))\s*(?:\{([\d.]+)\}|(\d))")
SPACES = re.compile(r"(?<=,)\\!\s*|\\[!,;: ]|~")


class Quantity(NamedTuple):
    """A number, and what it is a number of."""

    value: Fraction
    percent: bool = False
    unit: str = ""
    """A name in `UNITS`' values, "" without one or with one that is not known."""
    is_division: bool = False
    """Written as a fraction whose value is a whole number: 8/2."""


def same(one: Quantity, other: Quantity) -> bool:
    """Whether they are one value, up to 6 decimal places, and not of two different units.

    50% is 0.5, and is 50: people leave the sign out when percent are asked for.
    """
    if one.unit and other.unit and one.unit != other.unit:
        return False
    values = {one.value, one.value / 100} if one.percent and not other.percent else {one.value}
    others = {other.value, other.value / 100} if other.percent and not one.percent else {other.value}
    return any(abs(a - b) < Fraction(1, 2_000_000) for a in values for b in others)


def quantity(text: str) -> Quantity | None:
    """The number that a text is, with its unit; None when it is anything else. LaTeX or plain."""
    plain = _head(text)
    match = NUMBER.match(plain)
    if match is None:
        return None
    rest = UNIT.fullmatch(plain, match.end())
    if rest is None or not _is_unit(rest["unit"], apart=plain[match.end() : match.end() + 1].isspace()):
        return None
    return _quantity(match, rest["unit"])


def first_quantity(text: str) -> Quantity | None:
    """The number that a text begins with, and that words or nothing come after: not more of a formula."""
    plain = _head(text)
    match = NUMBER.match(plain)
    if match is None or GOES_ON.match(plain, match.end()) is None:
        return quantity(text)
    return _quantity(match, _unit_after(plain, match))


def begins_with_number(text: str) -> bool:
    """Whether a number comes first, whatever comes after it."""
    return NUMBER.match(_head(text)) is not None


def last_number(text: str) -> str | None:
    """The last number in a text that is no exponent or index, as it stands there with its unit; None without any."""
    plain = plain_text(text)
    matches = [match for match in NUMBER.finditer(plain) if plain[: match.start()].rstrip("{")[-1:] not in ("^", "_")]
    return f"{matches[-1][0].strip()} {_unit_after(plain, matches[-1])}".strip() if matches else None


def plain_text(text: str) -> str:
    """Without LaTeX's ways to write numbers, currencies, per cent, degrees and units."""
    text = SPACES.sub("", text.replace("{,}", ",")) if "\\" in text or "{" in text or "~" in text else text
    if "\\" in text:
        text = re.sub(r"\\(?:left|right|displaystyle)\b", "", text)
        text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textrm|mathbf)\s*\{([^{}]*)\}", r" \1", text)
        text = FRACTION.sub(_fraction, text)
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text)
        text = text.replace("\\$", "$").replace("\\%", "%").replace("\\pounds", "£")
    if "**" in text:
        text = text.replace("**", "")
    return text.strip()


def _head(text: str) -> str:
    return re.sub(r"^([-−+])\s+", r"\1", plain_text(text))


def _is_unit(words: str, *, apart: bool) -> bool:
    """Whether words after a number say what is counted: a unit, or words of a language, and not letters of algebra."""
    found = WORD.findall(words)
    if all(word.lower() in UNITS for word in found):
        return True
    return apart and len(found[0]) > 2 and not NOT_UNITS.intersection(words.lower().split())


def _fraction(match: re.Match[str]) -> str:
    top, under = match[2] or match[3], match[4] or match[5]
    return f"{match[1]} {top}/{under}" if match[1] else f"{top}/{under}"


def _unit_after(text: str, match: re.Match[str]) -> str:
    word = re.match(r"\s?([A-Za-z°]+)", text[match.end() : match.end() + 30])
    return word[1] if word and word[1].lower() in UNITS and word[1].lower() != "in" else ""


def _quantity(match: re.Match[str], unit: str) -> Quantity | None:
    if len(match[0]) > MOST_DIGITS:
        return None
    if match["whole"]:
        if not int(match["under"]):
            return None
        size = int(match["whole"]) + Fraction(int(match["top"]), int(match["under"]))
    elif match["numerator"]:
        if not Fraction(match["denominator"]):
            return None
        size = _number(match["numerator"]) / Fraction(match["denominator"])
    else:
        size = _number(match["digits"]) * Fraction(10) ** int(match["power"] or 0)
    negative = (match["sign"] or "") in ("-", "−") or bool(match["after"])
    words = unit.lower().split()
    known = UNITS.get(words[0].strip("."), "") if len(words) == 1 else ""
    if match["currency"]:
        known = CURRENCIES[match["currency"]]
    divides = match["numerator"] is not None and size.denominator == 1
    return Quantity(-size if negative and match["sign"] != "+" else size, bool(match["percent"]), known, divides)


def _number(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
