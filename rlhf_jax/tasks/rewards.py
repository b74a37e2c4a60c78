"""The scorers of a task's answers, from folders and Python files; and the reference of its policy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.ensemble import Combination, ensemble_reward
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig
from rlhf_jax.pretrained import Layout, Pretrained, load_policy, load_reward_model
from rlhf_jax.rewards.model import check_reads, model_reward, same_tokenizer, text_model_reward
from rlhf_jax.rewards.python import Limits, is_function, parse, python_reward
from rlhf_jax.rewards.reward import Reward, check_rewards
from rlhf_jax.tasks.measure import PolicySampler, make_watch
from rlhf_jax.tasks.task import Task
from rlhf_jax.types import Params


class Ensemble(NamedTuple):
    """How several reward models become one reward."""

    combine: Combination
    lam: float
    """λ of "lower" and "uwo"."""


class Rewards(NamedTuple):
    """The scorers of answers."""

    rewards: list[Reward]
    critic: tuple[ModelConfig, Params] | None
    """The reward model that a critic may start from; None without one that reads the policy's tokens."""
    watch: Callable[[Params, int], dict[str, Any]] | None
    """watch(policy, number) -> the watched scorers' means over answers to held-out prompts."""
    watched: list[Reward]
    """The scorers that only measure."""


@contextmanager
def load_rewards(
    task: Task,
    sampler: PolicySampler,
    *,
    models: Sequence[str],
    functions: Sequence[str],
    weights: Sequence[float],
    watched: Sequence[str],
    layout: Layout,
    limits: Limits,
    failed_score: float,
    max_failed_share: float,
    say: Callable[[str], None],
    others: Sequence[Reward] = (),
    ensemble: Ensemble | None = None,
) -> Iterator[Rewards]:
    """Reward models from folders, then functions FILE.py:NAME, while the `with` lasts; processes end with it.

    `others` are rewards that are there already. `say` is told what of a model's folder is not used.
    `weights` are theirs in this order, by default 1 each; with an `ensemble` the models have one of them. `watched`
    names scorers of either kind that only measure.
    Raises UserError without any reward, and for one that cannot be read.
    """
    told = iter(weights or [1.0] * (len(models) + len(functions)))

    def opened(folder: str) -> Pretrained:
        model = load_reward_model(folder, layout)
        for note in model.notes:
            say(note)
        return model

    with ExitStack() as stack:

        def of_function(text: str, weight: float) -> Reward:
            function = python_reward(
                parse(text), limits, name=text.rpartition(":")[2], weight=weight, failed_score=failed_score,
                max_failed_share=max_failed_share,
            )  # fmt: skip
            return stack.enter_context(function)

        def of_folder(folder: str, weight: float) -> tuple[Reward, tuple[ModelConfig, Params] | None]:
            return model_scorer(
                task, opened(folder), name=Path(folder).name, weight=weight, failed_score=failed_score,
                max_failed_share=max_failed_share,
            )  # fmt: skip

        if ensemble is not None and models:
            found = [ensemble_scorer(task, {folder: opened(folder) for folder in models}, ensemble, weight=next(told))]
        else:
            found = [of_folder(folder, next(told)) for folder in models]
        rewards = [reward for reward, _ in found] + [of_function(text, next(told)) for text in functions]
        rewards += others
        check_rewards(rewards)
        scorers = [of_function(text, 1.0) if is_function(text) else of_folder(text, 1.0)[0] for text in watched]
        called = [scorer.name for scorer in scorers]
        if twice := sorted({name for name in called if called.count(name) > 1}):
            raise UserError(f"--watch: two scorers are called {twice[0]!r}: their metrics could not be told apart")
        critic = next((own for _, own in found if own is not None), None)
        yield Rewards(rewards, critic, make_watch(task, sampler, scorers) if scorers else None, scorers)


def ensemble_scorer(
    task: Task, models: Mapping[str, Pretrained], ensemble: Ensemble, *, weight: float
) -> tuple[Reward, tuple[ModelConfig, Params] | None]:
    """Reward models, by their folders, as the one reward "ensemble"; config and parameters for a critic to start from.

    Those are the first model's, or the averaged weights.
    Raises UserError for a single model, and for one with another tokenizer than the policy or another shape than the
    first.
    """
    (first, *_), (config, *_) = models, (model.config for model in models.values())
    if len(models) < 2:
        raise UserError(f"--reward-ensemble: {first} is one reward model, and an ensemble has two or more")
    for folder, model in models.items():
        if not same_tokenizer(model.tokenizer, task.base.tokenizer):
            raise UserError(
                f"--reward-ensemble: {folder} has another tokenizer than the policy; its members read tokens"
            )
        if model.config != config:
            raise UserError(f"--reward-ensemble: {folder} has another shape than {first}")
    length = task.prompts().train.tokens.shape[1] + task.max_new_tokens
    check_reads(config, name="ensemble", vocab_size=len(task.base.tokenizer), length=length)
    members = [model.params for model in models.values()]
    reward = ensemble_reward(
        config, members, combine=ensemble.combine, lam=ensemble.lam, name="ensemble", weight=weight
    )
    return reward, (config, reward.params if ensemble.combine == "weights" else members[0])


def model_scorer(
    task: Task, model: Pretrained, *, name: str, weight: float, failed_score: float, max_failed_share: float
) -> tuple[Reward, tuple[ModelConfig, Params] | None]:
    """A reward model as a reward, and its config and parameters if it reads the policy's tokens.

    One with another tokenizer reads text, on the host. Raises UserError for one that reads fewer tokens than the
    policy has, or writes.
    """
    if not same_tokenizer(model.tokenizer, task.base.tokenizer):
        return text_model_reward(
            model.config, model.params, model.tokenizer, name=name, weight=weight, batch_size=task.eval_batch_size,
            max_length=model.config.max_length, failed_score=failed_score, max_failed_share=max_failed_share,
        ), None  # fmt: skip
    length = task.prompts().train.tokens.shape[1] + task.max_new_tokens
    check_reads(model.config, name=name, vocab_size=len(task.base.tokenizer), length=length)
    return model_reward(model.config, model.params, name=name, weight=weight), (model.config, model.params)


def load_reference(path_or_name: str, base: Pretrained, layout: Layout, *, say: Callable[[str], None]) -> Params:
    """The parameters of a reference policy. `say` is told what of its folder is not used.

    Raises UserError for one of another shape or tokenizer than `base`.
    """
    reference = load_policy(path_or_name, layout)
    for note in reference.notes:
        say(note)
    if reference.config != base.config or not same_tokenizer(reference.tokenizer, base.tokenizer):
        raise UserError(f"the reference {path_or_name} has another shape or tokenizer than the model")
    return reference.params
