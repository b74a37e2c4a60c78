#!/usr/bin/env bash
# Starts one experiment on every worker of a TPU slice; it goes on when the connection ends. logs.sh shows what it says.
#
#   TPU_NAME=ppo ZONE=us-east5-b tpu/vm/run.sh experiments/ppo.py --steps 100
#   TPU_NAME=ppo ZONE=us-east5-b tpu/vm/run.sh --stop        what Ctrl-C would do, on every worker
#
# CACHE   where compiled programs are kept, from ~/rlhf_jax on; xla, a folder of the worker's disk, unless it is set
# The experiment runs in ~/rlhf_jax, so that its run folder is ~/rlhf_jax/runs/... there. A worker runs one at a time.
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to the zone of the slice}"
: "${1:?name an experiment, such as experiments/ppo.py}"

if [[ $1 == --stop ]]; then
  # shellcheck disable=SC2016  # the worker expands it
  remote='kill -INT "$(cat rlhf_jax/pid)"'
else
  [[ -f "$(dirname "$0")/../../$1" ]] || { echo "run.sh: there is no $1" >&2; exit 2; }
  printf -v command '%q ' "$@"
  printf -v cache '%q' "${CACHE:-xla}"
  remote="
    set -eu
    cd rlhf_jax
    if [ -f pid ] && kill -0 \"\$(cat pid)\" 2> /dev/null; then
      echo \"\$(hostname) still runs process \$(cat pid): tpu/vm/run.sh --stop\" >&2
      exit 1
    fi
    export JAX_COMPILATION_CACHE_DIR=$cache
    nohup venv/bin/python -u code/$command > log 2>&1 < /dev/null &
    echo \$! > pid
  "
fi
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker all --command "$remote"
