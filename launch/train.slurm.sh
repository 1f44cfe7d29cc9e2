#!/bin/bash
# Trains on a SLURM cluster, one process a node. Set what is between the lines, then:
#
#   sbatch launch/train.slurm.sh configs/mixtral_8x7b.yaml run_dir=/shared/runs/8x7b
#
# The run, the data cache and the text must be on storage that all nodes share. Five minutes before its time is up, the
# job saves and queues itself again; so it does when a node is lost. docs/cluster.md has the exit codes.
# ----------------------------------------------------------------------------------------------------------------------
#SBATCH --job-name=mixtral
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}       # the repository
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}      # of an environment on shared storage
MOST_RESTARTS=${MOST_RESTARTS:-50}
# ----------------------------------------------------------------------------------------------------------------------
set -uo pipefail

again=no
# To the processes, not to this script: they save the same step and end.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 --cpu-bind=none "$PYTHON" -u "$ROOT/train.py" "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ended the waiting, not the step
    wait "$step"
    code=$?
done
# 75 and more: a process, a node or the network was lost. 1 is a crash and 2 a mistake in the input: once more helps not.
[ "$code" -ge 75 ] && again=yes

if [ "$again" = yes ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
