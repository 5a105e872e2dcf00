# shellcheck shell=bash
# One rank below torchrun, with its command as arguments: what it says goes to the pod's log and to its own file.
# A stop is for the rank alone: without tee its last words would kill it.
: > "$MOE_BENCH_RANK_PIDS/$BASHPID"
exec "$@" > >(trap '' TERM INT; exec tee -a "$MOE_BENCH_RUN_DIR/logs/rank-$RANK.log") 2>&1
