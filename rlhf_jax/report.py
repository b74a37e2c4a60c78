"""report.html of a run: one file that opens offline, also for a run that was cut short.

    python -m rlhf_jax.report RUN_DIR

Reads what the run's folder has: config.json, run.json, metrics.jsonl, summary.json, examples.jsonl, and report.json,
which says what is shown.
"""

import sys
from pathlib import Path

from rlhf_jax.errors import UserError
from rlhf_jax.folder import read_json, write_json
from rlhf_jax.metrics import read_metrics
from rlhf_jax.sections import Report, from_json, plain_report, to_json
from rlhf_jax.verdict import Finding, findings


def write_report(run_dir: str | Path, report: Report | None = None) -> Path:
    """Writes run_dir/report.html, and report.json, by which it can be written again; returns the page's path.

    Without a `report` the folder's report.json is taken; without that, every metric has a picture of its own.
    Raises UserError when the folder holds no run, or its report.json is broken.
    """
    from rlhf_jax import page  # and with it matplotlib

    run_dir = Path(run_dir)
    if not (run_dir / "config.json").exists():
        raise UserError(f"there is no run in {run_dir} (it has no config.json)")
    stages = read_metrics(run_dir)
    summary = read_json(run_dir / "summary.json")
    if report is None:
        report = read_report(run_dir) or plain_report(stages)
    else:
        write_json(run_dir / "report.json", to_json(report))
    status = str(read_json(run_dir / "status.json").get("status", ""))
    headlines = (page.section(one, stages, summary) for one in report.headlines)
    parts = [
        "" if summary else page.unfinished(status, stages),
        next((text for text in headlines if text), ""),
        page.verdict(findings(report.rules, stages, summary)),
        *(page.section(one, stages, summary) for one in report.sections),
        page.examples(report.examples, run_dir / "examples.jsonl"),
        page.numbers(summary, report.explained),
        page.origin(read_json(run_dir / "run.json")),
        page.config(read_json(run_dir / "config.json")),
    ]
    temporary, path = run_dir / "report.tmp", run_dir / "report.html"
    temporary.write_text(page.document(run_dir.resolve().name, parts), encoding="utf-8")
    temporary.replace(path)
    return path


def read_report(run_dir: str | Path) -> Report | None:
    """The report that the folder's report.json describes; None without one. Raises UserError for a broken one."""
    path = Path(run_dir) / "report.json"
    if not path.exists():
        return None
    found = read_json(path)
    try:
        if not found:
            raise TypeError
        return from_json(Report, found)
    except (TypeError, AttributeError):
        raise UserError(f"{path} is not a report of this version: delete it, and every metric is shown") from None


def read_findings(run_dir: str | Path, report: Report) -> list[Finding]:
    """The findings of the report's rules in the folder's metrics and summary, the bad first."""
    return findings(report.rules, read_metrics(run_dir), read_json(Path(run_dir) / "summary.json"))


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
