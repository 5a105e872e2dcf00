#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=00:20:00
#SBATCH --job-name=moe-demo
#SBATCH --output=/runs/20261121-120000-Tiny-Qwen3-0a1b/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --exclusive

# Tiny-Qwen3, run 20261121-120000-Tiny-Qwen3-0a1b; made by moe_bench, see run.json beside this file.
set -euo pipefail

export MOE_BENCH_RUN_DIR=/runs/20261121-120000-Tiny-Qwen3-0a1b
export OMP_NUM_THREADS=1
export PYTHONPATH=/opt/moe_bench"${PYTHONPATH:+:$PYTHONPATH}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton_cache_${SLURM_JOB_ID}}"
unset SLURM_CPU_BIND SLURM_CPU_BIND_LIST

echo "moe_bench: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST, rendezvous $MASTER_ADDR:$MASTER_PORT"

# Slurm's warning before the time limit reaches this shell only. The ranks save a checkpoint and end when they get the
# signal; scancel sends it to all processes of the step, so it is one that only a rank heeds. The file is for ranks that
# do not listen yet.
warned=0 stop="$MOE_BENCH_RUN_DIR/results/stop"
rm -f "$stop"
warn() {
  echo "moe_bench: Slurm is about to end the job (time limit, preemption): asking for a checkpoint"
  warned=1
  touch "$stop"
  scancel --signal=URG "$SLURM_JOB_ID.0" || true
}
trap warn USR1 TERM

srun \
  --kill-on-bad-exit=1 \
  --mpi=none \
  --cpu-bind=none \
  --open-mode=append \
  --output=/runs/20261121-120000-Tiny-Qwen3-0a1b/logs/rank-%t.log \
  /opt/moe_bench/.venv/bin/python -m moe_bench.runtime.pretrain \
    --num-layers 4 \
    --swiglu \
    --data-path '/data/a b/corpus' \
    --lr 1e-3 &
step=$!
rc=0
while :; do
  rc=0
  wait "$step" || rc=$?
  kill -0 "$step" 2>/dev/null || break
done
echo "moe_bench: srun ended with $rc"

silent_nodes() { # the nodes that no longer start a task, found by asking each for itself
  local node pids=() names=() i
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --mpi=none --output=/dev/null true 2>/dev/null &
    pids+=("$!") names+=("$node")
  done
  for i in "${!pids[@]}"; do
    wait "${pids[i]}" || echo "${names[i]}"
  done
}

is_running() { # false once Slurm is ending the job: cancelled, or requeued by Slurm itself
  [[ "$(squeue --noheader --states=RUNNING --format=%T --jobs "$SLURM_JOB_ID" 2>/dev/null)" == RUNNING ]]
}

go_on() { # go_on REASON: back into the queue, unless the job is being cancelled or its restarts are spent
  if ! is_running; then
    echo "moe_bench: $1; not requeued: Slurm is ending the job"
  elif (( ${SLURM_RESTART_COUNT:-0} >= 10 )); then
    echo "moe_bench: $1; not requeued: 10 restarts are spent (MAX_REQUEUES)"
  else
    echo "moe_bench: $1: requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
}

if [[ "$rc" == 0 && -e "$MOE_BENCH_RUN_DIR/results/steps-left" ]]; then
  echo "moe_bench: stopped with steps left; not requeued: without --save there is nothing to go on from"
elif [[ "$rc" == 143 && "$warned" == 1 ]]; then
  go_on "warned before the first step"
elif [[ "$rc" != 0 && "$SLURM_JOB_NUM_NODES" != 1 ]] && is_running; then
  silent="$(silent_nodes)"
  [[ -z "$silent" ]] || go_on "node failure: ${silent//$'\n'/ } does not answer"
fi
exit "$rc"
