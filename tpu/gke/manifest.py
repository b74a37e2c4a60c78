"""Fills in jobset.yaml from the environment and prints it. run.sh hands it to kubectl.

NAME=ppo IMAGE=... CLAIM=... ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 python3 tpu/gke/manifest.py experiments/ppo.py
"""

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

NEEDED = {
    "NAME": "a name for the job",
    "IMAGE": "the image that was built with tpu/gke/Dockerfile",
    "CLAIM": "a PersistentVolumeClaim that all workers may write to",
    "ACCELERATOR": "tpu-v6e-slice, tpu-v5p-slice or tpu-v5-lite-podslice",
    "TOPOLOGY": "the chips along each axis of the slice, such as 4x4",
}


def manifest(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """The manifest that runs a script of the repository, with its arguments, on every host of the slice.

    Raises ValueError for a variable that is missing or wrong, and without a script.
    """
    for name, meaning in NEEDED.items():
        if not environment.get(name):
            raise ValueError(f"set {name}: {meaning}")
    if not command:
        raise ValueError("name an experiment, such as experiments/ppo.py")
    if not re.fullmatch(r"\d+(x\d+){1,2}", environment["TOPOLOGY"]):
        raise ValueError(f"TOPOLOGY is {environment['TOPOLOGY']}, and has a form such as 4x4 or 2x2x1")
    chips = math.prod(map(int, environment["TOPOLOGY"].split("x")))
    on_host = int(environment.get("CHIPS_PER_HOST", min(chips, 4)))
    if on_host < 1 or chips % on_host:
        raise ValueError(f"{chips} chips do not divide into hosts of {on_host} (CHIPS_PER_HOST)")
    script, *arguments = command
    values: dict[str, object] = {name: environment[name] for name in NEEDED}
    values |= {"HOSTS": chips // on_host, "CHIPS": on_host, "RESTARTS": int(environment.get("RESTARTS", "0"))}
    values["COMMAND"] = ["python", "-u", f"/rlhf_jax/{script}", *arguments]
    # JSON is YAML in which every string is quoted.
    filled = {name: json.dumps(value) for name, value in values.items()}
    return Template(Path(__file__).with_name("jobset.yaml").read_text()).substitute(filled)


if __name__ == "__main__":
    try:
        print(manifest(os.environ, sys.argv[1:]), end="")
    except ValueError as error:
        sys.exit(f"manifest.py: {error}")
