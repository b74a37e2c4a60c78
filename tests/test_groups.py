"""Groups of answers: which are taken, what is measured, what an update is."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax.training.train_state import TrainState
from numpy.testing import assert_allclose

from experiments import cispo, dapo, dr_grpo, grpo, gspo, rloo
from rlhf_jax import group_loop, groups, losses
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.data import tokens as data_tokens
from rlhf_jax.data.tokens import bucket, narrowed, take
from rlhf_jax.drawn import DrawnPrompts
from rlhf_jax.errors import UserError
from rlhf_jax.group_loop import prompt_draw
from rlhf_jax.groups import (
    Algorithm,
    Answers,
    Frozen,
    Numbers,
    learn,
)
from rlhf_jax.loop import Loop
from rlhf_jax.masking import constant_mean, sequence_mean
from rlhf_jax.models import Transformer
from rlhf_jax.rewards.reward import HostScores, Reward
from rlhf_jax.sampling.layout import sampling_copies
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.scored_groups import Scored, all_rounds, group_metrics, has_signal, rows_with_signal
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params
from rlhf_jax.tasks.simulated import Sizes, World
from rlhf_jax.tasks.task import PromptRow
from rlhf_jax.train import make_state

RNG = np.random.default_rng(0)
NUMBERS = Numbers(
    prompts=4, group_size=4, epochs=1, minibatches=1, accumulate=1, temperature=1.0, max_new_tokens=6, slots=16
)  # fmt: skip
SIZES = Sizes(demonstrations=8, validation=4, compared=4, heldout_pairs=4, prompts=16, heldout=4, ranked=2, layers=1)
B, T = 16, 9
MASK = np.arange(T)[None] < RNG.integers(1, T, (B, 1))


def scored(scores, group_size=2, start=0):
    count = len(scores)
    rows = np.repeat(np.arange(count // group_size), group_size) + start
    prompts = Prompts(np.zeros((count, 1), np.int32), np.ones((count, 1), bool), rows)
    ids = np.arange(count)[:, None] + np.arange(3)[None]
    answers = numpy_completions(ids, np.ones((count, 3), bool), np.zeros((count, 3), np.float32))
    return Scored(
        prompts, answers, np.float32(scores), {"a": np.float32(scores)}, {"a": HostScores(np.float64(scores), 1)}
    )


def test_a_group_has_a_signal_when_its_scores_differ():
    assert has_signal(np.array([1.0, 1, 0, 1, 0, 0, 0.1, 0.1]), 2).tolist() == [False, True, False, False]


def test_groups_with_a_signal_come_first_and_all_that_was_asked_is_counted():
    whole = all_rounds([scored([1, 1, 0, 1]), scored([0, 0, 1, 0], start=2)])
    assert whole.prompts.row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert whole.scores.tolist() == [1, 1, 0, 1, 0, 0, 1, 0] == whole.each["a"].tolist()
    assert whole.found["a"].errors == 2 and len(whole.found["a"].scores) == 8
    rows, signal = rows_with_signal(whole.scores, prompts=3, group_size=2)
    assert rows.tolist() == [2, 3, 6, 7, 0, 1] and signal.tolist() == [True] * 4 + [False] * 2


def test_all_prompts_come_before_one_comes_again():
    draw = prompt_draw(20, 4, [0, 1])
    epochs = [np.concatenate([draw(5 * epoch + step) for step in range(5)]).tolist() for epoch in range(2)]
    assert [sorted(some) for some in epochs] == [list(range(20))] * 2 and epochs[0] != epochs[1]
    assert prompt_draw(20, 4, [0, 1])(7).tolist() == draw(7).tolist() != prompt_draw(20, 4, [0, 2])(7).tolist()
    counts = np.bincount(np.concatenate([prompt_draw(3, 7, [0])(step) for step in range(3)]), minlength=3)
    assert counts.tolist() == [7, 7, 7]
    assert prompt_draw(3, 6, [0])(1).tolist() == [0, 1, 2] * 2


def test_an_iterations_prompts_are_as_wide_as_its_longest_needs():
    mask = np.arange(128)[None] >= 128 - np.array([3, 120, 40, 17])[:, None]
    prompts = Prompts(np.where(mask, 7, 0).astype(np.int32), mask, np.arange(4))
    steps = [[0, 3], [0, 2], [2, 3], [1, 0]]
    drawn = DrawnPrompts(prompts, (), lambda step, _: np.array(steps[step]), None, 2, 0, object.__new__(Loop))
    asked = [narrowed(drawn.asked(step)[0]) for step in range(4)]
    assert [some.mask.shape[1] for some in asked] == [bucket(17), 64, 64, 128]
    assert [some.row.tolist() for some in asked] == steps
    found = narrowed(prompts, 64)
    assert found.mask.shape == (4, 64) and found.mask[[0, 2]].sum(axis=1).tolist() == [3, 40]
    assert (found.tokens[found.mask] == 7).all()


def test_rounds_ask_the_next_prompts_and_each_answer_is_scored_with_its_own(monkeypatch):
    mask = np.arange(64)[None] >= 64 - np.array([3, 3, 60, 3, 3, 3])[:, None]
    asked = Prompts(np.ones((6, 64), np.int32), mask, np.arange(6))
    drawn = []

    def draw(number):
        drawn.append(number)
        return take(asked, slice(2 * number, 2 * number + 2)), rows

    rows = [PromptRow(f"p{n}", {}) for n in range(6)]

    def sample(policy, frozen, prompts, key):
        numbers = np.asarray(prompts.row, np.int32).repeat(3)[:, None]
        return numpy_completions(numbers, np.ones((6, 1), bool), np.zeros((6, 1), np.float32))

    def texts(base, rows, prompts, completions):
        return [rows[n].prompt for n in prompts.row], [f"p{n}" for n in completions.tokens[:, 0]], {}

    def on_texts(prompts, completions, columns, part=None):
        assert prompts == completions
        numbers = [int(prompt[1:]) for prompt in prompts]  # the first two groups have no signal
        return HostScores(np.array([0.0 if number < 2 else place % 3 for place, number in enumerate(numbers)]))

    monkeypatch.setattr(group_loop, "as_texts", texts)
    numbers, reward = NUMBERS._replace(prompts=2, group_size=3), Reward("own", 1.0, on_texts=on_texts)
    state = TrainState.create(apply_fn=None, params={}, tx=optax.identity())
    programs = group_loop.Programs(sample, lambda models, tokens: {}, None, None)
    found = group_loop.answer(
        programs, numbers, World(0, sizes=SIZES).base, draw, 3, [reward], state,
        Frozen({}, {}, {}), jax.random.key(0),
    )  # fmt: skip
    assert drawn == [0, 1]  # as many as are needed
    assert found.prompts.row.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.prompts.mask.sum(axis=1).tolist() == [3] * 6 + [60] * 3 + [3] * 3
    assert found.scores.tolist() == [0] * 6 + [0, 1, 2] * 2


def test_metrics_by_hand():
    some = scored([1, 0, 0, 0, 1, 1])
    mask = np.arange(3)[None] < np.array([1, 2, 3, 3, 1, 1])[:, None]
    some = some._replace(completions=some.completions._replace(mask=mask))

    metrics = group_metrics(some, np.array([True] * 3 + [False] * 3), 2)
    assert metrics["silent"] == pytest.approx(2 / 3) and metrics["ended"] == 0.5
    assert metrics["pass@1"] == pytest.approx(3 / 6) and metrics["pass@2"] == pytest.approx(2 / 3)
    assert metrics["length_right"] == 1.0 and metrics["length_wrong"] == pytest.approx(8 / 3)
    # Where the checker does not apply to an answer, its group says nothing of pass@k.
    some.each["a"][1] = np.nan
    metrics = group_metrics(some, np.ones(6, bool), 2)
    assert metrics["pass@1"] == metrics["pass@2"] == 0.5 and metrics["length_wrong"] == 3.0
    # A score that is no verdict says nothing of right and wrong.
    assert "pass@1" not in group_metrics(scored([0.5, 0, 1, 1]), np.ones(4, bool), 2)


def answers(advantages):
    real = RNG.normal
    tokens = Tokens(*(np.zeros((B, T), np.int32),) * 2, MASK, *(np.zeros((B, T), np.int32),) * 2)
    old, ref, sampled = (np.float32(-1 - 0.3 * np.abs(real(size=(B, T)))) for _ in range(3))
    return Answers(tokens, old, ref, sampled, advantages)


BOTH, HIGHER = {"clip_eps_low": 0.2, "clip_eps_high": 0.2}, {"clip_eps_low": 0.2, "clip_eps_high": 0.28}


def grpo_oracle(numbers):
    """The oracle of GRPO's loss with these numbers; `given` are log-probabilities, old ones, advantages, mask."""

    def loss(*given, ref):
        return oracles.grpo_loss(given[0], given[1], ref, *given[2:], **numbers)

    return loss


EQUATIONS = {
    grpo: (grpo.GRPO(), True, grpo_oracle({"beta": 0.04, "reduce": sequence_mean, **BOTH})),
    dr_grpo: (
        dr_grpo.DrGRPO(), False, grpo_oracle({"beta": 0.0, "reduce": partial(constant_mean, length=6), **BOTH}),
    ),
    dapo: (dapo.DAPO(), True, grpo_oracle({"beta": 0.0, **HIGHER})),
    gspo: (gspo.GSPO(**HIGHER), True, lambda *given, ref: oracles.gspo_loss(*given, **HIGHER)),
    cispo: (
        cispo.CISPO(), True, lambda *given, ref: oracles.cispo_loss(*given, clip_eps_low=1.0, clip_eps_high=4.0),
    ),
    rloo: (
        rloo.RLOO(), None,
        lambda *given, ref: oracles.reinforce_loss(given[0], *given[2:], reduce=partial(constant_mean, length=1)),
    ),
}  # fmt: skip
"""By experiment: flags, whether advantages are over the standard deviation (None: leave one out), the loss."""


@pytest.mark.parametrize("module", EQUATIONS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_each_algorithm_is_its_papers_equations(module):
    cfg, scaled, equation = EQUATIONS[module]
    algorithm = module.algorithm(cfg, NUMBERS)
    scores = RNG.normal(size=B)
    if scaled is None:
        expected = oracles.leave_one_out_advantages(scores, group_size=4)
    else:
        expected = oracles.group_advantages(scores, group_size=4, scale_by_std=scaled)
    assert_allclose(algorithm.advantages(jnp.float32(scores)), expected, rtol=2e-4, atol=1e-5)
    batch = answers(np.float32(expected))
    logprobs = np.float32(batch.old_logprobs + 0.3 * RNG.normal(size=(B, T)))
    loss, _ = algorithm.loss(jnp.asarray(logprobs), jax.tree.map(jnp.asarray, batch))
    expected_loss = equation(logprobs, batch.old_logprobs, batch.advantages, MASK, ref=batch.ref_logprobs)
    assert_allclose(loss, expected_loss, rtol=1e-4, atol=1e-6)


def test_a_sampler_that_computes_otherwise_is_weighed():
    batch = answers(np.float32(RNG.normal(size=B)))
    logprobs = np.float32(batch.old_logprobs + 0.1)
    given = (logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, MASK)
    weights = np.minimum(np.exp(np.float64(batch.old_logprobs - batch.sampler_logprobs)), 1.1)
    numbers = {"beta": 0.04, "reduce": sequence_mean, **BOTH}
    loss, _ = grpo.algorithm(grpo.GRPO(sampler_cap=1.1), NUMBERS).loss(
        jnp.asarray(logprobs), jax.tree.map(jnp.asarray, batch)
    )
    assert_allclose(loss, oracles.grpo_loss(*given, weights=weights, **numbers), rtol=1e-4)
    assert abs(loss - oracles.grpo_loss(*given, **numbers)) > 1e-3


def test_without_a_clip_there_is_one_step():
    with pytest.raises(UserError, match="one step with each iteration's answers"):
        rloo.RLOO(minibatches=2)
    with pytest.raises(UserError, match="128 answers do not divide into 3 minibatches"):
        grpo.GRPO(minibatches=3)


@pytest.fixture(scope="module")
def iteration():
    """One iteration's inputs, on a small world: (model, policy, frozen, prompts, completions, pad_id)."""
    import optax

    world = World(0, sizes=SIZES)
    base, model = world.base, Transformer(world.base.config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    prompts = jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[:4], 4, axis=0), world.prompts().train)
    ids = jnp.asarray(RNG.integers(3, 40, (B, 6)), jnp.int32)
    mask = jnp.arange(6)[None] < jnp.asarray(RNG.integers(1, 7, (B, 1)))
    completions = numpy_completions(ids, mask, jnp.zeros((B, 6)))
    policy = partial(make_state, model, params, optax.sgd(0.1))
    return model, policy, Frozen(params, {}, {}), prompts, completions, base.pad_id


ALL = np.ones(B, bool)


def learned(iteration, algorithm, numbers, scores, signal=ALL):
    model, policy, frozen, prompts, completions, pad_id = iteration
    scores = jnp.asarray(scores, jnp.float32)
    return jax.jit(partial(learn, algorithm, model, numbers, pad_id))(
        policy(), frozen, prompts, completions, scores, signal, jax.random.key(1)
    )


def test_nothing_is_learned_from_a_group_without_a_signal(iteration):
    """Not even from the punishment of its long answers, which makes scores that are alike differ."""
    cfg, scores, signal = dapo.DAPO(overlong_buffer=6), np.repeat([1.0, 0.0, 0.0, 1.0], 4), np.arange(B) < 8
    scores[0] = 0.5
    algorithm = dapo.algorithm(cfg, NUMBERS)
    some, metrics = learned(iteration, algorithm, NUMBERS, scores, signal)
    assert metrics["penalty"] < 0 and metrics["grad_norm"] > 0
    other, _ = learned(iteration, algorithm, NUMBERS, np.where(signal, scores, RNG.normal(size=B)), signal)
    chex.assert_trees_all_equal(some.params, other.params)
    whole, _ = learned(iteration, algorithm, NUMBERS, scores)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), whole.params, some.params))) > 1e-6


@pytest.mark.parametrize("module", [grpo, dr_grpo, dapo, gspo, cispo, rloo], ids=lambda module: module.__name__)
def test_answers_without_empty_columns_are_learned_alike(iteration, module, monkeypatch):
    """Also where the loss is over a constant length."""
    monkeypatch.setattr(data_tokens, "bucket", partial(bucket, smallest=4))
    cfg = next(flags for flags, *_ in [EQUATIONS[module]])
    wide = NUMBERS._replace(max_new_tokens=40)
    model, policy, frozen, prompts, completions, pad_id = iteration
    padded = numpy_completions(*(np.pad(np.asarray(x), ((0, 0), (0, 34))) for x in completions))
    scores = RNG.normal(size=B)
    algorithm = module.algorithm(cfg, wide)
    narrow = data_tokens.trimmed(padded)
    assert narrow.mask.shape == (B, 8) and narrow.mask.sum() == padded.mask.sum()
    found = [
        learned((model, policy, frozen, prompts, some, pad_id), algorithm, wide, scores) for some in (padded, narrow)
    ]
    chex.assert_trees_all_close(*(state.params for state, _ in found), rtol=1e-4, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, value in found[0][1].items():
        assert_allclose(found[1][1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_where_all_answers_score_alike_nothing_is_learned(iteration):
    algorithm = dr_grpo.algorithm(dr_grpo.DrGRPO(), NUMBERS)
    policy, metrics = learned(iteration, algorithm, NUMBERS, np.repeat([1.0, 0.0, 2.0, -1.0], 4))
    chex.assert_trees_all_equal(policy.params, iteration[1]().params)
    assert metrics["loss"] == metrics["grad_norm"] == 0.0


def test_an_answer_above_its_group_becomes_likelier_and_one_below_less(iteration):
    scores = np.tile([1.0, 0, 0, 0], 4)
    algorithm = rloo.algorithm(rloo.RLOO(beta=0.0), NUMBERS)
    policy, _ = learned(iteration, algorithm, NUMBERS, scores)

    @jax.jit
    def likelihood(params):
        from rlhf_jax.data.tokens import join
        from rlhf_jax.scoring import answer_logprobs

        model, _, _, prompts, completions, pad_id = iteration
        return answer_logprobs(model, params, join(prompts, completions, pad_id=pad_id))

    moved = likelihood(policy.params) - likelihood(iteration[1]().params)
    assert moved[scores == 1].mean() > moved[scores == 0].mean()


@pytest.mark.parametrize("module", [grpo, dr_grpo, dapo, gspo], ids=["sequences", "rows", "tokens", "ratios"])
def test_microbatches_are_the_whole_batch(module, iteration):
    cfg, scores = EQUATIONS[module][0], RNG.normal(size=B)
    algorithm = module.algorithm(cfg, NUMBERS)
    # Another reference, so that GRPO's KL, a mean over tokens where the loss is one over answers, is not 0.
    model, policy, frozen, *rest = iteration
    iteration = model, policy, frozen._replace(reference=jax.tree.map(lambda x: 1.3 * x, frozen.reference)), *rest
    whole, metrics = learned(iteration, algorithm, NUMBERS, scores)
    parts, found = learned(iteration, algorithm, NUMBERS._replace(accumulate=4), scores)
    assert module is not grpo or metrics["kl"] > 0.01
    chex.assert_trees_all_close(parts.params, whole.params, atol=1e-5)
    for name in metrics.keys() - {"skipped"}:
        assert_allclose(found[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("module, accumulate", [(grpo, 1), (gspo, 2), (cispo, 2), (rloo, 2)])
def test_a_single_update_is_that_with_log_probabilities_known_beforehand(module, accumulate, iteration, monkeypatch):
    """And its metrics are the same, of the policy too, of which nothing is computed but in the update."""
    cfg, scores = replace(EQUATIONS[module][0], **({"sampler_cap": 1.1} if module is grpo else {})), RNG.normal(size=B)
    if module is rloo:
        cfg = replace(cfg, beta=0.0)
    algorithm, numbers = module.algorithm(cfg, NUMBERS), NUMBERS._replace(accumulate=accumulate)
    model, policy, frozen, *rest = iteration
    iteration = model, policy, frozen._replace(reference=jax.tree.map(lambda x: 1.3 * x, frozen.reference)), *rest
    found, metrics = learned(iteration, algorithm, numbers, scores)
    with monkeypatch.context() as patch:
        patch.setattr(groups, "token_scores", None)
        with pytest.raises(TypeError):
            learned(iteration, algorithm, numbers._replace(epochs=2), scores)
    monkeypatch.setattr(Numbers, "updates_once", False)
    expected, before = learned(iteration, algorithm, numbers, scores)
    assert before["grad_norm"] > 1e-3 and metrics.keys() == before.keys() > {"entropy", "sampler_gap_p95"}
    chex.assert_trees_all_close(found.params, expected.params, atol=2e-6)
    for name in metrics:
        assert_allclose(metrics[name], before[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert metrics.get("approx_kl", 0.0) == metrics.get("clip_fraction", 0.0) == 0.0


def test_prompts_are_read_once_where_groups_are_whole(iteration):
    tokens = Tokens(*[jnp.zeros((B, 20), jnp.int32)] * 5)
    joined = partial(groups.joined, iteration[0], NUMBERS)
    assert joined(tokens) == (14, 4) and joined(tokens, shuffled=True) == (14, 1)
    assert joined(jax.tree.map(lambda x: x[:6], tokens)) == (14, 1)
    fused = Transformer(replace(iteration[0].config, attention="splash"))
    assert groups.joined(fused, NUMBERS, tokens) == (14, 1)
    with jax.set_mesh(make_mesh("data=4,fsdp=2")):
        assert joined(tokens) == (14, 1)


@pytest.mark.parametrize(
    "mesh, prompts, slots, expected",
    [
        (None, 16, 8, (8, 1)), (None, 16, 100, (64, 1)), ("fsdp=8", 16, 48, (64, 8)), ("fsdp=8", 64, 96, (96, 8)),
        ("fsdp=8", 16, 4, (32, 8)), ("fsdp=4,tensor=2", 16, 4, (16, 4)), ("fsdp=8", 6, 4, (24, 8)),
    ],
)  # fmt: skip
def test_how_many_answers_are_sampled_at_once(iteration, mesh, prompts, slots, expected):
    """All slots in whole groups on each copy of the weights; all answers where groups do not divide over copies."""
    model, policy = iteration[:2]
    numbers = NUMBERS._replace(prompts=prompts, group_size=4, slots=slots)
    with nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        copies = sampling_copies(model.config, policy().params)
    assert (groups.sampled_at_once(numbers, copies), copies) == expected


@pytest.mark.parametrize("sizes", [{}, {"accumulate": 2}, {"minibatches": 2}, {"accumulate": 8}])
def test_a_prompt_read_once_is_the_same_update(sizes, iteration, monkeypatch):
    algorithm, numbers, scores = grpo.algorithm(grpo.GRPO(), NUMBERS), NUMBERS._replace(**sizes), RNG.normal(size=B)
    model, policy, frozen, *rest = iteration
    iteration = model, policy, frozen._replace(reference=jax.tree.map(lambda x: 1.3 * x, frozen.reference)), *rest
    found, metrics = learned(iteration, algorithm, numbers, scores)
    monkeypatch.setattr(groups, "joined", lambda *args, shuffled=False: None)
    expected, alone = learned(iteration, algorithm, numbers, scores)
    chex.assert_trees_all_close(found.params, expected.params, atol=2e-6)
    for name in metrics:
        assert_allclose(metrics[name], alone[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_kl_in_the_reward_is_taken_off_each_answers_score(iteration):
    seen = []

    def advantages(scores):
        seen.append(1)
        return scores

    def loss(logprobs, answers):
        return losses.reinforce_loss(logprobs, answers.advantages, answers.tokens.mask)[0], {
            "advantage": answers.advantages.mean()
        }

    algorithm = Algorithm(advantages, loss, averaged=jnp.sum, kl_in_reward=0.5, penalty=lambda lengths: -lengths / 6)
    model, policy, frozen, *rest = iteration
    other = jax.tree.map(lambda x: x + 0.05, frozen.reference)
    _, metrics = learned((model, policy, Frozen(other, {}, {}), *rest), algorithm, NUMBERS, np.ones(B))
    mean_length = float(jnp.mean(rest[1].mask.sum(axis=1)))
    assert metrics["kl_k1"] != 0 and seen
    assert_allclose(metrics["advantage"], 1 - 0.5 * metrics["kl_k1"] - mean_length / 6, rtol=1e-4)


def test_on_eight_devices_an_iteration_is_that_of_one(iteration):
    algorithm = grpo.algorithm(grpo.GRPO(), NUMBERS)
    scores = RNG.normal(size=B)
    whole, metrics = learned(iteration, algorithm, NUMBERS, scores)
    model, policy, frozen, prompts, completions, pad_id = iteration
    with jax.set_mesh(make_mesh("data=4,fsdp=2")):
        state = replace(policy(), params=shard_params(policy().params))
        found, sharded = jax.jit(partial(learn, algorithm, model, NUMBERS, pad_id))(
            state,
            shard_params(frozen),
            *shard_batch((prompts, completions, jnp.float32(scores), ALL)),
            jax.random.key(1),
        )
    chex.assert_trees_all_close(jax.device_get(found.params), jax.device_get(whole.params), atol=1e-5)
    assert_allclose(sharded["loss"], metrics["loss"], atol=1e-5)
