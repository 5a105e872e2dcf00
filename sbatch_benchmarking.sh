#!/usr/bin/env bash
# Submits MODEL to Slurm: MODEL=DeepSeek-V3 CLUSTER=my_cluster bash ./sbatch_benchmarking.sh [--megatron-flag value ...]
set -euo pipefail
presets="${WORKSPACE:-}" # a folder of presets and .conf files, if not this one
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap login
if [[ -n "$presets" ]]; then WORKSPACE="$presets"; else unset WORKSPACE; fi
exec "$PYTHON" -m moe_bench launch "${LAUNCHER:-slurm}" "$@"
