#!/usr/bin/env bash
# MODEL=DeepSeek-V3 SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/DeepSeek-V3/convert_deepseek_v3.sh
set -euo pipefail
MODEL="${MODEL:-DeepSeek-V3}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
