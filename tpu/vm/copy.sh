#!/usr/bin/env bash
# Brings the code to every worker of a TPU slice and installs it there.
#
#   TPU_NAME=ppo ZONE=us-east5-b tpu/vm/copy.sh [--changes]
#
# What is sent is the last commit, without its history; --changes adds what is not committed of files that git knows.
# On a worker ~/rlhf_jax has code/ (new each time) and venv/, and what runs leave beside them stays.
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit ;; esac
: "${TPU_NAME:?set it to the name of the slice}"
: "${ZONE:?set it to the zone of the slice}"
cd "$(dirname "$0")/../.."

commit=HEAD
if [[ ${1:-} == --changes ]]; then
  changes=$(git stash create) # a commit that no branch and no stash knows; nothing when nothing has changed
  commit="${changes:-HEAD}"
elif [[ $# -gt 0 ]]; then
  echo "copy.sh: what is $1? (-h shows the use)" >&2; exit 2
elif ! git diff --quiet HEAD; then
  echo "copy.sh: what is not committed stays here (--changes sends it)" >&2
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git archive --format tar.gz --output "$folder/rlhf_jax.tar.gz" "$commit"

gcloud compute tpus tpu-vm scp "$folder/rlhf_jax.tar.gz" "$TPU_NAME:" --zone "$ZONE" --worker all
# The image's own Python is older than the library needs: uv brings one.
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker all --command '
  set -eu
  mkdir -p rlhf_jax && cd rlhf_jax
  rm -rf code && mkdir code && tar -xzf ../rlhf_jax.tar.gz -C code
  python3 -m pip install --quiet --user uv
  [ -d venv ] || python3 -m uv venv --quiet --python 3.12 venv
  python3 -m uv pip install --quiet --python venv -c code/.ci/constraints.txt -e "./code[tpu]"
'
echo "copied $(git rev-parse --short "$commit") to every worker of $TPU_NAME"
