#!/usr/bin/env bash
# MODEL=DeepSeek-V2 SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/DeepSeek-V2/convert_deepseek_v2.sh
set -euo pipefail
MODEL="${MODEL:-DeepSeek-V2}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
