#!/usr/bin/env bash
# MODEL=Kimi-K2 SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Kimi-K2/convert_kimi_k2.sh
set -euo pipefail
MODEL="${MODEL:-Kimi-K2}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
