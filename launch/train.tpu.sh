#!/bin/bash
# Trains on Cloud TPU: asks for one or more slices, sets them up, and starts the same command on every host of all.
#
#   launch/train.tpu.sh create                  # waits in the queue; look with: launch/train.tpu.sh state
#   launch/train.tpu.sh setup                   # once the state is ACTIVE
#   launch/train.tpu.sh train configs/mixtral_8x7b.yaml run_dir=/mnt/shared/runs/8x7b
#   launch/train.tpu.sh delete
#
# The run, the data cache and the text must be on storage that all hosts share (a mounted bucket or Filestore). The
# command may be started again after whatever ended it.
set -euo pipefail
NAME=${NAME:-mixtral}
PROJECT=${PROJECT:?set PROJECT to your Google Cloud project}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-128}
SLICES=${SLICES:-1}
VERSION=${VERSION:-v2-alpha-tpuv5}
SOURCE=${SOURCE:?set SOURCE to where the hosts clone the repository from}

place=(--project "$PROJECT" --zone "$ZONE")
slices() { if [ "$SLICES" -eq 1 ]; then echo "$NAME"; else seq -f "$NAME-%g" 0 $((SLICES - 1)); fi; }

# Runs a command on every host of every slice, all at once.
everywhere() {
    local jobs=() slice code=0
    for slice in $(slices); do
        gcloud compute tpus tpu-vm ssh "$slice" "${place[@]}" --worker=all --command "$1" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    return "$code"
}

action=${1:?usage: launch/train.tpu.sh create|state|setup|train|delete ...}
shift
case $action in
create)
    if [ "$SLICES" -eq 1 ]; then nodes=(--node-id "$NAME"); else nodes=(--node-count "$SLICES" --node-prefix "$NAME"); fi
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${nodes[@]}" \
        --accelerator-type "$TYPE" --runtime-version "$VERSION"
    ;;
state) gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format 'value(state.state)' ;;
setup)
    everywhere "git clone $(printf %q "$SOURCE") mixtral_jax && cd mixtral_jax && python3 -m venv .venv &&
        .venv/bin/pip install -q -r requirements.txt 'jax[tpu]'"
    ;;
train) everywhere "cd mixtral_jax && .venv/bin/python -u train.py $(printf '%q ' "$@")" ;;
delete) gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force ;;
*) echo "'$action' is none of create, state, setup, train, delete" >&2; exit 2 ;;
esac
