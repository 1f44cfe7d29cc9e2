#!/bin/bash
# Prepares data on a SLURM cluster. Run it on a login node (not with sbatch): each stage becomes an array of jobs that
# waits for the one before, and the last job writes the report. The output directory must be on a shared file system.
# After a failure the same command goes on with what is not done.
#
#   launch/prepare.slurm.sh configs/prepare_crawl.yaml executor.partition=cpu "executor.setup='source venv/bin/activate'"
set -euo pipefail
config=${1:?usage: launch/prepare.slurm.sh CONFIG [key=value ...]}
shift
exec python -m mixtral_jax prepare "$config" executor.kind=slurm "$@"
