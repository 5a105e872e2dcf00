# shellcheck shell=bash
# What every pod runs, with the command of the node's ranks as its arguments: lay out the run's directory, start the
# ranks, pass a stop on to them, and tell Kubernetes how they ended. In commands Kubernetes reads a dollar before a
# parenthesis or another dollar as its own, so neither stands here.
set -euo pipefail
mkdir -p "$MOE_BENCH_RUN_DIR/logs" "$MOE_BENCH_RUN_DIR/results"
[[ "${PROFILE:-0}" == 0 ]] || mkdir -p "$MOE_BENCH_RUN_DIR/profiles"
if [[ ! -e "$MOE_BENCH_RUN_DIR/run.json" ]]; then
  cp /etc/moe-bench/run.json "$MOE_BENCH_RUN_DIR/.run.json.$NODE_RANK"
  mv "$MOE_BENCH_RUN_DIR/.run.json.$NODE_RANK" "$MOE_BENCH_RUN_DIR/run.json"
fi

# Of a run that is over a pod that starts once more has nothing to do, and the others would not come to meet it.
if tail -n 1 "$MOE_BENCH_RUN_DIR/results/events.jsonl" 2>/dev/null | grep -q '"event":"end".*"outcome":"completed"'; then
  echo "moe_bench: the run is complete already"
  exit 0
fi

# The ranks are told themselves: torchrun would kill them 30 s later, in the middle of a checkpoint.
read -r MOE_BENCH_RANK_PIDS < <(mktemp -d /tmp/moe-bench-XXXXXX)
export MOE_BENCH_RANK_PIDS
torchrun='' told=0 early=0

# shellcheck disable=SC2329 # the trap calls it
stop() {
  local rank
  if [[ -z "$torchrun" ]]; then early=1; return; fi
  echo "moe_bench: pod $NODE_RANK is told to stop: asking its ranks for a checkpoint"
  for rank in "$MOE_BENCH_RANK_PIDS"/*; do
    if kill -TERM "${rank##*/}" 2>/dev/null; then told=1; fi
  done
  [[ "$told" == 1 ]] || kill -TERM "$torchrun" || true
}
trap stop TERM

"$@" &
torchrun=$!
[[ "$early" == 0 ]] || stop
while :; do
  rc=0
  wait "$torchrun" || rc=$?
  kill -0 "$torchrun" 2>/dev/null || break
done
rm -rf "$MOE_BENCH_RANK_PIDS"

# An exit code of 0 would count this pod as done, and the run would never go on.
if [[ "$rc" == 0 && -e "$MOE_BENCH_RUN_DIR/results/steps-left" ]]; then
  echo "moe_bench: stopped with steps left: exit 75, so that Kubernetes starts the pod again"
  exit 75
fi
exit "$rc"
