#!/usr/bin/env bash
# MODEL=GLM-4.5-Air SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/GLM-4.5/convert_glm_4_5.sh
set -euo pipefail
MODEL="${MODEL:-GLM-4.5-Air}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
