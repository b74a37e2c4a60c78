#!/usr/bin/env bash
# Starts one experiment on a cluster that xpk made (`xpk cluster create --cluster NAME --tpu-type v6e-16 ...`).
#
#   CLUSTER=tpus NAME=ppo IMAGE=... ACCELERATOR=v6e-16 tpu/xpk.sh experiments/ppo.py --steps 100
#
# IMAGE         as in tpu/gke/run.sh
# ACCELERATOR   as in tpu/vm/create.sh
# CACHE         where compiled programs are kept; /tmp/xla, which ends with the pod, unless it is set
# Project and zone are gcloud's. xpk writes the JobSet, queues it with Kueue and says where its logs are.
# `xpk workload list --cluster NAME` shows it, `xpk workload delete --cluster NAME --workload NAME` ends it.
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${CLUSTER:?set it to the name of the cluster}"
: "${NAME:?set it to a name for the workload}"
: "${IMAGE:?set it to the image that was built with tpu/gke/Dockerfile}"
: "${ACCELERATOR:?set it to the kind and size of the slice, such as v6e-16}"
: "${1:?name an experiment, such as experiments/ppo.py}"

printf -v command '%q ' python -u "/rlhf_jax/$1" "${@:2}" # xpk puts it into a shell script
xpk workload create --cluster "$CLUSTER" --workload "$NAME" --tpu-type "$ACCELERATOR" --num-slices 1 \
  --docker-image "$IMAGE" --env "JAX_COMPILATION_CACHE_DIR=${CACHE:-/tmp/xla}" --command "$command"
