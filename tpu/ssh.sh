#!/usr/bin/env bash
# Runs one experiment on hosts that are reached by ssh, one process a host, which has all of its GPUs.
#
#   HOSTS="gpu0 gpu1" tpu/ssh.sh copy                                    the last commit to every host, installed
#   HOSTS="gpu0 gpu1" tpu/ssh.sh run experiments/ppo.py --steps 100      goes on when the connection ends
#   HOSTS="gpu0 gpu1" tpu/ssh.sh logs                                    of the first host, until Ctrl-C
#   HOSTS="gpu0 gpu1" tpu/ssh.sh stop                                    what Ctrl-C would do, on every host
#
# HOSTS         names that ssh knows; the first is process 0, and coordinates
# COORDINATOR   the first host as the others reach it, with a port that is open between them;
#               the first of HOSTS, port 12345, unless it is set
# CACHE         where compiled programs are kept, from ~/rlhf_jax on; xla, on each host's disk, unless it is set
# EXTRA         cuda unless it is set: which of the project's extras is installed
# On a host ~/rlhf_jax has code/ and venv/, the run folders, log and pid. It needs python3, 3.11 or newer, with venv.

# shellcheck disable=SC2029  # what is expanded here is meant to be
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
read -ra hosts <<< "${HOSTS:?set it to the names of the hosts}"
cd "$(dirname "$0")/.."

case "${1:-}" in
  copy)
    printf -v package '%q' "./code[${EXTRA:-cuda}]"
    for host in "${hosts[@]}"; do
      git archive --format tar.gz HEAD | ssh "$host" "
        set -eu
        mkdir -p rlhf_jax && cd rlhf_jax
        rm -rf code && mkdir code && tar -xzf - -C code
        [ -d venv ] || python3 -m venv venv
        venv/bin/pip install --quiet -c code/.ci/constraints.txt -e $package
      "
    done
    ;;
  run)
    : "${2:?name an experiment, such as experiments/ppo.py}"
    [[ -f $2 ]] || { echo "ssh.sh: there is no $2" >&2; exit 2; }
    printf -v command '%q ' "${@:2}"
    printf -v cache '%q' "${CACHE:-xla}"
    printf -v coordinator '%q' "${COORDINATOR:-${hosts[0]#*@}:12345}"
    for process in "${!hosts[@]}"; do
      ssh "${hosts[process]}" "
        set -eu
        cd rlhf_jax
        if [ -f pid ] && kill -0 \"\$(cat pid)\" 2> /dev/null; then
          echo \"\$(hostname) still runs process \$(cat pid): tpu/ssh.sh stop\" >&2
          exit 1
        fi
        export JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$process
        export JAX_COMPILATION_CACHE_DIR=$cache
        nohup venv/bin/python -u code/$command > log 2>&1 < /dev/null &
        echo \$! > pid
      " < /dev/null
    done
    ;;
  logs) ssh "${hosts[0]}" 'tail -n 100 -F rlhf_jax/log' ;;
  stop)
    # shellcheck disable=SC2016  # the host expands it
    for host in "${hosts[@]}"; do ssh "$host" 'kill -INT "$(cat rlhf_jax/pid)"' < /dev/null; done
    ;;
  *) echo "ssh.sh: copy, run, logs or stop? (-h shows the use)" >&2; exit 2 ;;
esac
