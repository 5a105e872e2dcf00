#!/usr/bin/env bash
# DeepSeek-V3, run run: a rehearsal, NOT the real model. Written by moe_bench.
set -euo pipefail

cd /project
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1
export NVTE_FUSED_ATTN=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_NVLS_ENABLE=0
export NCCL_GRAPH_REGISTER=0
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NVTE_FWD_LAYERNORM_SM_MARGIN=0
export NVTE_BWD_LAYERNORM_SM_MARGIN=0
export BF16=true
export DENSE_LAYERS=3
export MOE_LAYERS=58
export MOE_ROUTER_DTYPE=fp32
export MOE_SHARED_EXPERT_GATE=true
export MTP=1
export MOE_BENCH_RUN_ID=run
export MOE_BENCH_RUN_DIR=/runs/run
export MOE_BENCH_MODEL=DeepSeek-V3
export WANDB_MODE=disabled
export WANDB_PROJECT=moe-benchmarking-v0.19
export PROFILE=0
export WANDB_DIR=/runs/run
export OMP_NUM_THREADS=2
export PYTHONPATH=/project"${PYTHONPATH:+:$PYTHONPATH}"

exec bash /project/moe_bench/launch/templates/local.sh /venv/bin/python -m moe_bench.runtime.local --nproc 4 -- \
  --distributed-timeout-minutes 60 \
  --tensor-model-parallel-size 1 \
  --sequence-parallel \
  --pipeline-model-parallel-size 2 \
  --context-parallel-size 1 \
  --expert-model-parallel-size 2 \
  --expert-tensor-parallel-size 1 \
  --use-distributed-optimizer \
  --overlap-grad-reduce \
  --overlap-param-gather \
  --use-mcore-models \
  --micro-batch-size 1 \
  --global-batch-size 8 \
  --train-iters 20 \
  --exit-duration-in-mins 230 \
  --lr 1e-3 \
  --min-lr 1e-4 \
  --lr-decay-style cosine \
  --lr-warmup-fraction 0.01 \
  --adam-beta1 0.9 \
  --adam-beta2 0.95 \
  --weight-decay 0.1 \
  --clip-grad 1.0 \
  --attention-dropout 0.0 \
  --hidden-dropout 0.0 \
  --init-method-std 0.02 \
  --bf16 \
  --manual-gc \
  --manual-gc-interval 10 \
  --tokenizer-type NullTokenizer \
  --vocab-size 257 \
  --make-vocab-size-divisible-by 64 \
  --seq-length 128 \
  --data-cache-path /project/data_cache \
  --split 99,1,0 \
  --no-mmap-bin-files \
  --num-workers 0 \
  --no-create-attention-mask-in-dataloader \
  --num-layers 5 \
  --hidden-size 128 \
  --ffn-hidden-size 256 \
  --num-attention-heads 4 \
  --multi-latent-attention \
  --kv-channels 32 \
  --qk-layernorm \
  --max-position-embeddings 4096 \
  --position-embedding-type rope \
  --rotary-base 10000 \
  --normalization RMSNorm \
  --norm-epsilon 1e-6 \
  --swiglu \
  --disable-bias-linear \
  --untie-embeddings-and-output-weights \
  --num-experts 16 \
  --moe-layer-freq '[0,1,1,1,1]' \
  --moe-ffn-hidden-size 64 \
  --moe-shared-expert-intermediate-size 64 \
  --moe-router-topk 4 \
  --moe-router-num-groups 4 \
  --moe-router-group-topk 2 \
  --moe-router-score-function sigmoid \
  --moe-router-enable-expert-bias \
  --moe-router-bias-update-rate 1e-3 \
  --moe-router-topk-scaling-factor 2.5 \
  --moe-router-load-balancing-type seq_aux_loss \
  --moe-aux-loss-coeff 1e-4 \
  --moe-router-dtype fp32 \
  --moe-grouped-gemm \
  --moe-token-dispatcher-type alltoall \
  --q-lora-rank 64 \
  --kv-lora-rank 48 \
  --qk-head-dim 32 \
  --qk-pos-emb-head-dim 16 \
  --v-head-dim 32 \
  --rotary-scaling-factor 40 \
  --mscale 1.0 \
  --mscale-all-dim 1.0 \
  --mtp-num-layers 1 \
  --mtp-loss-scaling-factor 0.1 \
  --transformer-impl local \
  --eval-interval 500 \
  --eval-iters 1 \
  --no-load-optim \
  --no-load-rng \
  --auto-detect-ckpt-format \
  --save /runs/run/checkpoints \
  --save-interval 500 \
  --dist-ckpt-strictness log_all \
  --log-interval 1 \
  --log-throughput \
  --tensorboard-dir /runs/run/tensorboard \
  --log-timers-to-tensorboard \
  --log-memory-to-tensorboard \
  --log-validation-ppl-to-tensorboard \
  --logging-level 40 \
  --wandb-project moe-benchmarking-v0.19 \
  --wandb-exp-name REHEARSAL-DeepSeek-V3-TP1PP16EP64CP1VPP1-MBS1GBS8192-v0.19 \
  --wandb-save-dir /runs/run/wandb \
  --decoder-first-pipeline-num-layers 3 \
  --decoder-last-pipeline-num-layers 2 \
  --data-path /corpus/demo \
  --distributed-backend gloo \
  --use-cpu-initialization \
  --no-masked-softmax-fusion \
  --no-bias-gelu-fusion \
  --no-bias-swiglu-fusion \
  --no-bias-dropout-fusion \
  --no-rope-fusion \
  --no-gradient-accumulation-fusion \
  --no-persist-layer-norm
