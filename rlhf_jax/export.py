"""A stage's result as folders that transformers, PEFT, vLLM and lm-evaluation-harness load."""

from collections.abc import Mapping

import jax.numpy as jnp

from rlhf_jax.folder import read_json
from rlhf_jax.log import Run
from rlhf_jax.models import (
    ModelCard,
    save_hf,
    save_hf_reward_model,
    save_peft,
    save_peft_reward_model,
    split_lora,
    with_lora,
)
from rlhf_jax.models.tokenizer import with_padding
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.provenance import card_facts
from rlhf_jax.sharding import to_host
from rlhf_jax.types import Params


def export_policy(
    run: Run,
    base: Pretrained,
    params: Params,
    *,
    algorithm: str,
    metrics: Mapping[str, float],
    folder: str = "policy",
) -> None:
    """Writes the policy to policy/ in the run's folder, or to another `folder` there, its adapters merged."""
    whole = to_host(params)
    if run.first:
        card = ModelCard(algorithm, None, base.name, metrics, card_facts(read_json(run.dir / "run.json")))
        save_hf(run.dir / folder, base.config, whole, tokenizer=base.tokenizer, eos_id=base.eos_id, card=card)
        run.say(f"policy: {run.dir / folder}")


def export_reward_model(
    run: Run,
    base: Pretrained,
    params: Params,
    *,
    algorithm: str,
    metrics: Mapping[str, float],
    data: str | None = None,
    name: str = "reward_model",
) -> None:
    """Writes the reward model to the folder `name` in the run's, its adapters merged."""
    whole = to_host(params)
    if run.first:
        card = ModelCard(algorithm, None, base.name, metrics, card_facts(read_json(run.dir / "run.json")))
        save_hf_reward_model(
            run.dir / name, base.config, whole, tokenizer=base.tokenizer, eos_id=base.eos_id, card=card
        )
        run.say(f"reward model: {run.dir / name}")


def export_adapters(run: Run, base: Pretrained, start: Params, policy: Params, reward_params: Params) -> None:
    """Writes trained adapters to policy_adapter/ and reward_model_adapter/, and the model that PEFT loads them over to
    base/. Without adapters nothing is written.

    base/ is the model `start` as it was frozen: rounded to bfloat16 or int8 if the frozen weights were. Each folder
    has the tokenizer, which pads as that model is used.
    """
    trunk, adapter = split_lora(policy)
    reward_trunk, reward_adapter = split_lora(reward_params["trunk"])
    folder, vocab_size = (run.dir / "base").resolve(), base.config.vocab_size
    if adapter or reward_adapter:
        frozen = trunk if adapter else with_lora(start, reward_trunk)  # which may lack the language head
        frozen = to_host(frozen)
        if run.first:
            card = ModelCard("Supervised fine-tuning", None, base.name)
            save_hf(
                folder, base.config, frozen, tokenizer=base.tokenizer, eos_id=base.eos_id,
                one_label=bool(reward_adapter), card=card,
            )  # fmt: skip
    head = reward_params["head"] | {"bias": jnp.zeros(())}  # PEFT's folders have no place for a bias
    adapter, reward_adapter, head = to_host((adapter, reward_adapter, head))
    if adapter and run.first:
        save_peft(run.dir / "policy_adapter", base.config, adapter, base_model=str(folder))
        with_padding(base.tokenizer, vocab_size, side="left").save_pretrained(run.dir / "policy_adapter")
    if reward_adapter and run.first:
        own, out = {"trunk": reward_adapter, "head": head}, run.dir / "reward_model_adapter"
        save_peft_reward_model(out, base.config, own, base_model=str(folder))
        tokenizer = with_padding(base.tokenizer, vocab_size, side="right")
        tokenizer.save_pretrained(out)
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            run.say(f"{out}: the tokenizer has no token for padding but the EOS: others must score rows one by one")
