#!/usr/bin/env bash
# MODEL=Mixtral-8x7B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/Mixtral/convert_mixtral.sh
set -euo pipefail
MODEL="${MODEL:-Mixtral-8x7B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
