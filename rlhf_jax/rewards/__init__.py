"""Scores of answers: reward models, functions of the user, verifiable instructions, answers to sums, and judges.

This file imports nothing, so that a reward function which uses `rlhf_jax.rewards.math` loads in a moment.
"""
