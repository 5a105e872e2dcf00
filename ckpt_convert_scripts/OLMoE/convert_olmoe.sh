#!/usr/bin/env bash
# MODEL=OLMoE-1B-7B SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/OLMoE/convert_olmoe.sh
set -euo pipefail
MODEL="${MODEL:-OLMoE-1B-7B}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
