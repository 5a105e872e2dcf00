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
# Unit tests are many and short: one worker a core. The others start ranks and jobs of their own, which wait for one another
# more than they compute: two processes side by side. Those of tests/ranks fork from a process that has imported Megatron
# behind the embedding, which no other test may do before.
suite -n 2 tests/unit
log="$(mktemp)"
set -m # its own group of processes, which can be interrupted
suite tests/ranks </dev/null >"$log" 2>&1 &
ranks=$!
trap 'kill -INT -- "-$ranks" 2>/dev/null || true; rm -f "$log"' EXIT
rc=0
suite tests/end_to_end tests/cluster || rc=$?
[[ "$rc" != 2 ]] || exit 2 # interrupted
tail --pid="$ranks" --lines=+1 --follow "$log"
wait "$ranks" || rc=$?
exit "$rc"
