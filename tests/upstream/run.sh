#!/usr/bin/env bash
# Megatron-LM's own unit tests, unmodified, on CPU ranks behind the embedding:
#   bash tests/upstream/run.sh CHECKOUT [--ranks N] [--output FOLDER] [FILE|FILE::TEST ...]
# CHECKOUT is a Megatron-LM tree (git worktree add ../mlm core_v0.19.0); FILEs are relative to its tests/unit_tests, by default
# those of files.txt. What these tests import and the project does not (requirements.txt, pinned) is put into
# .cache/upstream on first use and seen by this run alone.
set -euo pipefail
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
bootstrap dev
packages="$WORKSPACE/.cache/upstream/packages"
if ! cmp -s "$WORKSPACE/tests/upstream/requirements.txt" "$packages/requirements.txt"; then
  rm -rf "$packages"
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$packages" \
    -r "$WORKSPACE/tests/upstream/requirements.txt"
  cp "$WORKSPACE/tests/upstream/requirements.txt" "$packages/requirements.txt"
fi
export PYTHONPATH="$PYTHONPATH:$packages"
output=()
[[ " $* " == *" --output"* ]] || output=(--output "$(mktemp -d)")
exec "$PYTHON" "$WORKSPACE/tests/upstream/run_files.py" "$@" "${output[@]}"
