#!/usr/bin/env bash
# Run all tests: `bash tests/run.sh [pytest arguments]`. Sets itself up on first use; slow campaigns: -m slow.
set -euo pipefail
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap dev
cd "$WORKSPACE"
if [[ $# -gt 0 ]]; then exec "$PYTHON" -m pytest "$@"; fi
# Unit tests are many and short: one worker a core. The others start ranks of their own, so they run one by one.
"$PYTHON" -m pytest -q -n 2 -m "not slow and not gpu" tests/unit
exec "$PYTHON" -m pytest -q --durations=15 -m "not slow and not gpu" --ignore=tests/unit tests
