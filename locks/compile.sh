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
