"""report.html of a run: one file that opens offline, also for a run that was cut short.

    python -m rlhf_jax.report RUN_DIR

Reads metrics.jsonl, config.json, and what there is of summary.json and examples.jsonl.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import figures
from rlhf_jax.errors import UserError
from rlhf_jax.figures import PROXY, QUIET, START, TRUTH, Rows
from rlhf_jax.metrics import read_metrics

EXPLAINED = {
    "demonstrators_utility": "Mean true utility of the demonstrations that SFT learned from.",
    "sft_utility": "Mean true utility of SFT's answers to held-out prompts, sampled at temperature 1.",
    "ppo_utility": "The same for the policy after PPO.",
    "dpo_utility": "The same after preference optimisation.",
    "win_rate": "Held-out prompts on which its answer has the higher true utility than SFT's; a tie counts half.",
    "win_rate_low": "Lower end of its 95% interval.",
    "win_rate_high": "Upper end of its 95% interval.",
    "shifted_sft_utility": "SFT's true utility on prompts of another distribution.",
    "shifted_ppo_utility": "PPO's true utility on prompts of another distribution.",
    "shifted_dpo_utility": "The same after preference optimisation.",
    "shifted_win_rate": "Share of wins against SFT there.",
    "sft_score": "What the reward model thinks of SFT's answers; demonstrations are at 0.",
    "ppo_score": "What the reward model thinks of PPO's answers: the proxy that PPO maximises.",
    "score_win_rate": "Held-out prompts on which the reward (DPO: the implicit one) prefers its answer to SFT's.",
    "reward_model_val_accuracy": "Held-out comparisons that the reward model predicts.",
    "reward_model_val_accuracy_low": "Lower end of its 95% interval.",
    "reward_model_val_accuracy_high": "Upper end of its 95% interval.",
    "reward_model_length_baseline": "What picking the longer answer would predict.",
    "reward_model_annotator_agreement": "How often two sampled annotators agree.",
    "reward_model_ceiling": "What the best predictor of one annotator could reach: their noise sets it.",
    "reward_model_share_of_ceiling": "The reward model's accuracy over that ceiling.",
    "reward_model_calibration_error": "Mean gap between predicted probability and observed share.",
    "ppo_kl_k1": "Nats a response between the policy and SFT at the last iteration.",
    "ppo_seconds": "Seconds of the last PPO iteration.",
    "ppo_tokens_per_second": "Tokens sampled a second, the update included.",
    "ppo_compilations": "Programs compiled while PPO ran.",
    "dpo_val_accuracy": "Held-out comparisons that the implicit reward predicts.",
    "dpo_val_accuracy_low": "Lower end of its 95% interval.",
    "dpo_val_accuracy_high": "Upper end of its 95% interval.",
    "dpo_length_baseline": "What picking the longer answer would predict.",
    "dpo_ceiling": "What the best predictor of one annotator could reach: their noise sets it.",
    "dpo_kl_k1": "Nats a response between the policy and SFT, on samples.",
    "dpo_val_chosen_change": "How log π of held-out chosen answers moved, in nats.",
    "dpo_val_rejected_change": "How log π of held-out rejected answers moved, in nats.",
    "sft_length": "Mean tokens of SFT's answers.",
    "ppo_length": "Mean tokens of PPO's answers.",
    "dpo_length": "Mean tokens of answers after preference optimisation.",
}

CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0 auto;max-width:980px;padding:2rem 1.25rem 4rem;background:#fbfbfc;color:#1d2430;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.6rem 0 .4rem}
.note{color:#5a6473;margin:.2rem 0 .8rem;max-width:70ch}
.warn{background:#fff4e0;border-left:4px solid #d9772b;padding:.6rem 1rem;margin:1rem 0}
.card{background:#fff;border:1px solid #e6e9ee;border-radius:10px;padding:1rem;margin:.8rem 0;overflow-x:auto}
svg{max-width:100%;height:auto;display:block;margin:0 auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
table{border-collapse:collapse;width:100%;font-size:.93rem}
td,th{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #eef0f4;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:.86rem/1.45 ui-monospace,SFMono-Regular,Menlo,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:.6rem}
.grid svg{width:100%;max-width:440px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.8rem;margin-top:.6rem}
.side{border-top:3px solid;padding-top:.4rem}.side small{color:#5a6473}
details{margin:1rem 0}summary{cursor:pointer;color:#35507a}
@media(max-width:640px){.pair{grid-template-columns:1fr}body{padding:1.2rem .8rem 3rem}}
"""


def write_report(run_dir: str | Path) -> Path:
    """Writes and returns run_dir/report.html. Raises UserError when the folder holds no run."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").exists():
        raise UserError(f"there is no run in {run_dir} (it has no config.json)")
    stages = read_metrics(run_dir)
    summary = _json(run_dir / "summary.json") or {}
    ppo = stages.get("ppo", [])
    sections = [
        _unfinished(stages) if not summary else "",
        _headline(summary),
        _stage(stages.get("sft", []), "Supervised fine-tuning", "step", SFT_PANELS, SFT_NOTE),
        _choice(stages.get("choice", [])),
        _stage(stages.get("reward_model", []), "Reward model", "step", REWARD_PANELS, REWARD_NOTE),
        _stage(stages.get("dpo", []), "Preference optimisation", "step", DPO_PANELS, DPO_NOTE),
        _stage(ppo, "PPO", "iteration", PPO_PANELS, PPO_NOTE),
        _against_kl(ppo, summary),
        _stage(ppo, "Is PPO healthy?", "iteration", HEALTH_PANELS, HEALTH_NOTE),
        _seconds(ppo, summary),
        _examples(run_dir / "examples.jsonl"),
        _numbers(summary),
        _config(_json(run_dir / "config.json")),
    ]
    title = escape(run_dir.resolve().name)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
        f"<style>{CSS}</style></head><body><h1>{title}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    temporary, path = run_dir / "report.tmp", run_dir / "report.html"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


SFT_PANELS = [
    ("loss, nats a token", [("loss", "training", QUIET), ("val_loss", "validation", START)]),
    ("true utility of samples", [("utility", "true utility", TRUTH)]),
]
SFT_NOTE = "Imitation of the demonstrations; it can get as good as they are, not better."
REWARD_PANELS = [
    ("loss, nats a pair", [("loss", "training", QUIET)]),
    ("agreement with annotators", [("accuracy", "training", QUIET), ("val_accuracy", "held out", PROXY)]),
]
REWARD_NOTE = "Learns from comparisons which of two answers people prefer (Bradley-Terry)."
DPO_PANELS = [
    ("loss", [("loss", "training", QUIET)]),
    ("agreement with annotators", [("accuracy", "training", QUIET), ("val_accuracy", "held out", PROXY)]),
    ("true utility: only measured", [("utility", "utility", TRUTH)]),
    ("KL from SFT, nats a response", [("kl_k1", "k1", START)]),
    ("log π moved by, nats", [("val_chosen_change", "chosen", TRUTH), ("val_rejected_change", "rejected", QUIET)]),
    ("tokens a response", [("length", "length", START)]),
]
DPO_NOTE = "A policy from comparisons, without a reward model. That log π of chosen answers falls, too, is usual."
PPO_PANELS = [
    ("reward model's score: the proxy", [("score", "score", PROXY)]),
    ("true utility: only measured", [("utility", "utility", TRUTH)]),
    ("KL from SFT, nats a response", [("kl_k1", "k1", START), ("kl_k2", "k2", QUIET), ("kl_k3", "k3", PROXY)]),
]
PPO_NOTE = "The policy maximises the score minus β·KL. Where the proxy climbs and the truth falls, it is hacked."
HEALTH_PANELS = [
    ("entropy, nats a token", [("entropy", "entropy", START)]),
    ("clip fraction", [("clip_fraction", "clip fraction", START)]),
    ("explained variance of the critic", [("explained_variance", "explained variance", START)]),
    ("value loss", [("value_loss", "value loss", START)]),
    ("tokens a response", [("length", "length", START)]),
    ("sampler–trainer gap, nats", [("sampler_gap", "mean", START), ("sampler_gap_max", "largest", QUIET)]),
    ("β", [("beta", "β", START)]),
]
HEALTH_NOTE = (
    "Entropy near 0 is a collapse; a clip fraction above a third means steps too large; an explained variance at or "
    "below 0 means that the critic says nothing; the gap is sampling and training disagreeing about one token."
)


def _card(svg: str) -> str:
    return f'<div class="card">{svg}</div>'


def _section(title: str, note: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="note">{note}</p>{body}' if body else ""


def _unfinished(stages: Mapping[str, Rows]) -> str:
    done = ", ".join(f"{stage} up to step {rows[-1]['step']}" for stage, rows in stages.items())
    return f'<p class="warn">This run has not finished. Logged: {escape(done) or "nothing yet"}.</p>'


def _headline(summary: Mapping[str, Any]) -> str:
    have = {name for name, value in summary.items() if isinstance(value, int | float)}
    stage = "ppo" if "ppo_utility" in have else "dpo"
    if {"sft_utility", f"{stage}_utility"} <= have:
        who = stage.upper()
        start_se, end_se = (
            summary[f"{one}_utility_se"] if f"{one}_utility_se" in have else 0.0 for one in ("sft", stage)
        )
        teachers = summary["demonstrators_utility"] if "demonstrators_utility" in have else None
        note = f"{who}, trained on people's comparisons, against SFT, which imitates their demonstrations."
        if "win_rate" in have:
            note += f" {who}'s answer is the better one on {summary['win_rate']:.1%} of held-out prompts."
        ends = summary["sft_utility"], summary[f"{stage}_utility"]
        svg = figures.headline(*ends, start_se, end_se, teachers, who=who)
        return _section("How good the answers truly are", note, _card(svg))
    model = "reward_model" if "reward_model_val_accuracy" in have else "dpo"
    if f"{model}_val_accuracy" in have:
        title = "Reward model" if model == "reward_model" else "Implicit reward"
        names = [(title.lower(), "val_accuracy"), ("pick the longer", "length_baseline")]
        rates = []
        for label, name in names:
            key = f"{model}_{name}"
            if key in have:
                low, high = (summary[key + end] if key + end in have else summary[key] for end in ("_low", "_high"))
                rates.append((label, summary[key], low, high))
        note = "Share of held-out comparisons predicted, with 95% intervals; chance is dashed."
        return _section(title, note, _card(figures.intervals(rates, 0.5, "agreement with held-out people")))
    return ""


def _stage(rows: Rows, title: str, xlabel: str, panels: Sequence, note: str) -> str:
    drawn = [figures.curve(rows, name, lines, xlabel) for name, lines in panels]
    pictures = "".join(f"<div>{svg}</div>" for svg in drawn if svg)
    return _section(title, escape(note), f'<div class="card grid">{pictures}</div>' if pictures else "")


def _choice(rows: Rows) -> str:
    rows = [row for row in rows if None not in (row.get("score"), row.get("val_loss"))]
    if not rows:
        return ""
    best, lowest = max(rows, key=lambda r: r["score"]), min(rows, key=lambda r: r["val_loss"])
    lines = "".join(
        f"<tr><td>{row['step']}</td><td class=n>{row['score']:.3f}{' ◀ PPO starts here' if row is best else ''}</td>"
        f"<td class=n>{row['val_loss']:.4f}{' ◀ lowest' if row is lowest else ''}</td></tr>"
        for row in rows
    )
    head = "<tr><th>epoch</th><th>reward model's score of its samples</th><th>validation loss</th></tr>"
    note = "PPO starts from the epoch whose samples the reward model likes best (Ouyang et al. 2022, §3.5)."
    return _section("Which SFT epoch", note, f'<div class="card"><table>{head}{lines}</table></div>')


def _against_kl(ppo: Rows, summary: Mapping[str, Any]) -> str:
    drawn = figures.against_kl(ppo, summary.get("sft_utility"))
    if drawn is None:
        return ""
    svg, fit = drawn
    note = "How much reward a given distance from SFT buys."
    if fit is not None:
        note += f" Fit of the truth (Gao et al. 2023): α = {fit.alpha:.3g}, β = {fit.beta:.3g}, R² = {fit.r2:.2f}."
    return _section("Reward against distance", note, _card(svg))


def _seconds(ppo: Rows, summary: Mapping[str, Any]) -> str:
    names = sorted({name for row in ppo for name in row if name.startswith("seconds")})
    # Not the first iteration: it compiles.
    means = {name: figures.series(ppo[1:] or ppo, name)[1] for name in names}
    rows = [
        (name.removeprefix("seconds_").replace("seconds", "whole"), v.mean()) for name, v in means.items() if v.size
    ]
    rows += [
        (name.removeprefix("seconds_"), value)
        for name, value in summary.items()
        if name.startswith("seconds_") and name not in means and isinstance(value, int | float)
    ]
    if not rows:
        return ""
    lines = "".join(f"<tr><td>{escape(name)}</td><td class=n>{value:.3f} s</td></tr>" for name, value in rows)
    speed, compiled = figures.series(ppo[1:] or ppo, "tokens_per_second")[1], figures.series(ppo, "compilations")[1]
    if speed.size:
        lines += f"<tr><td>tokens sampled a second</td><td class=n>{np.mean(speed):,.0f}</td></tr>"
    if compiled.size:
        lines += f"<tr><td>programs compiled</td><td class=n>{compiled[-1]:.0f}</td></tr>"
    note = "Mean over the iterations after the first, which compiles."
    return _section("A PPO iteration", note, f'<div class="card"><table>{lines}</table></div>')


def _examples(path: Path) -> str:
    cards = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            example = json.loads(line)
            last = "dpo" if "dpo" in example else "ppo"
            sides = "".join(_side(example, who, color) for who, color in (("sft", START), (last, TRUTH)))
            prompt = escape(str(example["prompt"]))
        except (ValueError, KeyError, TypeError):
            continue
        cards.append(f'<div class="card"><pre>{prompt}</pre><div class="pair">{sides}</div></div>')
    return _section("Answers side by side", "The first held-out prompts, one sample each.", "".join(cards))


def _side(example: Mapping[str, Any], who: str, color: str) -> str:
    numbers = [
        f"{name} {example[f'{who}_{key}']:.2f}"
        for key, name in (("utility", "true utility"), ("score", "score"))
        if isinstance(example.get(f"{who}_{key}"), int | float)
    ]
    return (
        f'<div class="side" style="border-color:{color}"><small><b>{who.upper()}</b> {", ".join(numbers)}</small>'
        f"<pre>{escape(str(example[who]))}</pre></div>"
    )


def _numbers(summary: Mapping[str, Any]) -> str:
    def table(names: Sequence[str]) -> str:
        lines = "".join(
            f"<tr><td><code>{escape(name)}</code></td><td class=n>{_number(summary[name])}</td>"
            f"<td>{escape(EXPLAINED.get(name, ''))}</td></tr>"
            for name in names
        )
        return f'<div class="card"><table>{lines}</table></div>'

    known = [name for name in EXPLAINED if name in summary]
    other = sorted(summary.keys() - EXPLAINED.keys())
    more = f"<details><summary>{len(other)} more</summary>{table(other)}</details>" if other else ""
    return _section("Final numbers", "As in summary.json.", (table(known) if known else "") + more)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not a number"


def _config(config: Any) -> str:
    text = escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f'<details><summary>Config</summary><div class="card"><pre>{text}</pre></div></details>'


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(arguments: list[str]) -> int:
    """Writes the report of a run again. Returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m rlhf_jax.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
