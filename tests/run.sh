#!/usr/bin/env bash
# Run all tests: `bash tests/run.sh [pytest arguments]`. Sets itself up on first use; slow campaigns: -m slow. On a machine
# with GPUs: `bash tests/run.sh -m gpu` (docs/gpu.md), in the environment that training would use there, if it has pytest.
set -euo pipefail
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
if [[ "${1:-} ${2:-}" == "-m gpu" ]]; then
  bootstrap gpu
  cd "$WORKSPACE"
  # An image brings pytest without the plugins that pyproject.toml configures, and strictness would refuse it for that.
  exec "$PYTHON" -m pytest -o addopts=--import-mode=importlib -v -rs "$@" tests/gpu
fi
bootstrap dev
cd "$WORKSPACE"
if [[ $# -gt 0 ]]; then exec "$PYTHON" -m pytest "$@"; fi
suite() { "$PYTHON" -m pytest -q --durations=10 -m "not slow and not gpu" "$@"; }
# Unit tests are many and short: one worker a core. The others start ranks of their own, so they run one by one; those of
# tests/ranks fork from a process that has imported Megatron behind the embedding, which no other test may do before.
suite -n 2 tests/unit
suite tests/end_to_end tests/cluster
suite tests/ranks
