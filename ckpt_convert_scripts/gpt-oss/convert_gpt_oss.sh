#!/usr/bin/env bash
# MODEL=gpt-oss-20b SOURCE_CKPT_PATH=... TARGET_CKPT_PATH=... bash ./ckpt_convert_scripts/gpt-oss/convert_gpt_oss.sh
set -euo pipefail
MODEL="${MODEL:-gpt-oss-20b}"
# shellcheck source=ckpt_convert_scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../convert.sh"
