#!/usr/bin/env bash
# Trains MODEL on this machine: MODEL=Tiny-DeepSeek-V3 bash ./interactive_benchmarking.sh [--megatron-flag value ...]
set -euo pipefail
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap train
exec "$PYTHON" -m moe_bench launch "${LAUNCHER:-local}" "$@"
