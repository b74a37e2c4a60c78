#!/usr/bin/env bash
# Deletes a TPU slice with all that is on its disks, and does not ask: bring run folders home first.
#
#   TPU_NAME=ppo ZONE=us-east5-b tpu/vm/delete.sh
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to the zone of the slice}"

if gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$ZONE" > /dev/null 2>&1; then
  echo "deleting the queued resource $TPU_NAME in $ZONE, its VMs and their disks"
  gcloud compute tpus queued-resources delete "$TPU_NAME" --zone "$ZONE" --force --quiet
else
  echo "deleting the TPU VM $TPU_NAME in $ZONE and its disks"
  gcloud compute tpus tpu-vm delete "$TPU_NAME" --zone "$ZONE" --quiet
fi
