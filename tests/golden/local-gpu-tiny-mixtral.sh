#!/usr/bin/env bash
# Tiny-Mixtral, run run: one machine. Written by moe_bench.
set -euo pipefail

cd /project
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FWD_LAYERNORM_SM_MARGIN=0
export NVTE_BWD_LAYERNORM_SM_MARGIN=0
export BF16=false
export DENSE_LAYERS=0
export MOE_LAYERS=4
export MOE_ROUTER_DTYPE=fp32
export MOE_SHARED_EXPERT_GATE=true
export MTP=false
export MOE_BENCH_RUN_ID=run
export MOE_BENCH_RUN_DIR=/runs/run
export MOE_BENCH_MODEL=Tiny-Mixtral
export WANDB_MODE=disabled
export WANDB_PROJECT=moe-benchmarking-v0.19
export PROFILE=0
export WANDB_DIR=/runs/run
export OMP_NUM_THREADS=32
export PYTHONPATH=/project"${PYTHONPATH:+:$PYTHONPATH}"

exec bash /project/moe_bench/launch/templates/local.sh /venv/bin/python -m torch.distributed.run --nproc-per-node 2 --nnodes 1 --standalone --no-python bash /project/moe_bench/launch/templates/rank.sh /venv/bin/python -m moe_bench.runtime.pretrain \
  --tensor-model-parallel-size 1 \
  --sequence-parallel \
  --pipeline-model-parallel-size 1 \
  --context-parallel-size 1 \
  --expert-model-parallel-size 2 \
  --expert-tensor-parallel-size 1 \
  --use-distributed-optimizer \
  --use-mcore-models \
  --micro-batch-size 4 \
  --global-batch-size 8 \
  --train-iters 100 \
  --lr 1e-3 \
  --min-lr 1e-4 \
  --lr-decay-style cosine \
  --lr-decay-iters 100 \
  --lr-warmup-iters 10 \
  --adam-beta1 0.9 \
  --adam-beta2 0.95 \
  --weight-decay 0.1 \
  --clip-grad 1.0 \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
  --init-method-std 0.02 \
  --seed 1234 \
  --tokenizer-type NullTokenizer \
  --vocab-size 257 \
  --make-vocab-size-divisible-by 64 \
  --seq-length 256 \
  --max-position-embeddings 2048 \
  --data-cache-path /project/data_cache \
  --split 90,5,5 \
  --num-workers 0 \
  --no-create-attention-mask-in-dataloader \
  --num-layers 4 \
  --hidden-size 256 \
  --ffn-hidden-size 352 \
  --num-attention-heads 8 \
  --group-query-attention \
  --num-query-groups 2 \
  --rotary-base 1000000 \
  --norm-epsilon 1e-5 \
  --position-embedding-type rope \
  --normalization RMSNorm \
  --swiglu \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --num-experts 8 \
  --moe-router-topk 2 \
  --moe-router-load-balancing-type aux_loss \
  --moe-aux-loss-coeff 1e-2 \
  --moe-grouped-gemm \
  --moe-token-dispatcher-type alltoall \
  --transformer-impl transformer_engine \
  --eval-interval 50 \
  --eval-iters 2 \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-dir /runs/run/tensorboard \
  --log-timers-to-tensorboard \
  --log-memory-to-tensorboard \
  --log-validation-ppl-to-tensorboard \
  --data-path /corpus/demo
