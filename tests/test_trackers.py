"""Who is told of a run beside its folder."""

import importlib.util
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    steps: int = 30
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ("a", "b")
    model: str | None = None
    track: str | None = None


def values(folder):
    """(step, value) of everything in a TensorBoard event file, read record by record."""
    (path,) = Path(folder).iterdir()
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        found += [(event.step, value) for value in event.summary.value]
    return found


def test_tensorboard_has_scalars_and_hyperparameters(tmp_path):
    with Run(tmp_path, Config(), name="x") as run:
        run.log("sft", 1, {"loss": jnp.float32(0.25), "count": np.int64(3), "odd": float("nan"), "up": jnp.inf})
        run.log("sft", 2, {"learning_rate": 1.0})
    found = values(tmp_path / "tensorboard")
    named = {value.tag: value for _, value in found}
    scalars = [(value.tag, step, value.simple_value) for step, value in found if value.tag.startswith("sft")]
    assert scalars == [("sft/loss", 1, 0.25), ("sft/count", 1, 3.0), ("sft/learning_rate", 2, 1.0)]
    table = named["config/text_summary"].tensor.string_val[0].decode()
    assert "| steps | 30 |" in table and "| inner.rate | 0.5 |" in table and "| experiment | x |" in table
    plugin = named["_hparams_/session_start_info"].metadata.plugin_data.content
    told = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert told["steps"].number_value == 30 and told["inner.rate"].number_value == 0.5
    assert told["names"].string_value == "['a', 'b']" and told["model"].string_value == "None"


OPENED = """
import dataclasses, sys
from rlhf_jax.log import Run
with Run(sys.argv[1], dataclasses.make_dataclass("Config", [])(), name="x"):
    assert "tensorboardX" in sys.modules and "torch" not in sys.modules
import torch
"""


def test_to_open_a_run_does_not_import_torch_and_leaves_it_to_others(tmp_path):
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", OPENED, tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Told:
    """Stands for a run of Weights & Biases; `wrong` is what fails."""

    def __init__(self, wrong=None):
        self.wrong, self.calls = wrong, []
        self.summary = SimpleNamespace(update=lambda values: self.call("summary", values))

    def call(self, name, *values):
        self.calls.append((name, *values))
        if name == self.wrong:
            raise RuntimeError("no connection\nand a long story")

    def init(self, **settings):
        self.call("init", settings)
        return self

    def define_metric(self, name, step_metric):
        self.call("define", name, step_metric)

    def log(self, values):
        self.call("log", values)

    def finish(self, exit_code):
        self.call("finish", exit_code)


@pytest.fixture
def wandb(monkeypatch):
    told = Told()
    module = SimpleNamespace(
        init=told.init, Settings=lambda **settings: settings, __spec__=SimpleNamespace(origin="wandb/__init__.py")
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(None, "finished", 0), (ZeroDivisionError, "failed", 1), (KeyboardInterrupt, "interrupted", 1)],
)
def test_weights_and_biases_is_told_what_happened(tmp_path, wandb, error, status, code):
    cfg = Config(track="wandb")
    with pytest.raises(error) if error else nullcontext(), Run(tmp_path / "run", cfg, name="x") as run:
        run.log("sft", 1, {"loss": 0.5})
        run.summary({"final": 2.0})
        if error:
            raise error
    settings = wandb.calls[0][1]
    assert settings["name"] == "run" and settings["dir"] == str(tmp_path / "run")
    assert settings["config"]["steps"] == 30 and settings["config"]["inner"] == {"rate": 0.5}
    assert wandb.calls[1:] == [
        ("define", "sft/*", "sft/step"),
        ("log", {"sft/step": 1, "sft/loss": 0.5}),
        ("summary", {"final": 2.0}),
        ("summary", {"status": status}),
        ("finish", code),
    ]
    # What is resumed goes on there, too.
    with Run(tmp_path / "run", cfg, name="x", resume=True):
        pass
    assert [call[1]["id"] for call in wandb.calls if call[0] == "init"] == [settings["id"]] * 2


@pytest.mark.parametrize("wrong", ["init", "log", "summary", "finish"])
def test_weights_and_biases_never_ends_a_run(tmp_path, wandb, capsys, wrong):
    wandb.wrong = wrong
    with Run(tmp_path, Config(track="wandb"), name="x") as run:
        for step in range(3):
            run.log("sft", step, {"loss": 0.5})
        run.summary({"final": 2.0})
    assert capsys.readouterr().out.count("Weights & Biases fails") == 1
    assert len(read_metrics(tmp_path)["sft"]) == 3


@pytest.mark.parametrize("folder", [False, True])
def test_a_package_that_is_missing_is_said_before_anything_is_made(tmp_path, monkeypatch, folder):
    found = importlib.util.spec_from_loader("wandb", None) if folder else None
    monkeypatch.setattr("rlhf_jax.trackers.find_spec", lambda name: found)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[wandb\]'"):
        Run(tmp_path / "run", Config(track="wandb"), name="x")
    with pytest.raises(UserError, match="--track other is not known"):
        Run(tmp_path / "run", Config(track="other"), name="x")
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # to import it would fail
    with Run(tmp_path, Config(), name="x") as run:
        run.log("sft", 1, {"loss": 1.0})


def test_weights_and_biases_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ZeroDivisionError), Run(tmp_path, Config(track="wandb"), name="x") as run:
        run.log("sft", 1, {"loss": 0.5, "odd": float("nan")})
        raise ZeroDivisionError
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    words = (b"sft/loss", b"sft/step", b"0.5", b"inner", b'"failed"')
    # A process of the package writes the file, and sometimes after finish() has returned.
    ended = time.monotonic() + 30
    while time.monotonic() < ended and not all(word in path.read_bytes() for word in words):
        time.sleep(0.1)
    data = path.read_bytes()
    for word in words:
        assert word in data
