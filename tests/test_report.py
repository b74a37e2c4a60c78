import json
import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from rlhf_jax import report
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run

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


def written(tmp_path):
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [] and "@import" not in text and "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part[: part.index("</svg>") + 6])
    return text, page


def test_a_finished_run_in_the_controlled_world(tmp_path):
    with Run(tmp_path, Config()) as run:
        log_stages(run, 12, utility=True)
        run.summary(SUMMARY)
        example = {"prompt": "sort <b> & a", "sft": "a <script>x</script>", "ppo": "a b",
                   "sft_utility": 0.5, "ppo_utility": 2.25, "sft_score": -1.0, "ppo_score": None}  # fmt: skip
        (tmp_path / "examples.jsonl").write_text(json.dumps(example) + "\n" + '{"prompt": "torn')
        _, page = written(tmp_path)
    assert page.headings == [
        "How good the answers truly are", "Supervised fine-tuning", "Which SFT epoch", "Reward model", "PPO",
        "Reward against distance", "Is PPO healthy?", "A PPO iteration", "Answers side by side", "Final numbers",
    ]  # fmt: skip
    # The picture comes first and says the numbers.
    first = page.text[: page.text.index("Supervised fine-tuning")]
    for part in ("SFT 1.40", "PPO 2.60", "demonstrators 1.50", "92.0% of held-out prompts"):
        assert part in first
    # Gao's curve was put in, from SFT's utility on; the fit finds it again.
    assert "α = 0.9, β = 0.4, R² = 1.00" in page.text
    assert "2.000 ◀ PPO" not in page.text and "3.000 ◀ PPO starts here" in page.text
    assert "2.0000 ◀ lowest" in page.text
    # Seconds are those of iterations that did not compile.
    assert "whole0.500 s" in page.text and "rollout0.250 s" in page.text and "programs compiled2" in page.text
    assert "sort <b> & a" in page.text and "a <script>x</script>" in page.text and "torn" not in page.text
    assert "true utility 2.25" in page.text and "score -1.00" in page.text
    assert "own_number3.25" in page.text and "oddnot a number" in page.text
    assert '"note": "<b>&"' in page.text
    assert "not finished" not in page.text


def test_real_text_has_no_true_utility(tmp_path):
    accuracy = {"val_accuracy": 0.61, "val_accuracy_low": 0.58, "val_accuracy_high": 0.64, "length_baseline": 0.55}
    with Run(tmp_path, Config()) as run:
        log_stages(run, 4, utility=False)
        run.summary({f"reward_model_{name}": value for name, value in accuracy.items()})
    _, page = written(tmp_path)
    assert page.headings[0] == "Reward model" and "true utility" not in page.text
    assert "61.0%" in page.text and "pick the longer" in page.text and "55.0%" in page.text
    assert "Reward against distance" in page.headings


@pytest.mark.parametrize("ppo_steps", [0, 1, 2])
def test_an_interrupted_run_can_be_looked_at(tmp_path, ppo_steps):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config()) as run:
        log_stages(run, ppo_steps, utility=True)
        raise KeyboardInterrupt
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "st')
    _, page = written(tmp_path)
    assert "has not finished" in page.text and "sft up to step 260" in page.text
    assert ("PPO" in page.headings) == (ppo_steps > 0)


def test_a_run_that_logged_nothing(tmp_path):
    with Run(tmp_path, Config()):
        pass
    _, page = written(tmp_path)
    assert "nothing yet" in page.text and page.headings == []


def test_the_command(tmp_path, capsys):
    with pytest.raises(UserError, match="no run in"):
        report.write_report(tmp_path / "no")
    assert report.main([str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.startswith("error: there is no run in")
    with Run(tmp_path / "run", Config()):
        pass
    assert report.main([str(tmp_path / "run")]) == 0
