"""A small world in which the true utility of a response is known.

As in Gao et al. 2023 (https://arxiv.org/abs/2210.10760) a gold standard stands for the human, so that what a
reward model gets wrong can be measured. `world` draws problems and judges answers; `people` write
demonstrations and compare answers, imperfectly and at known rates.
"""

from rlhf_jax.simulation.errands import ERRANDS
from rlhf_jax.simulation.people import Annotators, Demonstrators, agreement_rate, calibrate_noise, ceiling
from rlhf_jax.simulation.revisers import PRINCIPLES, Revisers
from rlhf_jax.simulation.setting import Problem, Setting
from rlhf_jax.simulation.world import WORDS, draw_problems, is_exact, make_tokenizer, utility

__all__ = [
    "ERRANDS",
    "PRINCIPLES",
    "WORDS",
    "Annotators",
    "Demonstrators",
    "Problem",
    "Revisers",
    "Setting",
    "agreement_rate",
    "calibrate_noise",
    "ceiling",
    "draw_problems",
    "is_exact",
    "make_tokenizer",
    "utility",
]
