"""What the tests of experiments share."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import Transformer, from_language_model, save_hf, save_hf_reward_model
from rlhf_jax.tasks import simulated

SMALL_WORLD = simulated.Sizes(
    demonstrations=256, validation=64, compared=16, ranked=4, heldout_pairs=32, prompts=256, heldout=64, layers=1
)
"""Whatever is sampled or scored is 64 rows: one program."""


@pytest.fixture
def small_world(monkeypatch):
    """The controlled world with few of everything."""
    monkeypatch.setattr(simulated, "SIZES", SMALL_WORLD)


@pytest.fixture(scope="module")
def small_world_for_all():
    """The same for all tests of a file, and for what they share; reports have their pictures made and not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "SIZES", SMALL_WORLD)
        patch.setattr("rlhf_jax.figures._svg", lambda figure: "<svg></svg>")
        yield


def new_params(config):
    """A language model's parameters that nothing has trained."""
    return jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory):
    """The folder of a policy with the world's words."""
    base = simulated.World(0, sizes=SMALL_WORLD).base
    folder = tmp_path_factory.mktemp("policy")
    save_hf(folder, base.config, new_params(base.config), tokenizer=base.tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def small_reward_model(tmp_path_factory):
    """The folder of a reward model with the world's words, and a bias."""
    base = simulated.World(0, sizes=SMALL_WORLD).base
    params = from_language_model(new_params(base.config), jax.random.key(1), base.config)
    params["head"]["bias"] += 0.25
    folder = tmp_path_factory.mktemp("reward_model")
    save_hf_reward_model(folder, base.config, params, tokenizer=base.tokenizer)
    return str(folder)
