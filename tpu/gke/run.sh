#!/usr/bin/env bash
# Starts one experiment on every host of a TPU slice of a GKE cluster that has JobSet.
#
#   NAME=ppo IMAGE=... CLAIM=shared ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 tpu/gke/run.sh experiments/ppo.py --steps 100
#
# IMAGE            git archive HEAD | docker build -f tpu/gke/Dockerfile -t IMAGE - && docker push IMAGE
# CLAIM            a PersistentVolumeClaim that all hosts may write to: run folders and compiled programs
# ACCELERATOR, TOPOLOGY   the node pool's: tpu-v6e-slice 4x4, tpu-v5p-slice 2x2x4, tpu-v5-lite-podslice 4x4
# CHIPS_PER_HOST   4 unless it is set (machine types that end in -4t)
# RESTARTS         how often all workers start again when one fails; 0 unless it is set
# python3 tpu/gke/manifest.py, with the same, only prints the manifest.
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac

manifest=$(python3 "$(dirname "$0")/manifest.py" "$@")
kubectl apply -f - <<< "$manifest"
worker="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
echo "logs:    kubectl logs --follow --selector $worker"
echo "delete:  kubectl delete jobset $NAME"
