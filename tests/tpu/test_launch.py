"""The scripts with recorded gcloud, kubectl, xpk, ssh and srun; what they would run on a worker is run here."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted([*TPU.rglob("*.sh"), *TPU.rglob("*.sbatch")])
AWKWARD = ["--judge", 'it\'s "here"', "a  b", "$HOME", "*", "", "é\nnew line"]

# Writes its name, its arguments and how many they are. Of gcloud and ssh, runs the command in a folder a worker.
FAKE = r"""#!/bin/bash
printf '%s\0' "$#" "${0##*/}" "$@" >> "$RECORD"
command='' worker=worker
case "${0##*/} $*" in
  *describe*) [[ -n ${STATE:-} ]] && echo "$STATE"; exit ;;
  *" scp "*) cp "$5" "$WORKERS/worker/" ;;
  kubectl*) cat > "$WORKERS/stdin" ;;
  gcloud*" ssh "*) command="${*: -1}" ;;
  ssh*) command="${*: -1}" worker="$1" ;;
esac
if [[ -n $command ]]; then
  mkdir -p "$WORKERS/$worker" && cd "$WORKERS/$worker" && HOME="$PWD" bash -c "$command"
fi
"""

# An experiment that ends as ours do on Ctrl-C: nohup's child would ignore it.
EXPERIMENT = """
import os, signal, sys
signal.alarm(60)  # whatever the test does, it ends
signal.signal(signal.SIGINT, lambda *_: sys.exit(print("interrupted")))
print(repr((sys.argv[1:], {key: value for key, value in os.environ.items() if key.startswith("JAX_")})), flush=True)
signal.pause()
"""


@pytest.fixture
def run(tmp_path):
    """run(script, *arguments, **environment) -> the process that ended; run.calls() -> [[program, *arguments], ...]"""
    fakes, workers, record = tmp_path / "fakes", tmp_path / "workers", tmp_path / "record"
    (workers / "worker").mkdir(parents=True)
    fakes.mkdir()
    for name in ("gcloud", "kubectl", "xpk", "ssh", "srun"):
        (fakes / name).write_text(FAKE)
        (fakes / name).chmod(0o755)

    def run(script, *arguments, **environment):
        base = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        path = f"{fakes}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{base['PATH']}"
        return subprocess.run(
            [script if Path(script).is_absolute() else TPU / script, *arguments], capture_output=True, text=True,
            env=base | {"PATH": path, "RECORD": str(record), "WORKERS": str(workers)} | environment, timeout=60,
        )  # fmt: skip

    def calls():
        words = record.read_bytes().decode().split("\0")[:-1] if record.exists() else []
        found = []
        while words:
            count = int(words[0])
            found.append(words[1 : count + 2])
            words = words[count + 2 :]
        return found

    run.calls, run.workers, run.fakes = calls, workers, fakes
    return run


def passed(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


SLICE = {"TPU_NAME": "ppo", "ZONE": "us-east5-b"}
WHERE = ["ppo", "--zone", "us-east5-b"]
ALL = {**SLICE, "ACCELERATOR": "v6e-8", "CLUSTER": "tpus", "NAME": "ppo", "IMAGE": "image", "CLAIM": "shared"}
ALL |= {"TOPOLOGY": "2x4", "HOSTS": "gpu0 gpu1", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(TPU)))
def test_every_script_tells_its_use_and_what_is_missing(run, script):
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "\nset -euo pipefail\n" in text
    use = passed(run(script, "-h"))
    assert f"tpu/{script.relative_to(TPU)}" in use and "set -e" not in use and "SBATCH" not in use
    needed = re.findall(r"\$\{(\w+):\?", text)
    for name in filter(str.isidentifier, needed):
        done = run(script, "experiments/ppo.py", **{key: value for key, value in ALL.items() if key != name})
        assert done.returncode != 0 and re.fullmatch(rf".*: {name}: .*\n", done.stderr), done.stderr
    assert run.calls() == []


@pytest.mark.parametrize(
    "accelerator, image",
    [("v6e-8", "v2-alpha-tpuv6e"), ("v5p-8", "v2-alpha-tpuv5"), ("v5litepod-8", "v2-alpha-tpuv5-lite")],
)
def test_create_queues_a_slice_with_the_image_of_its_kind(run, accelerator, image):
    passed(run("vm/create.sh", ACCELERATOR=accelerator, **SLICE))
    gcloud = ["gcloud", "compute", "tpus", "queued-resources"]
    describe, create = run.calls()
    assert describe == [*gcloud, "describe", *WHERE, "--format", "value(state.state)"]
    assert create == [*gcloud, "create", *WHERE, "--node-id", "ppo", "--accelerator-type", accelerator,
                      "--runtime-version", image]  # fmt: skip


def test_create_takes_a_spot_vm_at_once(run):
    passed(run("vm/create.sh", "--spot", "--direct", ACCELERATOR="v6e-8", RUNTIME="mine", **SLICE))
    assert run.calls()[1] == ["gcloud", "compute", "tpus", "tpu-vm", "create", *WHERE, "--accelerator-type", "v6e-8",
                              "--version", "mine", "--spot"]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--direct"]])
def test_create_again_says_how_it_stands(run, options):
    assert "ppo in us-east5-b exists: ACTIVE\n" in passed(run("vm/create.sh", *options, STATE="ACTIVE", **ALL))
    assert len(run.calls()) == 1


def test_an_option_that_is_not_known_creates_nothing(run):
    assert run("vm/create.sh", "--sopt", **ALL).returncode == 2 and run.calls() == []


@pytest.mark.parametrize(
    "state, command", [("ACTIVE", ["queued-resources", "delete", *WHERE, "--force", "--quiet"]),
                       ("", ["tpu-vm", "delete", *WHERE, "--quiet"])]
)  # fmt: skip
def test_delete_names_what_it_deletes(run, state, command):
    said = passed(run("vm/delete.sh", STATE=state, **SLICE))
    assert run.calls()[1] == ["gcloud", "compute", "tpus", *command]
    assert said.startswith("deleting the ") and "ppo in us-east5-b" in said


ME = {f"GIT_{who}_{what}": "me" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture
def repository(tmp_path):
    """The scripts in a repository with a file that has changed since the commit, and one that git does not know."""
    folder = tmp_path / "repository"
    shutil.copytree(TPU, folder / "tpu")
    (folder / "known").write_text("committed")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git = ["git", "-C", folder, "-c", "init.defaultBranch=main"]
        subprocess.run([*git, *command], env=os.environ | ME, check=True)
    (folder / "known").write_text("changed")
    (folder / "unknown").write_text("")
    return folder


def lived_in(home):
    """A worker that has old code and a run folder; its ~/rlhf_jax."""
    (home / "rlhf_jax" / "code").mkdir(parents=True)
    (home / "rlhf_jax" / "code" / "stale.py").write_text("")
    (home / "rlhf_jax" / "runs" / "ppo-1").mkdir(parents=True)
    return home / "rlhf_jax"


def check_copy(there, known):
    code = there / "code"
    assert {path.name for path in code.iterdir()} == {"known", "tpu"} and (there / "runs" / "ppo-1").exists()
    assert (code / "known").read_text() == known


@pytest.mark.parametrize("changes", [False, True])
def test_copy_sends_the_commit_and_not_its_history(run, repository, changes):
    there = lived_in(run.workers / "worker")
    (run.fakes / "python3").write_text(FAKE)
    (run.fakes / "python3").chmod(0o755)
    done = run(repository / "tpu" / "vm" / "copy.sh", *["--changes"] * changes, **ME, **SLICE)
    passed(done)
    assert ("what is not committed stays here" in done.stderr) != changes
    check_copy(there, "changed" if changes else "committed")
    scp, ssh, *installs = run.calls()
    assert scp[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert scp[6:] == ["ppo:", "--zone", "us-east5-b", "--worker", "all"]
    assert ssh[4:-1] == ["ssh", *WHERE, "--worker", "all", "--command"]
    assert installs[-1][-3:] == ["code/.ci/constraints.txt", "-e", "./code[tpu]"]


def test_ssh_copies_to_every_host(run, repository):
    folders = [lived_in(run.workers / host) for host in ("gpu0", "gpu1")]
    for folder in folders:
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "venv" / "bin" / "pip").write_text(FAKE)
        (folder / "venv" / "bin" / "pip").chmod(0o755)
    passed(run(repository / "tpu" / "ssh.sh", "copy", HOSTS="gpu0 gpu1"))
    for folder in folders:
        check_copy(folder, "committed")
    pips = [call for call in run.calls() if call[0] == "pip"]
    assert [call[-2:] for call in pips] == [["-e", "./code[cuda]"]] * 2


def python_of(home):
    """A venv of the worker whose Python is this one, and the experiment that says how it was called."""
    (home / "rlhf_jax" / "venv" / "bin").mkdir(parents=True)
    (home / "rlhf_jax" / "venv" / "bin" / "python").symlink_to(sys.executable)
    (home / "rlhf_jax" / "code" / "experiments").mkdir(parents=True)
    (home / "rlhf_jax" / "code" / "experiments" / "ppo.py").write_text(EXPERIMENT)
    return home / "rlhf_jax" / "log"


def said(log, lines):
    """What the experiment has printed, once it is that many lines."""
    end = time.monotonic() + 20
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert time.monotonic() < end, "the experiment said nothing"
        time.sleep(0.02)
    return log.read_text().splitlines()


def test_run_starts_the_experiment_on_every_worker_once_and_stops_it(run):
    log = python_of(run.workers / "worker")
    passed(run("vm/run.sh", "experiments/ppo.py", *AWKWARD, CACHE="/disk/x y", **SLICE))
    assert run.calls()[0][4:-1] == ["ssh", *WHERE, "--worker", "all", "--command"]
    try:
        assert eval(said(log, 1)[0]) == (AWKWARD, {"JAX_COMPILATION_CACHE_DIR": "/disk/x y"})
        again = run("vm/run.sh", "experiments/ppo.py", **SLICE)
        assert again.returncode == 1 and "still runs process" in again.stderr
    finally:
        passed(run("vm/run.sh", "--stop", **SLICE))
    assert said(log, 2)[1] == "interrupted"


def test_run_knows_the_experiments(run):
    done = run("vm/run.sh", "experiments/pop.py", **SLICE)
    assert (done.returncode, done.stderr) == (2, "run.sh: there is no experiments/pop.py\n") and run.calls() == []


@pytest.mark.parametrize("worker, tail", [("0", "tail -n 100 -F rlhf_jax/log"), ("all", "$(hostname)")])
def test_logs_follows_one_worker_or_all(run, worker, tail):
    (run.fakes / "tail").write_text("#!/bin/sh\necho step 1\n")
    (run.fakes / "tail").chmod(0o755)
    shown = passed(run("vm/logs.sh", *[worker] * (worker == "all"), **SLICE))
    (call,) = run.calls()
    assert call[4:-1] == ["ssh", *WHERE, "--worker", worker, "--command"] and tail in call[-1]
    assert re.fullmatch("step 1\n" if worker == "0" else r"\S+: step 1\n", shown)


def test_gke_applies_the_manifest(run):
    shown = passed(run("gke/run.sh", "experiments/ppo.py", *AWKWARD, **ALL))
    assert run.calls() == [["kubectl", "apply", "-f", "-"]]
    manifest = (run.workers / "stdin").read_text()
    assert "kind: JobSet\n" in manifest and "/rlhf_jax/experiments/ppo.py" in manifest
    assert "kubectl delete jobset ppo\n" in shown


def test_gke_applies_nothing_after_a_mistake(run):
    done = run("gke/run.sh", "experiments/ppo.py", **ALL | {"TOPOLOGY": "many"})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and run.calls() == []


def test_xpk_hands_the_command_to_a_shell(run):
    passed(run("xpk.sh", "experiments/ppo.py", *AWKWARD, **ALL))
    (call,) = run.calls()
    assert call[:-1] == ["xpk", "workload", "create", "--cluster", "tpus", "--workload", "ppo", "--tpu-type", "v6e-8",
                         "--num-slices", "1", "--docker-image", "image",
                         "--env", "JAX_COMPILATION_CACHE_DIR=/tmp/xla", "--command"]  # fmt: skip
    assert "\n" not in call[-1]  # it becomes one line of a manifest
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {call[-1]}"], capture_output=True, check=True).stdout
    assert words.decode().split("\0")[:-1] == ["python", "-u", "/rlhf_jax/experiments/ppo.py", *AWKWARD]


def test_slurm_starts_a_process_a_gpu_and_leaves_the_rest_to_jax(run):
    (run.fakes / "srun").write_text(FAKE + 'printf "%s" "${JAX_COORDINATOR_ADDRESS-unset} $JAX_COMPILATION_CACHE_DIR"')
    shown = passed(run("slurm.sbatch", "experiments/ppo.py", *AWKWARD, JAX_COORDINATOR_ADDRESS="old:1", **ALL))
    assert run.calls() == [["srun", "--kill-on-bad-exit=1", "--label", "python", "-u", "experiments/ppo.py", *AWKWARD]]
    assert shown == "unset .cache/xla"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (TPU / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options


def test_ssh_gives_every_host_its_number(run):
    hosts = ["me@gpu0", "me@gpu1", "me@gpu2"]
    logs = [python_of(run.workers / host) for host in hosts]
    try:
        passed(run("ssh.sh", "run", "experiments/ppo.py", *AWKWARD, HOSTS=" ".join(hosts)))
        assert [call[:2] for call in run.calls()] == [["ssh", host] for host in hosts]
        for process, log in enumerate(logs):
            arguments, environment = eval(said(log, 1)[0])
            assert arguments == AWKWARD
            assert environment == {
                "JAX_COORDINATOR_ADDRESS": "gpu0:12345", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(process),
                "JAX_COMPILATION_CACHE_DIR": "xla",
            }  # fmt: skip
    finally:
        passed(run("ssh.sh", "stop", HOSTS=" ".join(hosts)))
    assert [said(log, 2)[1] for log in logs] == ["interrupted"] * 3
