#!/usr/bin/env bash
# Re-pin every lock file from pyproject.toml, with hashes and without addresses. Run after editing dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv="${UV:-uv}"
lock() { # lock FILE [EXTRA...]
  local file="$1"; shift
  "$uv" pip compile --quiet --generate-hashes --no-header --no-emit-index-url --no-emit-find-links \
    --universal --python-version 3.12 --annotation-style line "$@" -o "locks/$file" pyproject.toml
}
lock dev.txt --extra dev
lock train.txt --extra train --constraint locks/dev.txt
lock login.txt --constraint locks/dev.txt
# For images that bring torch, CUDA and their kin of their own: everything else a rank needs, installed with --no-deps.
mapfile -t brought < <(grep -oE '^(torch|triton|numpy|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)(==)' locks/train.txt | tr -d = | grep -v nvidia-ml-py)
lock container.txt --extra train --constraint locks/dev.txt "${brought[@]/#/--no-emit-package=}"
# DeepEP is built against it in images.
"$uv" pip compile --quiet --generate-hashes --no-header --no-emit-index-url --no-emit-find-links --universal --no-deps \
  --python-version 3.12 --annotation-style line --constraint locks/dev.txt -o locks/nvshmem.txt - <<<nvidia-nvshmem-cu13
