#!/bin/bash
# Trains under Open MPI, one process a host. The hosts share the repository's and the run's storage.
#
#   HOSTS=node1,node2 launch/train.mpi.sh configs/mixtral_8x7b.yaml run_dir=/shared/runs/8x7b
set -euo pipefail
HOSTS=${HOSTS:?name the hosts: HOSTS=node1,node2,...}
PORT=${PORT:-8476}  # free on the first host, and open to the others
ROOT=${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
exec mpirun --host "$HOSTS" --map-by ppr:1:node --bind-to none \
    "$PYTHON" -u "$ROOT/train.py" "$@" "distributed.coordinator=${HOSTS%%[,:]*}:$PORT"
