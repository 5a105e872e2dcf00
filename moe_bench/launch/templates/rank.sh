# shellcheck shell=bash
# One rank below torchrun, with its command as arguments: what it says goes where `logs` and `status` look, since
# torchrun's own files lie in folders of its making.
exec "$@" >>"$MOE_BENCH_RUN_DIR/logs/rank-$RANK.log" 2>&1
