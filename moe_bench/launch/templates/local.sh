# shellcheck shell=bash
# What the script of a run on this machine runs, with the command of its ranks as arguments: passes a stop on to them.
# They are a process group of their own, so that Ctrl-C reaches this shell alone: torch's agent would hear it as well,
# and kill its ranks 30 s later, in the middle of a checkpoint.
set -euo pipefail
results="$MOE_BENCH_RUN_DIR/results" signal=0 hurry='' ranks='' early=0
rm -f "$results/stop"

# shellcheck disable=SC2329 # the traps call it
stop() { # stop NUMBER: the first time ask, where there is a step to save, then make the ranks end, then kill them
  if [[ -z "$ranks" ]]; then early=$1; return; fi
  signal=$1
  if [[ -z "$hurry" && ! -e "$results/stop" && -s "$results/steps.jsonl" ]]; then
    echo "moe_bench: after this step the ranks save (with --save) and end; a second signal ends them at once" >&2
    touch "$results/stop"
  else
    kill "-${hurry:=TERM}" -- "-$ranks" 2>/dev/null || true
    hurry=KILL
  fi
}
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM

set -m
"$@" </dev/null &
ranks=$!
set +m
(( early == 0 )) || stop "$early"
while kill -0 "$ranks" 2>/dev/null; do
  wait "$ranks" || true # a signal ends this as well, with its own number
done
rc=0
wait "$ranks" || rc=$? # of ranks that are gone: their status
(( rc != 0 || signal == 0 )) || rc=$((128 + signal))
exit "$rc"
