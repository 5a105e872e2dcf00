#!/usr/bin/env bash
# MODEL=Qwen3-30B-A3B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Qwen3-MoE/convert_qwen3_moe.sh
set -euo pipefail
MODEL="${MODEL:-Qwen3-30B-A3B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
