"""What the tests of experiments share."""

import pytest

from experiments import setting


@pytest.fixture
def small_world(monkeypatch):
    """The controlled world with few of everything."""
    for name, size in dict(DEMONSTRATIONS=256, COMPARED=24, RANKED=4, HELDOUT_PAIRS=32, HELDOUT=32).items():
        monkeypatch.setattr(setting, name, size)
