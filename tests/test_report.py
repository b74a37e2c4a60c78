import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from rlhf_jax import report
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.sections import (
    PROXY,
    TRUTH,
    Arrow,
    Column,
    Costs,
    Examples,
    Frontier,
    Line,
    Panel,
    Point,
    Rates,
    Report,
    Section,
    Table,
    from_json,
    to_json,
)
from rlhf_jax.verdict import Condition, Rule

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Tags balanced, text, headings, ids, and whatever a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.fetched, self.headings, self.text, self.tags = [], [], [], [], "", []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            local = value and value.startswith(("#", "url(#"))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") and not local:
                self.fetched.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@dataclass(frozen=True)
class Config:
    note: str = "<b>&"


def log_stages(run, ppo_steps, *, utility):
    for step in range(1, 261):
        metrics = {"loss": 1 / step}
        if step % 130 == 0:
            metrics |= {"val_loss": 0.5} | ({"utility": 1.0} if utility else {})
        run.log("sft", step, metrics)
    for step in range(1, 4):
        run.log("reward_model", step, {"loss": 0.6, "accuracy": 0.6, "val_accuracy": 0.6})
        run.log("choice", step, {"score": [1.0, 3.0, 2.0][step - 1], "val_loss": 1.0 + step})
    for step in range(1, ppo_steps + 1):
        d = step / 5
        truth = {"utility": 1.4 + d * (0.9 - 0.4 * math.log(d))} if utility else {}
        run.log(
            "ppo", step,
            {"score": d, "kl_k1": d * d, "entropy": math.nan if step == 2 else 1.0, "compilations": 2,
             "seconds": 9.0 if step == 1 else 0.5, "seconds_rollout": 0.25, "tokens_per_second": 1000} | truth,
        )  # fmt: skip


SUMMARY = {
    "sft_utility": 1.4, "sft_utility_se": 0.05, "ppo_utility": 2.6, "ppo_utility_se": 0.04,
    "demonstrators_utility": 1.5, "win_rate": 0.92, "own_number": 3.25, "odd": math.nan,
}  # fmt: skip


REPORT = Report(
    headlines=(
        Section(
            "How good", "PPO against SFT.",
            sentences=("Better on {win_rate:.1%} of prompts.", "Never said: {gone:.1f}."),
            arrow=Arrow(
                Point("sft_utility", "sft_utility_se", "SFT", PROXY), Point("ppo_utility", None, "PPO", TRUTH),
                "utility", Line("demonstrators_utility", "demonstrators"),
            ),
        ),
        Section("How often", rates=Rates(
            (Line("rm_accuracy", "reward model"), Line("longer", "pick the longer")), 0.5, "x",
        )),
    ),
    sections=(
        Section("SFT", "A <note>.", "sft", panels=(
            Panel("loss", (Line("loss", "training"), Line("val_loss", "validation"))),
            Panel("never logged", (Line("never", "never"),)),
        )),
        Section("Which epoch", "", "choice", table=Table(
            "epoch",
            (Column("score", "score", "highest", "starts here"), Column("val_loss", "loss", "lowest", "lowest", 4)),
        )),
        Section("Never logged", "", "never", panels=(Panel("loss", (Line("loss", "loss"),)),)),
        Section("PPO", "", "ppo", "iteration", panels=(Panel("proxy", (Line("score", "score", PROXY),)),)),
        Section("Reward against distance", "Gao.", "ppo", frontier=Frontier(
            "kl_k1", (Line("score", "proxy"), Line("utility", "truth")), "utility", "sft_utility", "d",
        )),
        Section("Costs", "", "ppo", costs=Costs(
            (Line("seconds", "whole"), Line("seconds_rollout", "rollout"), Line("own_number", "own")),
            (Line("compilations", "programs compiled"),),
        )),
    ),
    examples=Examples("Side by side", "", (Line("sft", "before"), Line("ppo", "after"), Line("dpo", "other")),
                      (Line("utility", "true utility"), Line("score", "score"))),
    rules=(
        Rule("sft", (Condition("loss", "does not fall", 3.0),), "The loss stays.", "The loss falls to {end:.2f}."),
        Rule("ppo", (Condition("kl_k1", "ends above", 5.0),), "KL is {end:.1f} > 5."),
    ),
    explained={"win_rate": "Wins & ties."},
)  # fmt: skip


def written(tmp_path, shown=REPORT):
    path = report.write_report(tmp_path, shown)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [] and "@import" not in text and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part[: part.index("</svg>") + 6])
    return text, page


def test_a_finished_run_in_the_controlled_world(tmp_path):
    with Run(tmp_path, Config(), name="x") as run:
        log_stages(run, 12, utility=True)
        run.summary(SUMMARY)
        example = {"prompt": "sort <b> & a", "sft": "a <script>x</script>", "ppo": "a b",
                   "sft_utility": 0.5, "ppo_utility": 2.25, "sft_score": -1.0, "ppo_score": None}  # fmt: skip
        (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n" + '{"prompt": "torn')
        run.record(data={"read": 12345})
        (tmp_path / "data.jsonl").write_text("{}")
        run.inputs(model="owner/model", demonstrations=str(tmp_path / "data.jsonl"))
    _, page = written(tmp_path)
    assert page.headings == [
        "How good", "Verdict", "SFT", "Which epoch", "PPO", "Reward against distance", "Costs", "Side by side",
        "Final numbers", "Where this run came from",
    ]  # fmt: skip
    # The picture comes first and says the numbers.
    first = page.text[: page.text.index("Verdict")]
    for part in ("SFT 1.40", "PPO 2.60", "demonstrators 1.50", "92.0% of prompts"):
        assert part in first
    assert "Never said" not in page.text
    # The verdict says what is bad, and then what is not.
    after = page.text[page.text.index("Verdict") : page.text.index("A <note>")]
    assert "Look at this" in after and after.index("KL is 5.3 > 5.") < after.index("The loss falls to 0.00")
    # Gao's curve was put in, from SFT's utility on; the fit finds it again.
    assert "Fit of the truth (Gao et al. 2023): α = 0.9, β = 0.4, R² = 1.00" in page.text
    assert "2.000 ◀" not in page.text and "3.000 ◀ starts here" in page.text and "2.0000 ◀ lowest" in page.text
    # Seconds are those of iterations that did not compile.
    assert "whole0.5" in page.text and "rollout0.25" in page.text and "programs compiled2" in page.text
    assert "own3.25" in page.text
    side = page.text[page.text.index("Side by side") : page.text.index("Final numbers")]
    assert "sort <b> & a" in side and "before true utility 0.50, score -1.00a <script>x</script>" in side
    assert "after true utility 2.25a b" in side and "other" not in side and "torn" not in side
    assert "win_rate0.92Wins & ties." in page.text and "own_number3.25" in page.text and "oddnot a number" in page.text
    assert '"note": "<b>&"' in page.text
    assert "not finished" not in page.text
    origin = page.text[page.text.index("Where this run came from") :]
    for part in (
        "experimentx",
        "dataread: 12,345",
        "modelowner/model",
        "data.jsonl, 2 bytes, SHA-256 ",
        "finished",
        "jax: ",
    ):
        assert part in origin


def test_real_text_has_no_true_utility(tmp_path):
    with Run(tmp_path, Config(), name="x") as run:
        log_stages(run, 4, utility=False)
        run.summary({"rm_accuracy": 0.61, "rm_accuracy_low": 0.58, "rm_accuracy_high": 0.64, "longer": 0.55})
    _, page = written(tmp_path)
    assert page.headings[0] == "How often" and "How good" not in page.headings
    assert "61.0%" in page.text and "pick the longer" in page.text and "55.0%" in page.text
    assert "Reward against distance" in page.headings and "α =" not in page.text
    assert "Nothing that this report looks for is wrong" in page.text


@pytest.mark.parametrize("ppo_steps", [0, 1, 2])
def test_an_interrupted_run_can_be_looked_at(tmp_path, ppo_steps):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config(), name="x") as run:
        log_stages(run, ppo_steps, utility=True)
        raise KeyboardInterrupt
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "st')
    _, page = written(tmp_path)
    assert "has not finished (interrupted)" in page.text and "sft up to step 260" in page.text
    assert ("PPO" in page.headings) == (ppo_steps > 0)


def test_a_run_that_logged_nothing(tmp_path):
    with Run(tmp_path, Config(), name="x"):
        pass
    _, page = written(tmp_path)
    assert "nothing yet" in page.text and page.headings == ["Where this run came from"]


def test_what_is_shown_is_in_the_folder_and_the_page_can_be_written_again(tmp_path, capsys):
    with Run(tmp_path, Config(), name="x") as run:
        log_stages(run, 4, utility=True)
    text, _ = written(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["examples"]["answers"][0]["metric"] == "sft"
    assert report.read_report(tmp_path) == REPORT == from_json(Report, json.loads(json.dumps(to_json(REPORT))))
    assert [one.bad for one in report.read_findings(tmp_path, REPORT)] == [False]
    (tmp_path / "report.html").unlink()
    assert report.main([str(tmp_path)]) == 0
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    ids = r"#?\b[pm][0-9a-f]{10}\b"  # of Matplotlib, by chance
    assert re.sub(ids, "", again) == re.sub(ids, "", text)
    # Without report.json there is a picture of every metric.
    (tmp_path / "report.json").unlink()
    _, plain = written(tmp_path, None)
    assert plain.headings == ["sft", "reward_model", "choice", "ppo", "Where this run came from"]
    assert plain.tags.count("svg") == 3 + 3 + 2 + 8
    for broken in ("{", '{"sections": [{"gone": 1}]}', '{"gone": 1}', '{"sections": {"a": 1}}'):
        (tmp_path / "report.json").write_text(broken)
        assert report.main([str(tmp_path)]) == 2
        assert "report.json is not a report of this version" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    with pytest.raises(UserError, match="no run in"):
        report.write_report(tmp_path / "no", REPORT)
    assert report.main([str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no run in")
