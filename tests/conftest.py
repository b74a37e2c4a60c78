"""Eight CPU devices for every test, no silent rank promotion, and the folder of shared data."""

import os
from pathlib import Path

import jax
import pytest

# Before anything asks for a device: the number of devices is fixed from then on.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets beside the checkout; CI must have it, others may go without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        message = f"the shared data sets are not at {folder}: put them there, or leave the tests that read them out"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
