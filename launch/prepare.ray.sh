#!/bin/bash
# Prepares data on a Ray cluster: run it on a node of the cluster, after `ray start`. Every node needs the package with
# its extra, `pip install '.[prepare]' ray`, and the output directory on a shared file system.
#
#   launch/prepare.ray.sh configs/prepare_crawl.yaml executor.workers=200
set -euo pipefail
config=${1:?usage: launch/prepare.ray.sh CONFIG [key=value ...]}
shift
export RAY_ADDRESS=${RAY_ADDRESS:-auto}
exec python -m mixtral_jax prepare "$config" executor.kind=ray "$@"
