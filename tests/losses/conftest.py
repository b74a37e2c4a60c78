import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    """A loss converts on purpose or not at all."""
    with jax.numpy_dtype_promotion("strict"):
        yield
