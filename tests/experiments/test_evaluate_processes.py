"""evaluate.py in several processes on one machine has the numbers of one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

LIMIT = 400
"""Seconds in which all must have ended."""


def test_four_processes_evaluate_as_one_does(tmp_path, shared_data):
    """The command itself, on rows of three suites."""
    root = Path(__file__).parents[2]
    files = {"ifeval": "ifeval/ifeval_prompts", "gsm8k": "math/gsm8k.test", "text": "code/mbpp"}
    flags = [word for name, file in files.items() for word in (f"--{name}", str(shared_data / f"{file}.jsonl.gz"))]
    flags += ["--limit", "6", "--max-new-tokens", "8", "--max-length", "128"]
    command = [sys.executable, str(root / "experiments" / "evaluate.py"), *flags]
    command += ["--model", str(shared_data / "model" / "stories260K-hf"), "--run-dir"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = [[str(tmp_path / "four"), "--hosts", f"127.0.0.1:{port},4,{number}"] for number in range(4)]
    running = [
        subprocess.Popen([*command, *one], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for one in ([str(tmp_path / "one")], *told)
    ]
    said = [process.communicate(timeout=LIMIT)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 5, "\n".join(said)
    one, four = (
        json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")) for name in ("one", "four")
    )
    assert one.keys() == four.keys() and len(one) > 20
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, err_msg=name)
