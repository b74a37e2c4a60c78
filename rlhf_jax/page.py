"""The HTML of a report's parts; each is empty where there is nothing to show."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_jax import figures
from rlhf_jax.provenance import commit_in_words, in_words
from rlhf_jax.sections import Arrow, Column, Costs, Examples, Frontier, Line, Panel, Point, Rates, Section, Table
from rlhf_jax.verdict import Finding, Rows, mean, series

CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:980px;padding:2rem 1.25rem 4rem;background:#fbfbfc;color:#1d2430;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.6rem 0 .4rem}
.note{color:#5a6473;margin:.2rem 0 .8rem;max-width:70ch}
.warn,.fine{border-left:4px solid;padding:.6rem 1rem;margin:.4rem 0}
.warn{background:#fff4e0;border-color:#d9772b}.fine{background:#eef7f6;border-color:#0b7a75}
.card{background:#fff;border:1px solid #e6e9ee;border-radius:10px;padding:1rem;margin:.8rem 0;overflow-x:auto}
svg{max-width:100%;height:auto;display:block;margin:0 auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
table{border-collapse:collapse;width:100%;font-size:.93rem}
td,th{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #eef0f4;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:.86rem/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:.6rem}
.grid svg{width:100%;max-width:440px}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:.8rem;margin-top:.6rem}
.side{border-top:3px solid;padding-top:.4rem}.side small{color:#5a6473}
details{margin:1rem 0}summary{cursor:pointer;color:#35507a}
@media(max-width:640px){body{padding:1.2rem .8rem 3rem}}
"""
Summary = Mapping[str, Any]


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head><body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def unfinished(status: str, stages: Mapping[str, Rows]) -> str:
    """Says that a run has no final numbers, and how far it came."""
    done = ", ".join(f"{stage} up to step {rows[-1]['step']}" for stage, rows in stages.items())
    word = "has not finished" if status in ("", "running", "finished") else f"has not finished ({status})"
    return f'<p class="warn">This run {escape(word)}. Logged: {escape(done) or "nothing yet"}.</p>'


def verdict(found: Sequence[Finding]) -> str:
    """The findings of the rules, the bad first."""
    lines = [f'<p class="{"warn" if one.bad else "fine"}">{escape(one.sentence)}</p>' for one in found]
    bad = any(one.bad for one in found)
    note = "Look at this before anything else." if bad else "Nothing that this report looks for is wrong."
    return _section("Verdict", note, "".join(lines))


def section(one: Section, stages: Mapping[str, Rows], summary: Summary) -> str:
    """Whatever of a section has something to show."""
    rows = stages.get(one.stage, [])
    drawn, fitted = _frontier(one.frontier, rows, summary)
    said = [text for text in (_filled(sentence, summary) for sentence in one.sentences) if text]
    parts = (
        _arrow(one.arrow, summary),
        _rates(one.rates, summary),
        _panels(one.panels, rows, one.xlabel),
        drawn,
        _table(one.table, rows),
        _costs(one.costs, rows, summary),
    )
    return _section(one.title, " ".join(x for x in (one.note, *said, fitted) if x), "".join(parts))


def examples(shown: Examples | None, path: Path) -> str:
    """The prompts of a jsonl file, with the answers that the columns name side by side; torn lines are passed over."""
    cards = []
    for line in path.read_text(encoding="utf-8").splitlines() if shown and path.exists() else []:
        try:
            example = json.loads(line)
            prompt = escape(str(example["prompt"]))
        except (ValueError, KeyError, TypeError):
            continue
        assert shown is not None
        sides = "".join(_side(example, one, shown.numbers) for one in shown.answers if one.metric in example)
        cards.append(f'<div class="card"><pre>{prompt}</pre><div class="sides">{sides}</div></div>' if sides else "")
    return _section(shown.title, shown.note, "".join(cards)) if shown else ""


def numbers(summary: Summary, explained: Mapping[str, str]) -> str:
    """A table of the final numbers, those with an explanation first."""

    def table(names: Sequence[str]) -> str:
        return _rows(
            f"<td><code>{escape(name)}</code></td><td class=n>{_number(summary[name])}</td>"
            f"<td>{escape(explained.get(name, ''))}</td>"
            for name in names
        )

    known = [name for name in explained if name in summary]
    other = sorted(summary.keys() - explained.keys())
    more = f"<details><summary>{len(other)} more</summary>{table(other)}</details>" if other else ""
    return _section("Final numbers", "As in summary.json.", (table(known) if known else "") + more)


def origin(run: Mapping[str, Any]) -> str:
    """Where the run came from, as in run.json: experiment, inputs, data, and its sessions."""
    facts = {name: value for name, value in run.items() if name not in ("sessions", "inputs") and value}
    lines = [(name, in_words(value)) for name, value in facts.items()]
    for name, found in (run.get("inputs") or {}).items():
        for one in found or ():
            content = f", {one['bytes']:,} bytes, SHA-256 {one['sha256']}" if "sha256" in one else ""
            lines.append((name, f"{one['name']}{content}"))
    for number, one in enumerate(run.get("sessions") or (), 1):
        lines.append((f"session {number}", f"{one['start']} to {one['end'] or '?'}: {one['status']}"))
        packages = {name: version for name, version in one["packages"].items() if version}
        about = {
            "command": one["command"],
            "commit": commit_in_words(one),
            "devices": f"{one['devices']}, {one['processes']} process{'es' if one['processes'] > 1 else ''}",
            "software": in_words(packages) + f", Python {one['python']}, {one['platform']}",
        }
        lines += [(name, text) for name, text in about.items() if text]
    body = _rows(f"<td>{escape(name)}</td><td><code>{escape(text)}</code></td>" for name, text in lines)
    return _section("Where this run came from", "As in run.json; times are UTC.", body if lines else "")


def config(value: Any) -> str:
    """The flags."""
    text = escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f'<details><summary>Config</summary><div class="card"><pre>{text}</pre></div></details>'


def _section(title: str, note: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}' if body else ""


def _card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def _rows(cells: Iterable[str], head: str = "") -> str:
    return _card(f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")


def _filled(sentence: str, summary: Summary) -> str:
    try:
        return sentence.format_map(_numbers_in(summary))
    except (KeyError, ValueError):
        return ""


def _numbers_in(summary: Summary) -> dict[str, float]:
    return {name: value for name, value in summary.items() if isinstance(value, int | float)}


def _arrow(one: Arrow | None, summary: Summary) -> str:
    have = _numbers_in(summary)
    if one is None or not {one.start.value, one.end.value} <= have.keys():
        return ""

    def point(at: Point) -> figures.Mean:
        return figures.Mean(at.label, have[at.value], have.get(at.error or "", 0.0), at.colour)

    mark = (one.mark.label, have[one.mark.metric]) if one.mark and one.mark.metric in have else None
    return _card(figures.arrow(point(one.start), point(one.end), mark, one.xlabel))


def _rates(one: Rates | None, summary: Summary) -> str:
    have = _numbers_in(summary)
    found: list[tuple[str, float, float, float]] = []
    for line in one.rates if one else ():
        if line.metric in have:
            low, high = (have.get(line.metric + end, have[line.metric]) for end in ("_low", "_high"))
            found.append((line.label, have[line.metric], low, high))
    if one is None or not found or one.rates[0].metric not in have:
        return ""
    return _card(figures.intervals(found, one.chance, one.xlabel))


def _panels(panels: Sequence[Panel], rows: Rows, xlabel: str) -> str:
    drawn = [figures.curve(rows, panel.title, panel.lines, xlabel) for panel in panels]
    pictures = "".join(f"<div>{svg}</div>" for svg in drawn if svg)
    return f'<div class="card grid">{pictures}</div>' if pictures else ""


def _frontier(one: Frontier | None, rows: Rows, summary: Summary) -> tuple[str, str]:
    """The picture, and what is said of the fit."""
    if one is None:
        return "", ""
    start = _numbers_in(summary).get(one.start or "")
    drawn = figures.frontier(rows, one.divergence, one.lines, one.xlabel, fit=one.fit, start=start)
    if drawn is None:
        return "", ""
    svg, fit = drawn
    label = next((line.label for line in one.lines if line.metric == one.fit), one.fit)
    said = f"Fit of the {label} (Gao et al. 2023): " if fit else ""
    return _card(svg), said + (f"α = {fit.alpha:.3g}, β = {fit.beta:.3g}, R² = {fit.r2:.2f}." if fit else "")


def _table(one: Table | None, rows: Rows) -> str:
    columns = one.columns if one else ()
    full = [row for row in rows if all(isinstance(row.get(c.metric), int | float) for c in columns)]
    if one is None or not full:
        return ""
    best = [_best(column, full) for column in columns]

    def cell(row: Mapping[str, Any], column: Column, marked: Mapping[str, Any]) -> str:
        mark = f" ◀ {escape(column.mark)}" if row is marked else ""
        return f"<td class=n>{row[column.metric]:.{column.digits}f}{mark}</td>"

    head = "".join(f"<th>{escape(text)}</th>" for text in (one.step, *(c.label for c in columns)))
    body = (
        f"<td>{row['step']}</td>" + "".join(cell(row, c, marked) for c, marked in zip(columns, best, strict=True))
        for row in full
    )
    return _rows(body, f"<tr>{head}</tr>")


def _best(column: Column, rows: Rows) -> Mapping[str, Any]:
    choose = max if column.best == "highest" else min
    return choose(rows, key=lambda row: row[column.metric])


def _costs(one: Costs | None, rows: Rows, summary: Summary) -> str:
    have = _numbers_in(summary)
    found = []
    for line in one.means if one else ():
        values = series(rows[1:] or rows, line.metric)[1]
        found += [(line.label, mean(values))] if values.size else []
        found += [(line.label, have[line.metric])] if line.metric in have and not values.size else []
    for line in one.lasts if one else ():
        values = series(rows, line.metric)[1]
        found += [(line.label, float(values[-1]))] if values.size else []
    return _rows(f"<td>{escape(label)}</td><td class=n>{value:,.4g}</td>" for label, value in found) if found else ""


def _side(example: Mapping[str, Any], answer: Line, numbers: Sequence[Line]) -> str:
    keys = [(line.label, example.get(f"{answer.metric}_{line.metric}")) for line in numbers]
    shown = ", ".join(f"{escape(label)} {value:.2f}" for label, value in keys if isinstance(value, int | float))
    return (
        f'<div class="side" style="border-color:{escape(answer.colour)}">'
        f"<small><b>{escape(answer.label)}</b> {shown}</small><pre>{escape(str(example[answer.metric]))}</pre></div>"
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not a number"
