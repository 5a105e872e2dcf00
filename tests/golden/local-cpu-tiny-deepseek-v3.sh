#!/usr/bin/env bash
# Tiny-DeepSeek-V3, run run: one machine. Written by moe_bench.
set -euo pipefail

cd /project
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FWD_LAYERNORM_SM_MARGIN=0
export NVTE_BWD_LAYERNORM_SM_MARGIN=0
export BF16=false
export DENSE_LAYERS=1
export MOE_LAYERS=3
export MOE_ROUTER_DTYPE=fp32
export MOE_SHARED_EXPERT_GATE=true
export MTP=1
export MOE_BENCH_RUN_ID=run
export MOE_BENCH_RUN_DIR=/runs/run
export MOE_BENCH_MODEL=Tiny-DeepSeek-V3
export WANDB_MODE=disabled
export WANDB_PROJECT=moe-benchmarking-v0.19
export PROFILE=0
export WANDB_DIR=/runs/run
export OMP_NUM_THREADS=4
export PYTHONPATH=/project"${PYTHONPATH:+:$PYTHONPATH}"

exec bash /project/moe_bench/launch/templates/local.sh /venv/bin/python -m moe_bench.runtime.local --nproc 2 -- \
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
  --hidden-size 192 \
  --ffn-hidden-size 512 \
  --num-attention-heads 6 \
  --multi-latent-attention \
  --qk-layernorm \
  --rotary-base 10000 \
  --norm-epsilon 1e-6 \
  --position-embedding-type rope \
  --normalization RMSNorm \
  --swiglu \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --num-experts 16 \
  --moe-layer-freq '([0]*1+[1]*3)' \
  --moe-ffn-hidden-size 128 \
  --moe-shared-expert-intermediate-size 128 \
  --moe-router-topk 4 \
  --moe-router-num-groups 4 \
  --moe-router-group-topk 2 \
  --moe-router-score-function sigmoid \
  --moe-router-enable-expert-bias \
  --moe-router-bias-update-rate 1e-2 \
  --moe-router-topk-scaling-factor 2.5 \
  --moe-router-load-balancing-type seq_aux_loss \
  --moe-aux-loss-coeff 1e-4 \
  --moe-router-dtype fp32 \
  --moe-grouped-gemm \
  --moe-token-dispatcher-type alltoall \
  --q-lora-rank 96 \
  --kv-lora-rank 64 \
  --qk-head-dim 32 \
  --qk-pos-emb-head-dim 16 \
  --v-head-dim 32 \
  --rotary-scaling-factor 40 \
  --mscale 1.0 \
  --mscale-all-dim 1.0 \
  --no-rope-fusion \
  --mtp-num-layers 1 \
  --mtp-loss-scaling-factor 0.1 \
  --transformer-impl local \
  --eval-interval 50 \
  --eval-iters 2 \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-dir /runs/run/tensorboard \
  --log-timers-to-tensorboard \
  --log-memory-to-tensorboard \
  --log-validation-ppl-to-tensorboard \
  --data-path /corpus/demo \
  --distributed-backend gloo \
  --use-cpu-initialization \
  --no-masked-softmax-fusion \
  --no-bias-gelu-fusion \
  --no-bias-swiglu-fusion \
  --no-bias-dropout-fusion \
  --no-gradient-accumulation-fusion \
  --no-persist-layer-norm
