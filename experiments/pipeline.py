"""The whole pipeline from one command: SFT → reward model → PPO, then the evaluation and a report.

Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155). PPO starts from the SFT epoch whose samples the reward model
scores highest (§3.5 there); where validation loss would have chosen is shown beside it.
    python experiments/pipeline.py
About 4 minutes on 2 CPU cores, then open runs/pipeline-<n>/report.html: true utility rises from 0.8 (SFT, capped by
its demonstrators' 0.9) to 2.2. The same stages on real text, where no true utility exists:
    python experiments/pipeline.py --model FOLDER --demonstrations FILE --comparisons FILE --on-bad-row=skip
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import ppo, reward_model, sft
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.setting import Setting, Source, announce, load_setting
from experiments.sft import SFT
from rlhf_jax.batches import Completions, Prompts, Tokens
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.tokens import join
from rlhf_jax.evaluate import win_rate
from rlhf_jax.log import Run, count_compilations
from rlhf_jax.models import (
    ModelCard,
    merge_lora,
    save_hf,
    save_hf_reward_model,
    save_peft,
    save_peft_reward_model,
    split_lora,
    with_lora,
)
from rlhf_jax.report import write_report
from rlhf_jax.sharding import to_host


@dataclass(frozen=True)
class Config(Source):
    """SFT, reward model and PPO, then the evaluation."""

    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)


def choose_epoch(setting: Setting, epochs: list[Any], reward_params: Any, run: Run, seed: int) -> int:
    """The SFT epoch whose samples the reward model scores highest; logs where validation loss would have chosen."""
    score = reward_model.make_scorer(setting)
    validation_loss = sft.make_validation_loss(setting)
    rows = []
    for epoch, params in enumerate(epochs):
        completions = sft.make_sampler(setting, params, seed)(setting.heldout, epoch)
        tokens = join(setting.heldout, completions, pad_id=setting.pad_id)
        rows.append({"score": score(reward_params, tokens).mean(), "val_loss": validation_loss(params)})
        run.log("choice", epoch + 1, rows[-1])
    by_score = int(np.argmax([row["score"] for row in rows]))
    by_loss = int(np.argmin([row["val_loss"] for row in rows]))
    run.say(f"PPO starts from SFT epoch {by_score + 1} (reward model); validation loss would choose {by_loss + 1}")
    return by_score


def evaluate(
    setting: Setting, start: Any, final: Any, score: Callable[[Tokens], np.ndarray], run: Run, seed: int, *, stage: str
) -> dict[str, float]:
    """The policy that `stage` made against SFT on held-out prompts, one sample each at temperature 1."""
    who = ("sft", stage)
    metrics: dict[str, float] = {}
    for name, prompts in [("", setting.heldout), ("shifted_", setting.shifted)]:
        if prompts is None:
            continue
        samples = [sft.make_sampler(setting, params, seed)(prompts, 100) for params in (start, final)]
        scores = [score(join(prompts, c, pad_id=setting.pad_id)) for c in samples]
        truths = [setting.judge(prompts, c) for c in samples] if setting.judge else None
        for one, completions, got in zip(who, samples, scores, strict=True):
            metrics[f"{name}{one}_score"] = got.mean()
            metrics[f"{name}{one}_length"] = completions.mask.sum(axis=1).mean()
        metrics[f"{name}score_win_rate"] = win_rate(scores[1], scores[0])[0]
        if truths is not None:
            for one, utility in zip(who, truths, strict=True):
                metrics[f"{name}{one}_utility"] = utility.mean()
                metrics[f"{name}{one}_utility_se"] = utility.std() / np.sqrt(len(utility))
                metrics[f"{name}{one}_utility_std"] = utility.std()
            metrics[f"{name}win_rate"], low, high = win_rate(truths[1], truths[0])
            metrics |= {f"{name}win_rate_low": low, f"{name}win_rate_high": high}
        if not name and run.first:
            write_examples(setting, prompts, dict(zip(who, samples, strict=True)), scores, truths, run)
    return {key: float(value) for key, value in metrics.items()}


def write_examples(
    setting: Setting,
    prompts: Prompts,
    samples: dict[str, Completions],
    scores: list,
    truths: list | None,
    run: Run,
) -> None:
    """The first held-out prompts with both answers, for the report."""
    texts = [setting.answers(completions)[0] for completions in samples.values()]
    with open(run.dir / "examples.jsonl", "w", encoding="utf-8") as file:
        for row, prompt in enumerate(setting.read(prompts)[:24]):
            example: dict[str, Any] = {"prompt": prompt}
            for i, who in enumerate(samples):
                example |= {who: texts[i][row], f"{who}_score": float(scores[i][row])}
                if truths is not None:
                    example[f"{who}_utility"] = float(truths[i][row])
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


def export(setting: Setting, policy: Any, card: ModelCard, run: Run) -> None:
    """Writes policy/, which transformers, vLLM and lm-evaluation-harness load."""
    whole = to_host(merge_lora(policy))
    if run.first:
        save_hf(run.dir / "policy", setting.model, whole, tokenizer=setting.tokenizer, card=card)


def export_reward_model(setting: Setting, reward_params: Any, card: ModelCard, run: Run) -> None:
    """Writes reward_model/, which transformers and vLLM load."""
    whole = to_host(merge_lora(reward_params) | {"head": unbiased(reward_params["head"])})
    if run.first:
        save_hf_reward_model(run.dir / "reward_model", setting.model, whole, tokenizer=setting.tokenizer, card=card)


def card(source: Source, algorithm: str, metrics: dict[str, float], stage: str) -> ModelCard:
    """What a stage's model was made from, and that stage's numbers."""
    data = f"{source.demonstrations or 'simulated demonstrations'}; {source.comparisons or 'simulated comparisons'}"
    told = {name: value for name, value in metrics.items() if name.startswith(stage)}
    return ModelCard(algorithm, data, source.model, told)


def export_adapters(setting: Setting, sft_params: Any, policy: Any, reward_params: Any, run: Run) -> None:
    """Where adapters were trained: writes policy_adapter/ and reward_model_adapter/, which PEFT loads over base/.

    base/ is the SFT model as it was frozen: rounded to bfloat16 or int8, if it was.
    """
    trunk, adapter = split_lora(policy)
    reward_trunk, reward_adapter = split_lora(reward_params["trunk"])
    base = (run.dir / "base").resolve()
    if adapter or reward_adapter:
        frozen = trunk if adapter else with_lora(sft_params, reward_trunk)  # which may lack the language head
        frozen = to_host(merge_lora(frozen))  # int8 as the floats that it stands for
        if run.first:
            save_hf(base, setting.model, frozen, tokenizer=setting.tokenizer, card=ModelCard("Supervised fine-tuning"))
    adapter, reward_adapter, head = to_host((adapter, reward_adapter, unbiased(reward_params["head"])))
    if adapter and run.first:
        save_peft(run.dir / "policy_adapter", setting.model, adapter, base_model=str(base))
    if reward_adapter and run.first:
        own = {"trunk": reward_adapter, "head": head}
        save_peft_reward_model(run.dir / "reward_model_adapter", setting.model, own, base_model=str(base))


def unbiased(head: Any) -> Any:
    """Without the bias that makes demonstrations score 0, for which there is no place in such folders."""
    return head | {"bias": jnp.zeros(())}


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Runs everything; returns the final metrics, which are also in the run's summary.json."""
    setting = load_setting(cfg)
    with Run(cfg.run_dir, cfg, name="pipeline", resume=cfg.resume) as run, count_compilations() as compilations:
        announce(setting, run)
        try:
            epochs = sft.train(cfg.sft, setting, run, cfg.seed)
            comparisons = setting.compare(sft.make_sampler(setting, epochs[-1], cfg.seed))
            reward_params, metrics = reward_model.train(
                cfg.reward_model, setting, comparisons, epochs[-1], run, cfg.seed
            )
            # On one trunk PPO starts where the reward model did.
            start = epochs[-1 if cfg.ppo.lora_rank else choose_epoch(setting, epochs, reward_params, run, cfg.seed)]
            policy, ppo_metrics = ppo.train(cfg.ppo, setting, start, reward_params, run, cfg.seed)
            metrics |= setting.facts | ppo_metrics
            score = partial(reward_model.make_scorer(setting), reward_params)
            metrics |= evaluate(setting, start, policy, score, run, cfg.seed, stage="ppo")
            metrics["compilations"] = compilations()
            run.summary(metrics)
            algorithm = "PPO against a Bradley-Terry reward model, minus a KL penalty to SFT"
            export(setting, policy, card(cfg, algorithm, metrics, "ppo_"), run)
            algorithm = "Bradley-Terry reward model, started from SFT"
            export_reward_model(setting, reward_params, card(cfg, algorithm, metrics, "reward_model_"), run)
            export_adapters(setting, epochs[-1], policy, reward_params, run)
        finally:
            # An interrupted run, too, can be looked at.
            if run.first:
                run.say(f"report: {write_report(run.dir)}")
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
