"""The slope of a number over the sizes of models."""

import pytest

from experiments.ablations.grid_results import Cells
from experiments.ablations.sizes import Variant, of_width, slope
from rlhf_jax.models import ModelConfig
from rlhf_jax.pretrained import Pretrained


def cells_of(*values):
    """Cells of the widths 8, 16 and 32, with 10², 10³ and 10⁴ parameters; a seed a row of values."""
    variants = tuple(Variant(width) for width in (8, 16, 32)[: len(values[0])])
    made = {
        (seed, one): {"log_parameters": 2.0 + place, "alpha": row[place]}
        for seed, row in enumerate(values) for place, one in enumerate(variants) if row[place] is not None
    }  # fmt: skip
    return Cells(tuple(range(len(values))), variants, made, {})


def test_the_slope_is_that_of_the_straight_line_through_all_sizes():
    # Through (2, 0), (3, 3), (4, 4): Σ(x − 3)(y − 7/3) / Σ(x − 3)² = (7/3 + 5/3) / 2 = 2.
    found = slope("alpha")(cells_of([1.0, 1.5, 2.0], [0.0, 3.0, 4.0]))
    assert found == pytest.approx({0: 0.5, 1: 2.0})


def test_a_seed_that_lacks_a_size_has_no_slope_and_one_size_alone_has_none():
    assert list(slope("alpha")(cells_of([1.0, 1.5, 2.0], [0.0, None, 4.0]))) == [0]
    with pytest.raises(KeyError):
        slope("alpha")(cells_of([1.0]))


def test_a_model_of_another_width_has_heads_of_the_same_size():
    config = ModelConfig(vocab_size=8, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=128,
                         rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True, max_length=8)  # fmt: skip
    base = Pretrained(config, {"weights": 1}, None)
    narrow, wide = of_width(base, 8), of_width(base, 64)
    assert narrow.params is None and wide.config == config
    assert (narrow.config.d_model, narrow.config.d_ff, narrow.config.n_heads, narrow.config.head_dim) == (8, 16, 1, 16)
