#!/usr/bin/env bash
# Submits MODEL to Slurm: MODEL=DeepSeek-V3 CLUSTER=my_cluster bash ./sbatch_benchmarking.sh [--megatron-flag value ...]
set -euo pipefail
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap login
exec "$PYTHON" -m moe_bench launch "${LAUNCHER:-slurm}" "$@"
