"""The alignment tax: PPO forgets what its prompts do not touch, and demonstrations in its loss give it back.

Ouyang et al. 2022, §4.2 and app. E.6 (https://arxiv.org/abs/2203.02155): PPO loses on public NLP tasks; PPO-ptx, whose
loss has that of the text learned before, loses less; a larger β does not help as well, for it costs more reward. Here
one kind of prompt, told by its second word, is left out of the comparisons and of PPO's prompts; SFT has learned it.
The tax is the fall of right answers to that kind among the most likely ones, and the rise of the loss on held-out
demonstrations. Of sampled answers SFT gets as many wrong as its demonstrators do: PPO mends that, whatever it forgets.
The loss may rise without harm, where a policy drops bad manners of its demonstrators.
    python experiments/ablations/forgetting.py
Each seed has a world, an SFT policy and a reward model of its own. Expect about 25 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import ppo, reward_model
from experiments.ablations.claims import Claim, Numbers, minus, of
from experiments.ablations.grid import GridFlags, only_words, run_grid, unused
from experiments.ablations.grid_results import Cells, Column, Line, Page, Panel, points_line, variants_table
from experiments.ablations.worlds import AfterSFT, after_sft, kept
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from experiments.stages import policy_sampler
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import Transformer
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.scoring import mean_in_batches, sft_objective
from rlhf_jax.tasks.measure import PolicySampler, make_reward_scorer
from rlhf_jax.tasks.task import PromptSets
from rlhf_jax.types import Params

COLUMNS = (
    Column("KL, nats", "kl", 1), Column("proxy", "score"), Column("true utility", "utility"),
    Column("of the kind left out", "left_utility"), Column("SFT's", "sft_left_utility"),
    Column("right answers", "right", 3), Column("of the kind left out", "left_right", 3),
    Column("SFT's", "sft_left_right", 3), Column("most likely ones", "left_skill", 3),
    Column("SFT's", "sft_left_skill", 3), Column("loss on demonstrations", "loss", 3),
    Column("of the kind left out", "left_loss", 3), Column("SFT's", "sft_left_loss", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO that leaves out a kind of prompt, with demonstrations in its loss and with larger β, several seeds."""

    ptx_coefs: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Weights of the loss of demonstrations, at the β of --ppo.beta."""
    betas: tuple[float, ...] = (0.1, 0.2, 0.5)
    """Larger weights of the KL term, without demonstrations."""
    kind: int = -1
    """The kind that is left out: its place in the alphabetical order of second words."""
    most: int = 1024
    """Prompts of that kind that it is measured on."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(beta=0.05))

    def __post_init__(self) -> None:
        """Raises UserError for a β that is not larger than that of PPO."""
        at_least(self, most=1)
        if min(self.betas, default=np.inf) <= self.ppo.beta:
            raise UserError(f"--betas are above --ppo.beta, which is {self.ppo.beta:g}")
        unused(self.ppo, "ppo", "target_kl", "ptx_coef")
        super().__post_init__()


class Variant(NamedTuple):
    """The weights of the KL term and of the demonstrations' loss."""

    beta: float
    ptx: float


class Prepared(NamedTuple):
    """A seed's SFT, prompts without a kind and, as `shifted`, of that kind, a reward model, and SFT's numbers."""

    begun: AfterSFT
    sets: PromptSets
    likely: PolicySampler
    """The sampler of a policy's most likely answers."""
    validation: dict[str, Tokens]
    rewards: Params
    reward: Reward
    facts: dict[str, float]


def kind_of(text: str) -> str:
    """The kind of a prompt, with or without an answer after it: its second word, special tokens aside."""
    return [word for word in text.split() if not word.startswith("<")][1]


def without(rows: Any, kinds: Sequence[str], kind: str) -> tuple[Any, Any]:
    """(others, those of the kind) of prompts or tokens, whose kinds are in the order of their rows."""
    left = np.array(kinds) == kind
    return take(rows, np.flatnonzero(~left)), take(rows, np.flatnonzero(left))


def prepare(cfg: Config, seed: int, run: Run) -> Prepared:
    """SFT of all kinds, and a reward model of all but one. Raises UserError for a kind that is none."""
    begun = after_sft(cfg, seed, run)
    task, base, found, sets = begun.task, begun.base, begun.comparisons, begun.task.prompts()
    kinds = [kind_of(str(row.prompt)) for row in sets.rows]
    if not -len(set(kinds)) <= cfg.kind < len(set(kinds)):
        raise UserError(f"--kind is {cfg.kind}; there are {len(set(kinds))} kinds")
    kind = sorted(set(kinds))[cfg.kind]
    (train, left), (heldout, _) = (
        without(some, [kinds[row] for row in some.row], kind) for some in (sets.train, sets.heldout)
    )
    sets = sets._replace(train=train, heldout=heldout, shifted=take(left, slice(cfg.most)))
    asked = base.tokenizer.batch_decode([list(ranking.prompt) for ranking in found.train])
    some = [ranking for ranking, text in zip(found.train, asked, strict=True) if kind_of(text) != kind]
    tokens = task.demonstrations().validation
    texts = base.tokenizer.batch_decode(
        [ids[real > 0] for ids, real in zip(tokens.inputs, tokens.segment_ids, strict=True)]
    )
    validation = {"": tokens, "left_": without(tokens, [kind_of(text) for text in texts], kind)[1]}

    def make() -> Params:
        return reward_model.train(
            cfg.reward_model, base, found._replace(train=some), run, seed, eval_batch_size=task.eval_batch_size,
            zero=tokens,
        )[0]  # fmt: skip

    flags = {"sft": cfg.sft, "reward_model": cfg.reward_model, "kind": kind}
    rewards = kept(cfg, task, "reward_model_without", seed, flags, make)
    reward = model_reward(base.config, rewards, name="reward_model", weight=1.0)
    prepared = Prepared(begun, sets, policy_sampler(cfg, task, temperature=0.0), validation, rewards, reward, {})
    return prepared._replace(facts={f"sft_{name}": x for name, x in measured(cfg, prepared, base.params, 100).items()})


def measured(cfg: Config, prepared: Prepared, policy: Params, number: int) -> dict[str, float]:
    """Score, true utility, share of right answers and loss on demonstrations; of the kind left out as left_…

    `left_skill` is the share of right answers among the most likely ones.
    """
    (task, sampler, base, _), sets = prepared.begun, prepared.sets
    score, right = (
        make_reward_scorer(task, [reward], no_end)
        for reward, no_end in ((prepared.reward, cfg.ppo.no_end_score), (task.checker(), None))
    )
    loss = mean_in_batches(
        lambda params, tokens: sft_objective(Transformer(base.config), params, tokens)[0], task.eval_batch_size
    )
    found: dict[str, float] = {}
    asked: dict[str, Prompts] = {"": sets.heldout, "left_": sets.shifted or sets.heldout}
    for name, prompts in asked.items():
        answers = sampler(policy, prompts, number)
        found |= {
            f"{name}score": score(prompts, answers).mean(), f"{name}utility": task.judge(prompts, answers).mean(),
            f"{name}right": right(prompts, answers).mean(), f"{name}loss": loss(policy, prepared.validation[name]),
        }  # fmt: skip
    return found | {"left_skill": right(prompts, prepared.likely(policy, prompts, number)).mean()}


def one(cfg: Config, prepared: Prepared, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """PPO on the other kinds: where it ends."""
    task, base = prepared.begun.task, prepared.begun.base
    policy, _ = ppo.train(
        replace(cfg.ppo, beta=variant.beta, ptx_coef=variant.ptx), base, prepared.sets, [prepared.reward], run, seed,
        max_new_tokens=task.max_new_tokens, critic=(base.config, prepared.rewards), judge=task.judge,
        demonstrations=task.demonstrations().train if variant.ptx else None,
    )  # fmt: skip
    kl = np.mean([row["kl_k1"] for row in read_metrics(run.dir)["ppo"]][-5:])
    return prepared.facts | measured(cfg, prepared, policy, 101) | {"kl": kl}


PLAIN, MIXED = {"beta": 0.05, "ptx": 0.0}, {"beta": 0.05, "ptx": 1.0}


def taxed(name: str) -> Numbers:
    """The change of a number from SFT to PPO without demonstrations."""
    return minus(of(name, **PLAIN), of(f"sft_{name}", **PLAIN))


def mixed(number: Callable[[dict[str, Any], list[dict[str, Any]]], float], over: Callable[..., Any]) -> Numbers:
    """number(values, plain) of each cell with demonstrations and a seed's cells without, `over` all weights."""

    def numbers(cells: Cells) -> dict[int, float]:
        found = {}
        for seed in cells.seeds:
            made = {
                one: dict(cells.values[seed, one]) for one in sorted(cells.finished()) if (seed, one) in cells.values
            }
            plain = [values for one, values in made.items() if not one.ptx]
            each = [number(values, plain) for one, values in made.items() if one.ptx]
            if plain and each:
                found[seed] = float(over(each))
        return found

    return numbers


def beside_beta(name: str) -> Callable[[dict[str, Any], list[dict[str, Any]]], float]:
    """A number above that of PPO without demonstrations, at the β that gives the same proxy.

    Between two β, and between the largest of them and SFT, where β has no end, it is on a straight line.
    """

    def number(values: dict[str, Any], plain: list[dict[str, Any]]) -> float:
        points = [(values["sft_score"], values[f"sft_{name}"]), *((some["score"], some[name]) for some in plain)]
        scores, found = np.array(sorted(points)).T
        return values[name] - float(np.interp(values["score"], scores, found))

    return number


def both(values: dict[str, Any], plain: list[dict[str, Any]]) -> float:
    """The lesser of two shares above their bounds: half of the loss's rise undone, nine tenths of the gain kept.

    It is NaN where the loss did not rise, or where nothing was gained.
    """
    least = plain[0]  # of the least β
    if least["left_loss"] <= values["sft_left_loss"] or least["score"] <= values["sft_score"]:
        return float("nan")
    undone = (least["left_loss"] - values["left_loss"]) / (least["left_loss"] - values["sft_left_loss"])
    kept_share = (values["score"] - values["sft_score"]) / (least["score"] - values["sft_score"])
    return min(undone - 0.5, kept_share - 0.9)


def first(numbers: Sequence[float]) -> float:
    """The number of the least weight."""
    return numbers[0]


CLAIMS = (
    Claim("PPO pays an alignment tax: right answers to a kind left out become fewer", "Ouyang et al. 2022, §4.2",
          "it loses on SQuADv2, DROP, HellaSwag and translation", taxed("left_skill"),
          "of the most likely answers above SFT's", below=0.0, digits=3),
    Claim("in its plainest form: the loss on demonstrations of that kind rises", "Ouyang et al. 2022, §4.2",
          "what was learned before is unlearned", taxed("left_loss"), "nats a token above SFT's", above=0.0),
    Claim("demonstrations in the loss give right answers back", "Ouyang et al. 2022, fig. 29 and 33",
          "PPO-ptx mitigates it on all, and passes GPT-3 on HellaSwag",
          minus(of("left_skill", **MIXED), of("left_skill", **PLAIN)), "of the most likely answers above PPO's, ptx 1",
          above=0.0, digits=3),
    Claim("their least weight gives much back and costs little reward", "Ouyang et al. 2022, fig. 33",
          "much better on DROP and SQuADv2, and little lost of the validation reward", mixed(both, first),
          "above both, half of the loss's rise undone and nine tenths of the proxy's gain kept", above=0.0),
    Claim("a larger β does not give back as much of the loss at equal reward", "Ouyang et al. 2022, fig. 34",
          "at 100 times β it is not undone, and reward falls", mixed(beside_beta("left_loss"), np.mean),
          "nats a token above those at the β of the same proxy, mean of all weights", below=0.0),
    Claim("nor as many right answers", "Ouyang et al. 2022, fig. 34", "DROP and SQuADv2 do not recover",
          mixed(beside_beta("left_skill"), np.mean),
          "of the most likely answers above those at the β of the same proxy, mean of all weights", above=0.0,
          digits=3),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a variant; right answers and loss of the kind left out against the proxy."""
    found = sorted(cells.finished())
    ways = {
        "larger β": [one for one in found if not one.ptx],
        "demonstrations": [one for one in found if one.ptx or one.beta == cfg.ppo.beta],
    }
    panels = []
    labels = {
        "left_skill": "right ones of the most likely answers",
        "left_loss": "loss on demonstrations, nats a token",
    }
    for name, label in labels.items():
        lines = [points_line(cells, some, "score", name, way) for way, some in ways.items() if some]
        x, y = (cells.numbers(found[0], f"sft_{end}").mean(keepdims=True) for end in ("score", name))
        panels.append(Panel("The kind left out", "proxy", label, [*lines, Line("SFT", x, y, style="o", color="k")]))
    return Page([variants_table(cells, ["β", "ptx"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    only_words(cfg)  # an errand of the kind may come second or third in any prompt
    beta, some = cfg.ppo.beta, slice(-1 if cfg.quick else 0, None)
    variants = [
        Variant(beta, 0.0),
        *(Variant(beta, x) for x in cfg.ptx_coefs[some]),
        *(Variant(x, 0.0) for x in cfg.betas[some]),
    ]
    return run_grid(cfg, "forgetting", variants, one, present, prepare=prepare, axes=("ptx_coefs", "betas"))


if __name__ == "__main__":
    run_main(main, Config)
