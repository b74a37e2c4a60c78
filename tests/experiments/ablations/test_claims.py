"""Claims are decided by their intervals; records keep what decides them; pages say what is no longer so."""

import calendar
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pytest

from experiments.ablations import constitution, imitation, pages, precision, records, reward_data, tails, worlds
from experiments.ablations.claims import Claim, bounds, decide, minus, of, times, verdict_words
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Cells, Column, Line, Page, Panel, variants_table
from experiments.ppo import PPO
from experiments.sft import SFT
from rlhf_jax.errors import UserError
from rlhf_jax.simulation import Annotators, Demonstrators
from rlhf_jax.tasks.simulated import Sizes, World


class Variant(NamedTuple):
    dose: float


@dataclass(frozen=True)
class Config(GridFlags):
    seeds: int = 3
    jobs: int = 0
    common: str = "none"


def one(cfg, prepared, seed, variant, run):
    return {"y": variant.dose * (seed + 1), "curve": [1.0, 2.0], "none": np.nan}


def present(cfg, cells):
    table = variants_table(cells, ["dose"], [Column("result", "y")])
    return Page([table], [Panel("A panel", "x", "y", [Line("line", np.arange(2.0), np.arange(2.0))])])


CLAIMS = (
    Claim("more is more", "A 2020", "twice", minus(of("y", dose=2.0), of("y", dose=1.0)), "of y", above=0.0),
    Claim("more is less", "B 2021", "half", minus(of("y", dose=2.0), of("y", dose=1.0)), below=-1.0),
)


def grid(**flags):
    return run_grid(Config(**flags), "test_claims", [Variant(1.0), Variant(2.0)], one, present)


CELLS = Cells(
    (0, 1, 2), (Variant(1.0), Variant(2.0)),
    {(seed, Variant(dose)): {"y": dose * (seed + 1)} for seed in range(3) for dose in (1.0, 2.0)}, {},
)  # fmt: skip


@pytest.mark.parametrize(
    ("bound", "stands"),
    [
        # 1, 2, 3: their mean is 2, and half of the interval is 4.3027 · 1/√3 = 2.4841.
        ({"above": -0.5}, True),
        ({"above": 0.0}, None),
        ({"above": 4.6}, False),
        ({"below": 4.5}, True),
        ({"below": 4.0}, None),
        ({"below": -0.5}, False),
        ({"above": -1.0, "below": 5.0}, True),
        ({"above": -1.0, "below": 4.0}, None),
    ],
)
def test_a_claim_stands_where_its_whole_interval_does(bound, stands):
    verdict = decide(Claim("c", "s", "p", of("y", dose=1.0), **bound), CELLS)
    assert verdict.seeds == 3 and verdict.stands is stands
    np.testing.assert_allclose([verdict.mean, verdict.half], [2.0, 2.484138], rtol=1e-6)


def test_numbers_of_cells():
    assert minus(of("y", dose=2.0), of("y", dose=1.0))(CELLS) == {0: 1.0, 1: 2.0, 2: 3.0}
    assert times(0.5, of("y", dose=2.0))(CELLS) == {0: 1.0, 1: 2.0, 2: 3.0}
    claim = Claim("c", "s", "p", of("y", dose=3.0), above=0.0)
    assert decide(claim, CELLS) is None and verdict_words(claim, None) == ("not made", "")
    alone = CELLS._replace(seeds=(1,))
    claim = Claim("c", "s", "p", of("y", dose=1.0), "nats", above=1.0, below=3.0)
    assert verdict_words(claim, decide(claim, alone)) == ("2.00 (one seed) nats", "not decided")
    assert bounds(claim) == "above 1 and below 3"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A grid whose results are published beside a README of its own."""
    monkeypatch.setattr(sys, "argv", ["test_claims.py", "--seeds", "3"])
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "README", tmp_path / "README.md")
    monkeypatch.setattr(pages, "module_of", lambda name: sys.modules[__name__])
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}old\n{pages.END}after\n")
    (tmp_path / "other.json").write_text("[1]")
    grid(run_dir=str(tmp_path / "run"), publish=True)
    return tmp_path


def test_a_published_page_says_what_was_found_and_how_it_was_made(published):
    text = (published / "test_claims.md").read_text(encoding="utf-8")
    assert text.startswith("# Claims are decided by their intervals;")
    assert "| more is more | A 2020: twice | 2.00 ± 2.48 of y | above 0 | not decided |" in text
    assert "| more is less | B 2021: half | 2.00 ± 2.48 | below -1 | no |" in text
    assert "Written by `python experiments/ablations/test_claims.py --seeds 3`" in text and "commit" in text
    assert "![A panel](test_claims.svg)" in text and (published / "test_claims.svg").exists()
    record = json.loads((published / "test_claims.json").read_text())
    assert {cell["values"]["y"] for cell in record["cells"]} == {1.0, 2.0, 3.0, 4.0, 6.0}
    assert all(set(cell["values"]) == {"y", "none"} and cell["values"]["none"] is None for cell in record["cells"])
    assert "rlhf_jax/errors.py" in record["files"] and "experiments/ablations/grid.py" in record["files"]
    assert records.changed_since(record) == []
    cells = records.cells_of(record, sys.modules[__name__])
    assert cells.by_seed(Variant(2.0), "y") == {0: 2.0, 1: 4.0, 2: 6.0}


def test_pages_write_readmes_table_and_check_what_is_stored(published, capsys, monkeypatch):
    with pytest.raises(SystemExit, match=r"README\.md: its table of claims is another one"):
        pages.main(pages.Config(check=True))
    pages.main(pages.Config())
    readme = (published / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    row = "| more is more | A 2020 | 2.00 ± 2.48 of y | not decided |"
    assert f"{row} [test_claims.py](experiments/results/test_claims.md) |" in readme
    pages.main(pages.Config(check=True))
    assert "3 seeds; of this code" in capsys.readouterr().out
    # A number that is another one, and a claim that asks for less.
    record = json.loads((published / "test_claims.json").read_text())
    for cell in record["cells"]:
        cell["values"]["y"] = 100.0 * cell["variant"] + 0.1 * cell["seed"]
    record["files"] = {"rlhf_jax/errors.py": "another", "gone.py": "x"}
    (published / "test_claims.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="'more is more' is not stored with this verdict: True"):
        pages.main(pages.Config(check=True))
    assert "2 of 2 files have changed since: rlhf_jax/errors.py, gone.py" in capsys.readouterr().out
    monkeypatch.setattr(sys.modules[__name__], "CLAIMS", CLAIMS[1:])
    with pytest.raises(SystemExit, match="'more is more' is stored, and no claim any more"):
        pages.main(pages.Config(check=True))


def test_a_citation_that_is_put_right_reaches_the_page_without_new_numbers(published, monkeypatch):
    pages.main(pages.Config())
    page = published / "test_claims.md"
    before = page.read_text(encoding="utf-8")
    again = (CLAIMS[0]._replace(source="A 2019", paper="three times"), *CLAIMS[1:])
    monkeypatch.setattr(sys.modules[__name__], "CLAIMS", again)
    with pytest.raises(SystemExit, match=r"test_claims\.md: its beginning is another one; pages\.py writes it"):
        pages.main(pages.Config(check=True))
    pages.main(pages.Config())
    pages.main(pages.Config(check=True))
    assert page.read_text(encoding="utf-8") == before.replace("A 2020: twice", "A 2019: three times") != before


def test_what_leaves_a_claim_out_is_not_published(published):
    """The page that was there stays."""
    before = (published / "test_claims.md").read_bytes()
    with pytest.raises(UserError, match="test_claims is not published: no cells were made that decide 'more is more'"):
        run_grid(
            Config(run_dir=str(published / "part"), publish=True), "test_claims", [Variant(1.0)], one, present
        )  # fmt: skip
    assert (published / "test_claims.md").read_bytes() == before


@pytest.mark.parametrize("readme", ["no marks", pages.BEGIN, pages.BEGIN * 2 + pages.END, pages.END])
def test_a_readme_without_its_marks_is_left_alone(published, readme):
    (published / "README.md").write_text(readme)
    with pytest.raises(UserError, match="the marks of its table of claims"):
        pages.main(pages.Config())
    assert (published / "README.md").read_text() == readme


def test_minutes_are_those_of_sessions_that_ended_and_of_this_one(monkeypatch):
    """Whatever the zone of the machine is."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    monkeypatch.setattr(records.time, "time", lambda: calendar.timegm((2026, 7, 2, 10, 30, 0)))
    ended = {"start": "2026-07-01T08:00:00Z", "end": "2026-07-01T08:12:00Z"}
    killed, now = {"start": "2026-07-01T09:00:00Z", "end": None}, {"start": "2026-07-02T10:00:00Z", "end": None}
    assert records.minutes([ended, killed, now]) == 42.0
    assert records.minutes([ended]) == 12.0
    monkeypatch.undo()
    time.tzset()


def test_an_ablation_of_the_first_world_is_not_asked_about_the_second():
    with pytest.raises(UserError, match="--setting errands is not used here"):
        constitution.main(constitution.Config(setting="errands"))
    with pytest.raises(UserError, match="--quick is not used here"):
        precision.main(precision.Config(quick=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (lambda: imitation.Config(counts=(1000, 64_000)), "--counts are from 1 to 32000"),
        (lambda: reward_data.Config(sizes=("16x100",)), "'16x100' is not within 2x1 and the world's 8x12000"),
        (lambda: reward_data.Config(sizes=("2-100",)), "is not ANSWERSxPROMPTS"),
        (lambda: tails.Config(errors=("t",)), "'t' is neither normal nor tN"),
        (lambda: tails.Config(n=8), "n is 8"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_trained(flags, message):
    with pytest.raises(UserError, match=message):
        flags()


def test_what_is_published_here_is_what_its_numbers_say():
    """README's table and each stored verdict, of the checkout."""
    assert pages.differences() == []


def test_code_is_what_it_does(tmp_path):
    file = tmp_path / "x.py"
    hashes = []
    same = '"""One."""\nx = 1\n', '"""Two."""\n\n# a note\nx  =  1\n"""Of x."""\n'
    for number, text in enumerate((*same, '"""Two."""\nx = 2\n')):
        file.write_text(text)
        os.utime(file, ns=(number, number))
        hashes.append(records.code_hash(file))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_quick_run_is_short_and_decides_nothing():
    @dataclass(frozen=True)
    class Flags(GridFlags):
        sft: SFT = field(default_factory=lambda: SFT(steps=2500))
        ppo: PPO = field(default_factory=lambda: PPO(steps=120))

    hurried = Flags(quick=True).hurried()
    assert (hurried.seeds, hurried.sft.steps, hurried.ppo.steps) == (1, 200, 6)
    with pytest.raises(UserError, match="--quick decides nothing"):
        Flags(quick=True, publish=True)


def test_what_another_file_makes_or_the_same_one_after_a_change_is_made_again(tmp_path):
    cfg, world = Config(common=str(tmp_path / "common")), World(0, sizes=worlds.QUICK)

    def kept(file, code):
        (tmp_path / file).write_text(code)
        found: dict = {}
        exec(compile(code, str(tmp_path / file), "exec"), found)
        return worlds.kept(cfg, world, "x", 0, {}, found["make"])

    assert kept("a.py", "def make(): return 1") == kept("a.py", "def make(): return 1  # once") == 1
    assert kept("a.py", "def make(): return 2") == 2 and kept("b.py", "def make(): return 3") == 3


def test_what_is_common_is_made_once(tmp_path):
    """Again for other flags, people, seeds and worlds; and what the world draws next is the same."""
    small = Sizes(8, 8, 4, 2, 4, 8, 8)
    made, cfg = [], Config(common=str(tmp_path / "common"))

    def got(seed=0, sizes=small, **flags):
        world = World(seed, sizes=sizes)

        def make():
            made.append(seed)
            return {"draw": world.rng.random(), "array": np.arange(3)}

        return worlds.kept(cfg, world, "x", seed, flags, make), world.rng.random()

    first, following = got(sft=SFT())
    again, after = got(sft=SFT())
    assert first["draw"] == again["draw"] and following == after and made == [0]
    got(seed=1, sft=SFT())
    got(sft=SFT(steps=3))
    got(sft=SFT(), demonstrators=Demonstrators(error=0.1))
    got(sft=SFT(), annotators=Annotators(noise=0.0, length_bias=1.0))
    got(sft=SFT(), sizes=small._replace(prompts=9))
    assert made == [0, 1, 0, 0, 0, 0] and len(list((tmp_path / "common").iterdir())) == 6
    cfg = replace(cfg, common="none")
    got(sft=SFT())
    assert len(made) == 7


def test_a_record_keeps_the_curves_that_decide():
    values = {"number": 1.23456789, "nothing": None, "nats": [1.23456789, None], "drawn": [1.0]}
    kept = {"number": 1.23457, "nothing": None, "nats": [1.23457, None]}
    assert records.kept_values(values, ("nats",)) == kept
