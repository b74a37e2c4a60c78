#!/usr/bin/env bash
# Asks Google Cloud for a TPU slice: a queued resource, which waits for its turn. Run it again to see how that stands.
#
#   TPU_NAME=ppo ZONE=us-east5-b ACCELERATOR=v6e-8 tpu/vm/create.sh [--spot] [--direct]
#
# --spot        cheaper, and may be taken away at any time
# --direct      a VM at once or an error, no queue
# ACCELERATOR   v6e-N and v5litepod-N have N chips, v5p-N has N/2
# RUNTIME       the image of the VM; what follows from ACCELERATOR unless it is set
# The project is gcloud's: `gcloud config set project NAME`, or CLOUDSDK_CORE_PROJECT.
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${TPU_NAME:?set it to a name for the slice}"
: "${ZONE:?set it to a zone that has such TPUs}"
: "${ACCELERATOR:?set it to the kind and size of the slice, such as v6e-8}"

case "$ACCELERATOR" in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
runtime="${RUNTIME:-$runtime}"

spot='' direct=''
for option in "$@"; do
  case "$option" in
    --spot) spot=--spot ;;
    --direct) direct=yes ;;
    *) echo "create.sh: what is $option? (-h shows the use)" >&2; exit 2 ;;
  esac
done

if [[ -n $direct ]]; then
  if state=$(gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone "$ZONE" --format 'value(state)' 2> /dev/null); then
    echo "the TPU VM $TPU_NAME in $ZONE exists: $state"
  else
    gcloud compute tpus tpu-vm create "$TPU_NAME" --zone "$ZONE" \
      --accelerator-type "$ACCELERATOR" --version "$runtime" ${spot:+"$spot"}
  fi
elif state=$(gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$ZONE" \
  --format 'value(state.state)' 2> /dev/null); then
  echo "the queued resource $TPU_NAME in $ZONE exists: $state"
else
  gcloud compute tpus queued-resources create "$TPU_NAME" --zone "$ZONE" --node-id "$TPU_NAME" \
    --accelerator-type "$ACCELERATOR" --runtime-version "$runtime" ${spot:+"$spot"}
fi
