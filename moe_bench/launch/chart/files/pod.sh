# What every pod runs, with the command of the node's ranks as its arguments: lay out the run's directory, start the
# ranks, pass a stop on to them, and tell Kubernetes how they ended. Kubernetes expands a dollar before a parenthesis
# in commands, so there is no command substitution here.
set -euo pipefail
mkdir -p "$MOE_BENCH_RUN_DIR/logs" "$MOE_BENCH_RUN_DIR/results"
[[ "${PROFILE:-0}" == 0 ]] || mkdir -p "$MOE_BENCH_RUN_DIR/profiles"
if [[ ! -e "$MOE_BENCH_RUN_DIR/run.json" ]]; then
  cp /etc/moe-bench/run.json "$MOE_BENCH_RUN_DIR/.run.json.$NODE_RANK"
  mv "$MOE_BENCH_RUN_DIR/.run.json.$NODE_RANK" "$MOE_BENCH_RUN_DIR/run.json"
fi

ranks=
trap 'echo "moe_bench: pod $NODE_RANK is told to stop"; [[ -z "$ranks" ]] || kill -TERM "$ranks" || true' TERM

"$@" &
ranks=$!
while :; do
  rc=0
  wait "$ranks" || rc=$?
  kill -0 "$ranks" 2>/dev/null || break
done

# An exit code of 0 would count this pod as done, and the run would never go on.
if [[ "$rc" == 0 && -e "$MOE_BENCH_RUN_DIR/results/steps-left" ]]; then
  echo "moe_bench: stopped with steps left: exit 75, so that Kubernetes starts the pod again"
  exit 75
fi
exit "$rc"
