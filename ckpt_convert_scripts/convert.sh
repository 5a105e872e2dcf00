# shellcheck shell=bash disable=SC2016
# Sourced by the scripts of each family. Environment: MODEL (a preset's name), SOURCE_CKPT_PATH (Hugging Face),
# TARGET_CKPT_PATH (torch_dist, ready for --load), and what `convert import --help` lists, as arguments.
# MEGATRON_PATH is accepted and not needed: no model is built.
WORKSPACE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
export WORKSPACE
# shellcheck source=moe_bench/bootstrap.sh
source "$WORKSPACE/moe_bench/bootstrap.sh"
require() { # require NAME WHAT
  [[ -n "${!1:-}" ]] || { echo "error: $1 is not set: $2" >&2; exit 2; }
}
require SOURCE_CKPT_PATH "the folder of the Hugging Face model"
require TARGET_CKPT_PATH "the folder to write the torch_dist checkpoint to"
bootstrap train
exec "$PYTHON" -m moe_bench convert import "$SOURCE_CKPT_PATH" "$TARGET_CKPT_PATH" \
  --preset "$WORKSPACE/model_configs/benchmarking/$MODEL.yaml" "$@"
