#!/usr/bin/env bash
# MODEL=Qwen3-Next-80B-A3B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Qwen3-Next/convert_qwen3_next.sh
set -euo pipefail
MODEL="${MODEL:-Qwen3-Next-80B-A3B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
