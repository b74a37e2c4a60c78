"""What the tests of experiments share."""

import pytest

from experiments import setting


@pytest.fixture
def small_world(monkeypatch):
    """The controlled world with few of everything."""
    sizes = dict(
        DEMONSTRATIONS=256, COMPARED=24, RANKED=4, HELDOUT_PAIRS=32, PROMPTS=256, HELDOUT=32, VALIDATION=64,
        LAYERS=2,
    )  # fmt: skip
    for name, size in sizes.items():
        monkeypatch.setattr(setting, name, size)
