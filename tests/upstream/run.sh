#!/usr/bin/env bash
# Megatron-LM's own unit tests on the CPU embedding: `bash tests/upstream/run.sh CHECKOUT [RANKS] [FILES...]`.
# EXTRA_PACKAGES: a folder with what these tests need besides (pytest-mock, einops, scipy). Prints passed, failed and skipped by file; the whole output is in $OUTPUT (default: a new folder under /tmp).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
checkout="$(cd "$1" && pwd)"
ranks="${2:-1}"
files=("${@:3}")
output="${OUTPUT:-$(mktemp -d)}"
mkdir -p "$output"
python="${PYTHON:-$root/.venv/bin/python}"
[[ ${#files[@]} -gt 0 ]] || mapfile -t files < <(grep -v '^#' "$root/tests/upstream/files.txt")
export PYTHONPATH="$checkout:$root/tests/upstream:$root${EXTRA_PACKAGES:+:$EXTRA_PACKAGES}" TORCHDYNAMO_DISABLE=1 CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONDONTWRITEBYTECODE=1
cd "$checkout"
pytest_arguments=(-p embedding_plugin -p no:cacheprovider -q -rfEs --timeout "${TEST_TIMEOUT:-60}" --tb=line)
for file in "${files[@]}"; do
  log="$output/$(tr / _ <<<"${file%.py}").log"
  timeout "${FILE_TIMEOUT:-240}" "$python" -m torch.distributed.run --nproc-per-node "$ranks" --log-dir "$output/ranks" --local-ranks-filter 0 \
    -m pytest "${pytest_arguments[@]}" "tests/unit_tests/$file" >"$log" 2>&1 || true
  printf '%-62s %s\n' "$file" "$(grep -E '^[0-9=].*(passed|failed|skipped|error|no tests)' "$log" | tail -n 1)"
done
echo "output: $output"
