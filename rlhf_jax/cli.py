"""Makes a program of a Config and a main function: flags, the mesh, other processes, exit codes.

@on_mesh
def main(cfg: Config) -> dict[str, float]: ...

if __name__ == "__main__":
    run_main(main, Config)
"""

import dataclasses
import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from rlhf_jax.compiled import keep_compiled
from rlhf_jax.errors import UserError
from rlhf_jax.folder import read_json
from rlhf_jax.hosts import fail, leave, many, start
from rlhf_jax.log import Run
from rlhf_jax.report import read_findings, write_report
from rlhf_jax.sections import Report
from rlhf_jax.sharding import make_mesh

ConfigT = TypeVar("ConfigT")

NOT_A_BUG = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended, by the shell's convention: 128 + SIGINT."""


def run_main(main: Callable[[ConfigT], Any], config: type[ConfigT]) -> None:
    """The entry point of an experiment: flags from the command line, then `main(cfg)`.

    With --resume, flags that are not given are those that the run was started with. What the user can put right ends
    in one line and exit code 2, Ctrl-C in exit code 130, SIGTERM in 143, without traceback. Where there is a
    flag --hosts, the process joins those that it was started with, if any, before `main` (`hosts.start`); where there
    is one --compile-cache, compiled programs are kept (`compiled.keep_compiled`).
    """
    try:
        cfg = tyro.cli(config)
        run_dir = getattr(cfg, "run_dir", None)
        if run_dir and getattr(cfg, "resume", False):
            saved = read_json(Path(run_dir) / "config.json")
            for name in ("hosts", "accept_changes", "compile_cache"):  # told anew each time
                saved.pop(name, None)
            cfg = tyro.cli(config, default=_with_saved(config(), saved))
        if hasattr(cfg, "hosts"):
            start(cfg.hosts)
        if hasattr(cfg, "compile_cache"):
            keep_compiled(cfg.compile_cache)
        main(cfg)
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except UserError as error:
        message = str(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_A_BUG:
            message = f"{error.strerror}: {error.filename or 'while writing'}"
        elif many():
            fail(error)
        else:
            raise
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    leave(2)


def _with_saved(cfg: ConfigT, saved: Mapping[str, Any]) -> ConfigT:
    """A config with the values that a config.json holds; a field that it lacks keeps its own value."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):  # type: ignore[arg-type]
        if field.name in saved:
            value, own = saved[field.name], getattr(cfg, field.name)
            if dataclasses.is_dataclass(own):
                value = _with_saved(own, value if isinstance(value, dict) else {})
            elif isinstance(value, dict):  # another experiment's, which the run will refuse
                continue
            changes[field.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(cfg, **changes)  # type: ignore[type-var]


@contextmanager
def run_with_report(cfg: Any, name: str, report: Report) -> Iterator[Run]:
    """The run of an experiment, from the config's run_dir and resume; at its end, however it ends, its report is
    written: an interrupted run, too, can be looked at."""
    with Run(cfg.run_dir, cfg, name=name, resume=cfg.resume) as run:
        try:
            yield run
        finally:
            if run.first and not run.empty:
                for finding in read_findings(run.dir, report):
                    if finding.bad:
                        run.warn(finding.sentence)
                run.say(f"report: {write_report(run.dir, report)}")


def on_mesh(main: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """main(cfg) with the mesh of `cfg.mesh` set, on which everything then places itself."""

    @wraps(main)
    def placed(cfg: Any) -> Any:
        if cfg.mesh is None and not many():
            return main(cfg)
        with jax.set_mesh(make_mesh(cfg.mesh or "")):
            return main(cfg)

    return placed
