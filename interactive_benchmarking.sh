#!/usr/bin/env bash
# Trains MODEL on this machine: MODEL=Tiny-DeepSeek-V3 bash ./interactive_benchmarking.sh [--megatron-flag value ...]
set -euo pipefail
presets="${WORKSPACE:-}" # a folder of presets and .conf files, if not this one
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap train
if [[ -n "$presets" ]]; then WORKSPACE="$presets"; else unset WORKSPACE; fi
exec "$PYTHON" -m moe_bench launch "${LAUNCHER:-local}" "$@"
