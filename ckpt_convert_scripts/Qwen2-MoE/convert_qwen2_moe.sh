#!/usr/bin/env bash
# MODEL=Qwen2-57B-A14B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Qwen2-MoE/convert_qwen2_moe.sh
set -euo pipefail
MODEL="${MODEL:-Qwen2-57B-A14B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
