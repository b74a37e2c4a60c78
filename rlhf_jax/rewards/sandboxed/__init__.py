"""The two programs that run inside of sandboxes: `program.py` has the hostile code, `examiner.py` the tests of it.

They import the standard library and each other alone: a sandbox has nothing else of rlhf_jax.
"""
