#!/usr/bin/env bash
# Follows what a run prints, until Ctrl-C; the run goes on.
#
#   TPU_NAME=ppo ZONE=us-east5-b tpu/vm/logs.sh [WORKER]
#
# WORKER   a number (0 unless it is given), or all: each line then begins with its worker's name
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to the zone of the slice}"

worker="${1:-0}"
remote='tail -n 100 -F rlhf_jax/log'
if [[ $worker == all ]]; then
  # shellcheck disable=SC2016  # the worker expands it
  remote+=' | sed -u "s/^/$(hostname): /"'
fi
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker "$worker" --command "$remote"
