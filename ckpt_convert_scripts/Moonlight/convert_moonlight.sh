#!/usr/bin/env bash
# MODEL=Moonlight-16B-A3B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Moonlight/convert_moonlight.sh
set -euo pipefail
MODEL="${MODEL:-Moonlight-16B-A3B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
