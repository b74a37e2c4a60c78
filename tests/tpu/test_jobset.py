import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHOICES = {"NAME": "ppo-1", "IMAGE": "example.org/rlhf_jax:1", "CLAIM": "shared", "ACCELERATOR": "tpu-v6e-slice"}


def closed(schema):
    """The schema with a field that it does not know forbidden, as the API server's strict validation has it."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        inside["properties"] = {name: closed(field) for name, field in schema["properties"].items()}
        inside.setdefault("additionalProperties", False)
    return inside


PUBLISHED = json.loads(Path(__file__).with_name("jobset_v1alpha2.json").read_text())
SCHEMA = jsonschema.Draft202012Validator(closed(PUBLISHED))


def rendered(*command, **environment):
    return subprocess.run(
        [sys.executable, "-S", ROOT / "tpu" / "gke" / "manifest.py", *command],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def job():
    done = rendered("experiments/ppo.py", "--run-dir", 'runs/it\'s: "1" # $HOME', TOPOLOGY="4x8", **CHOICES)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def at(job, *path):
    for step in path:
        job = job[step]
    return job


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")
WORKER = (*POD, "containers", 0)


def test_the_manifest_is_a_jobset_of_the_version_it_names(job):
    SCHEMA.validate(job)
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    "path, field, value",
    [
        (("spec",), "replicatedJob", []),  # a name that is misspelt, at each level
        (JOB, "completionmode", "Indexed"),
        (POD, "nodeselector", {}),
        (WORKER, "cmd", ["python"]),
        (JOB, "parallelism", "8"),  # a type
        (POD, "nodeSelector", {"cloud.google.com/gke-tpu-topology": 4}),
        ((*WORKER, "resources", "limits"), "google.com/tpu", "four"),
        (("spec", "failurePolicy"), "restartStrategy", "Sometimes"),
    ],
)
def test_a_wrong_field_is_refused(job, path, field, value):
    wrong = json.loads(json.dumps(job))
    at(wrong, *path)[field] = value
    (error,) = SCHEMA.iter_errors(wrong)
    assert tuple(error.absolute_path)[: len(path)] == path
    assert field in (*error.absolute_path, *error.message.split("'"))


def test_a_field_that_is_needed_is_missed(job):
    wrong = json.loads(json.dumps(job))
    del at(wrong, "spec", "replicatedJobs", 0)["name"]
    with pytest.raises(jsonschema.ValidationError, match="'name' is a required property"):
        SCHEMA.validate(wrong)


def test_one_worker_a_host_and_all_chips_of_the_slice(job):
    assert at(job, *JOB, "parallelism") == at(job, *JOB, "completions") == 8  # 4 × 8 chips, 4 a host
    assert at(job, *WORKER, "resources", "limits") == {"google.com/tpu": 4}
    assert at(job, *JOB, "completionMode") == "Indexed"
    assert at(job, *JOB, "backoffLimit") == 0 and at(job, *POD, "restartPolicy") == "Never"
    assert at(job, *POD, "nodeSelector") == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }


def test_arguments_reach_the_container_as_they_were_given(job):
    command = ["python", "-u", "/rlhf_jax/experiments/ppo.py", "--run-dir", 'runs/it\'s: "1" # $HOME']
    assert at(job, *WORKER, "command") == command


def test_run_folders_and_compiled_programs_are_on_the_disk_that_all_workers_share(job):
    (mount,) = at(job, *WORKER, "volumeMounts")
    (volume,) = at(job, *POD, "volumes")
    assert mount["name"] == volume["name"] and volume["persistentVolumeClaim"] == {"claimName": "shared"}
    assert at(job, *WORKER, "workingDir") == mount["mountPath"]
    (cache,) = at(job, *WORKER, "env")
    assert cache["name"] == "JAX_COMPILATION_CACHE_DIR" and cache["value"].startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize(
    "topology, on_host, hosts, chips",
    [("1x1", None, 1, 1), ("2x2x2", None, 2, 4), ("2x4", "8", 1, 8)],
)
def test_hosts_follow_from_the_topology(topology, on_host, hosts, chips):
    more = {} if on_host is None else {"CHIPS_PER_HOST": on_host}
    job = yaml.safe_load(rendered("experiments/sft.py", TOPOLOGY=topology, **more, **CHOICES).stdout)
    SCHEMA.validate(job)
    assert (at(job, *JOB, "parallelism"), at(job, *WORKER, "resources", "limits", "google.com/tpu")) == (hosts, chips)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"IMAGE": ""}, "set IMAGE: the image that was built with tpu/gke/Dockerfile"),
        ({"TOPOLOGY": "16"}, "TOPOLOGY is 16, and has a form such as 4x4 or 2x2x1"),
        ({"CHIPS_PER_HOST": "5"}, "16 chips do not divide into hosts of 5 (CHIPS_PER_HOST)"),
    ],
)
def test_a_mistake_is_one_line(change, message):
    done = rendered("experiments/ppo.py", **{"TOPOLOGY": "4x4", **CHOICES, **change})
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"manifest.py: {message}\n"
