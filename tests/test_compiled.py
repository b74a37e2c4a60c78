"""Compiled programs are kept where one says, found again by another process, and said where they take long."""

import subprocess
import sys
import time

import jax
import pytest

from rlhf_jax import compiled
from rlhf_jax.errors import UserError

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from rlhf_jax.compiled import keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda event, **of: hits.append(event.rpartition("/")[2]))
keep_compiled(sys.argv[1] if len(sys.argv) > 1 else None)
jax.jit(lambda x: jnp.sin(x) * 3 + 1)(1.0)
print(jax.config.jax_compilation_cache_dir, hits.count("cache_hits"), hits.count("cache_misses"))
"""


def run(tmp_path, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin", "PYTHONPATH": str(compiled.__file__).rpartition("/rlhf_jax/")[0],
             "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", compiled.TOLD: "0"} | environment,
    )  # fmt: skip
    folder, hits, misses = done.stdout.split()
    return folder, int(hits), int(misses)


def test_a_second_process_compiles_nothing(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert first[0] == again[0] and first[0].startswith(str(tmp_path / "cache" / "rlhf_jax"))
    assert first[1] == 0 < first[2] and again[1:] == (first[2], 0)
    # Where JAX was told a folder it is that one, and a flag is before both.
    told = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "told")}
    assert run(tmp_path, **told)[0] == str(tmp_path / "told")
    assert run(tmp_path, str(tmp_path / "flag"), **told) == (str(tmp_path / "flag"), 0, first[2])
    assert run(tmp_path, "none")[1:] == (0, 0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--compile-cache: .*file/in is no folder"):
        compiled.keep_compiled(str(tmp_path / "file" / "in"))


def test_what_takes_long_is_said_before_and_after(monkeypatch):
    lines = []
    with compiled.long_compilations_said(lines.append):
        jax.jit(lambda x: x - 2)(1.0)
        assert lines == []
        monkeypatch.setattr(compiled, "LONG", 0.0)
        monkeypatch.setattr(compiled, "WAIT", 0.02)
        name = {"fun_name": "jit(waited)"}
        for event, seconds in ((compiled.TRACED, 0.1), (compiled.LOWERED, 0.1)):
            jax.monitoring.record_event_duration_secs(event, seconds, **name)
        time.sleep(0.5)
        assert lines == ["compiling waited …"]
        jax.monitoring.record_event_duration_secs(compiled.COMPILED, 0.2, **name)
        assert lines[1:] == ["compiled waited in 0 s"]
        # One that is there at once, as from the cache, is not announced.
        monkeypatch.setattr(compiled, "WAIT", 60.0)
        for event in (compiled.TRACED, compiled.LOWERED, compiled.COMPILED):
            jax.monitoring.record_event_duration_secs(event, 0.001, fun_name="jit(cached)")
        time.sleep(0.1)
        assert lines[2:] == ["compiled cached in 0 s"]
        del lines[2:]
    jax.jit(lambda x: x - 4)(1.0)
    assert len(lines) == 2
    inner: list[str] = []
    with compiled.long_compilations_said(lines.append), compiled.long_compilations_said(inner.append):
        jax.jit(lambda x: x - 5)(1.0)
    assert len(lines) == 2 and inner
