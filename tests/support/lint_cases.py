"""One case a lint rule: settings at which it speaks, and the change that quiets it.

`--flag value; --switch; NAME=value` are a run's flags and variables; te=, torch=, compute= and mcore= versions; lacks= a package. The second text
is laid over the first; `!--flag` or `!NAME` takes one out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moe_bench.config.run import ResolvedRun, Setting
from tests.support.runs import make_run, setting

FP8 = "--fp8-format hybrid; --num-experts 8"
FLEX = "--moe-token-dispatcher-type flex; --num-experts 8; --expert-model-parallel-size 2; --moe-router-dtype fp32"
SELECT = "--recompute-granularity selective; --num-experts 8; --moe-grouped-gemm"
A2A = (
    "--overlap-moe-expert-parallel-comm; --num-experts 8; --expert-model-parallel-size 2; "
    "--moe-token-dispatcher-type alltoall; --bf16"
)
DSA = (
    "--multi-latent-attention; --experimental-attention-variant dsa; --transformer-impl transformer_engine; "
    "--dsa-indexer-n-heads 4; --dsa-indexer-head-dim 64; --dsa-indexer-topk 64; --no-rope-fusion"
)
PP = "--pipeline-model-parallel-size 2"
TP = "--tensor-model-parallel-size 2; CUDA_DEVICE_MAX_CONNECTIONS=1"
GRAPH = "--cuda-graph-impl transformer_engine; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
GROUPS = (
    "--num-experts 8; --moe-router-num-groups 4; --moe-router-group-topk 2; --moe-router-topk 4"
)
DO = "--use-distributed-optimizer"

CASES: dict[str, tuple[str, str]] = {
    "needs-megatron-lms-own-entry": ("--sft", "MEGATRON_PATH=/mlm"),
    "async-save-needs-the-persistent-worker": (
        "--async-save; --save /ck; --save-interval 5",
        "--use-persistent-ckpt-worker",
    ),
    "inter-document-masking-and-context-parallelism": (
        "--dataloader-inter-document-masking; --context-parallel-size 2; MEGATRON_PATH=/mlm",
        "--context-parallel-size 1",
    ),
    "hybrid-models-have-their-own-script": (
        "--mamba-state-dim 64; MEGATRON_PATH=/mlm",
        "!--mamba-state-dim",
    ),
    "reinforcement-learning-has-its-own-script": ("--rl-profile", "!--rl-profile"),
    "other-models-have-their-own-script": ("--vision-pretraining", "!--vision-pretraining"),
    "inference-has-its-own-script": ("--inference-max-requests 4", "!--inference-max-requests"),
    "optimizer-needs-emerging-optimizers": (
        "--optimizer muon; lacks=emerging_optimizers",
        "lacks=tiktoken",
    ),
    "tiktokenizer-needs-tiktoken": (
        "--tokenizer-type TikTokenizer; --tokenizer-model /m; lacks=tiktoken",
        "lacks=emerging_optimizers",
    ),
    "mtp-and-attention-variant": (
        f"{DSA}; --mtp-num-layers 1",
        "!--mtp-num-layers",
    ),
    "sparse-attention-rotates-unfused": (f"{DSA}; !--no-rope-fusion", "--no-rope-fusion"),
    "sparse-attention-needs-bf16": (f"{DSA}; !--bf16", "--bf16"),
    "sparse-attention-needs-fast-hadamard-transform": (
        f"{DSA}; lacks=fast_hadamard_transform",
        "lacks=tiktoken",
    ),
    "adlr-autoresume-needs-userlib": ("--adlr-autoresume; lacks=userlib", "!--adlr-autoresume"),
    "fault-tolerance-package-needs-nvidia-resiliency-ext": (
        "--enable-ft-package; lacks=nvidia_resiliency_ext",
        "!--enable-ft-package",
    ),
    "lazy-mpu-init-is-for-other-programs": ("--lazy-mpu-init", "!--lazy-mpu-init"),
    "probabilities-on-input-need-top-1": (
        "--moe-apply-probs-on-input; --num-experts 8; --moe-router-topk 2",
        "--moe-router-topk 1; --moe-router-pre-softmax",
    ),
    "warmup-ends-before-decay": (
        "--lr-warmup-iters 50; --lr-decay-iters 50",
        "--lr-warmup-iters 49",
    ),
    "warmup-ends-before-training": (
        "--lr-warmup-iters 50; !--lr-decay-iters; --train-iters 50",
        "--train-iters 51",
    ),
    "warmup-samples-end-before-decay": (
        "--lr-warmup-samples 50; --train-samples 100; --lr-decay-samples 50; !--train-iters; !--lr-decay-iters",
        "--lr-decay-samples 51",
    ),
    "warmup-samples-end-before-training": (
        "--lr-warmup-samples 100; --train-samples 100; !--train-iters; !--lr-decay-iters",
        "--train-samples 101",
    ),
    "warmup-is-a-part-of-decay": ("--lr-warmup-fraction 1.0", "--lr-warmup-fraction 0.5"),
    "wsd-decay-has-a-length": ("--lr-decay-style WSD", "--lr-wsd-decay-iters 2"),
    "hierarchical-context-parallelism-needs-einops": (
        "--hierarchical-context-parallel-sizes 1; lacks=einops",
        "!--hierarchical-context-parallel-sizes",
    ),
    "external-data-is-for-other-programs": (
        "--dataloader-type external",
        "--dataloader-type cyclic",
    ),
    "fault-injection-needs-nvidia-resiliency-ext": (
        "--fault-injector-num-ranks 1; lacks=nvidia_resiliency_ext",
        "!--fault-injector-num-ranks",
    ),
    "l2-norm-of-queries-and-mla": (
        "--qk-l2-norm; --multi-latent-attention",
        "!--multi-latent-attention",
    ),
    "full-validation-counts-sets": ("--full-validation", "--multiple-validation-sets"),
    "multiple-validation-sets-need-full-validation": (
        "--multiple-validation-sets",
        "--full-validation",
    ),
    "unpadded-vocabulary-needs-a-checkpoint": ("--no-pad-vocab-size", "!--no-pad-vocab-size"),
    "checkpoint-arguments-need-a-checkpoint": ("--use-checkpoint-args", "--load /ck"),
    "uninitialized-weights": ("--init-model-with-meta-device", "--load /ck"),
    "distributed-optimizer-is-adams": (f"--optimizer sgd; {DO}", "!--use-distributed-optimizer"),
    "weight-hash-interval-is-at-least-1": (
        "--check-weight-hash-across-dp-replicas-interval 0",
        "--check-weight-hash-across-dp-replicas-interval 1",
    ),
    "warmup-starts-below-the-learning-rate": ("--lr-warmup-init 1", "--lr-warmup-init 1e-5"),
    "rerun-mode-report-stats": ("--rerun-mode report_stats", "--rerun-mode disabled"),
    "test-mode-compares-biases-of-norms": ("--test-mode; --qk-layernorm", "!--qk-layernorm"),
    "snapshots-need-a-place": ("--save-wgrads-interval 5", "--save /ck; --save-interval 5"),
    "vocabularies-are-fetched-with-wget": (
        "--tokenizer-type GPT2BPETokenizer; lacks=wget",
        "--vocab-file /v; --merge-file /m",
    ),
    "multimodal-tokenizers-have-their-own-script": (
        "--tokenizer-type NullMultimodalTokenizer",
        "--tokenizer-type NullTokenizer",
    ),
    "eval-interval-is-at-least-1": ("--eval-interval 0", "--eval-interval 1"),
    "log-interval-is-at-least-1": ("--log-interval 0", "--log-interval 1"),
    "tensorboard-log-interval-is-at-least-1": (
        "--tensorboard-log-interval 0",
        "--tensorboard-log-interval 1",
    ),
    "lr-decay-iters-is-at-least-1": ("--lr-decay-iters 0", "--lr-decay-iters 1"),
    "make-vocab-size-divisible-by-is-at-least-1": (
        "--make-vocab-size-divisible-by 0",
        "--make-vocab-size-divisible-by 1",
    ),
    "seed-is-at-least-1": ("--seed 0", "--seed 1"),
    "num-workers-is-not-negative": ("--num-workers -1", "--num-workers 1"),
    "weight-decay-is-not-negative": ("--weight-decay -1", "--weight-decay 0.1"),
    "init-method-std-is-not-negative": ("--init-method-std -1", "--init-method-std 0.1"),
    "hidden-dropout-is-a-probability": ("--hidden-dropout 1.5", "--hidden-dropout 0.5"),
    "attention-dropout-is-a-probability": ("--attention-dropout 1.5", "--attention-dropout 0.5"),
    "rotated-channels-are-pairs": (
        "--multi-latent-attention; --qk-pos-emb-head-dim 7",
        "--qk-pos-emb-head-dim 8",
    ),
    "sinkhorn-takes-no-auxiliary-loss": (
        "--num-experts 8; --moe-router-load-balancing-type sinkhorn; --moe-aux-loss-coeff 0.01",
        "--moe-aux-loss-coeff 0",
    ),
    "quantile-balancing-takes-no-groups": (
        "--num-experts 8; --moe-router-load-balancing-type quantile_balancing; --moe-router-num-groups 4; "
        "--moe-router-group-topk 2; --moe-router-topk 4",
        "!--moe-router-num-groups; !--moe-router-group-topk",
    ),
    "permute-fusion-needs-te-2.1": ("--moe-permute-fusion; --num-experts 8; te=2.0.1", "te=2.1.0"),
    "moe-fp8-needs-te-1.7": (f"{FP8}; te=1.6", "te=1.7"),
    "grouped-gemm-fp8-needs-te-1.11": (f"{FP8}; --moe-grouped-gemm; te=1.10", "te=1.11"),
    "fp8-tensorwise-needs-te-2.2": (f"{FP8}; --fp8-recipe tensorwise; te=2.1", "te=2.2"),
    "fp8-blockwise-needs-te-2.3": (f"{FP8}; --fp8-recipe blockwise; te=2.2", "te=2.3"),
    "mxfp8-needs-te-2.1": (f"{FP8}; --fp8-recipe mxfp8; te=2.0", "te=2.1"),
    "mxfp8-needs-blackwell": (f"{FP8}; --fp8-recipe mxfp8; compute=9.0", "compute=10.0"),
    "fp8-needs-ada-or-hopper": (f"{FP8}; compute=8.0", "compute=8.9"),
    "fp8-needs-transformer-engine": (
        f"{FP8}; --transformer-impl local",
        "--transformer-impl transformer_engine",
    ),
    "fp4-needs-te-2.7": ("--fp4-format e2m1; te=2.6", "te=2.7"),
    "fp4-and-fp8": ("--fp4-format e2m1; --fp8-format hybrid", "!--fp8-format"),
    "fp8-recompute-needs-te-2.6": (
        f"{FP8}; {SELECT}; --recompute-modules moe_act; --fp8-recipe tensorwise; te=2.5",
        "te=2.6",
    ),
    "fp8-recompute-needs-no-delayed-scaling": (
        f"{FP8}; {SELECT}; --recompute-modules layernorm; --fp8-recipe delayed",
        "--fp8-recipe tensorwise",
    ),
    "delay-wgrad-needs-te-2.3": (f"{A2A}; --delay-wgrad-compute; te=2.2", "te=2.3"),
    "delay-wgrad-with-overlap-needs-te-2.8": (
        f"{A2A}; --delay-wgrad-compute; --overlap-grad-reduce; te=2.7",
        "te=2.8",
    ),
    "qk-clip-needs-te-2.9": ("--qk-clip; te=2.8", "te=2.9"),
    "softmax-sink-needs-te-2.8": ("--softmax-type learnable; te=2.7", "te=2.8"),
    "a2a-overlap-needs-torch-2.6": (f"{A2A}; torch=2.5.1", "torch=2.6.0"),
    "tp-comm-overlap-needs-sequence-parallel": (f"--tp-comm-overlap; {TP}", "--sequence-parallel"),
    "tp-comm-overlap-needs-tp": ("--tp-comm-overlap; --sequence-parallel", TP),
    "tp-comm-overlap-covers-dense-layers-only": (
        f"--tp-comm-overlap; --sequence-parallel; {TP}; --num-experts 8",
        "!--num-experts",
    ),
    "sequence-parallel-needs-one-connection": (
        f"{TP}; --sequence-parallel; CUDA_DEVICE_MAX_CONNECTIONS=8; mcore=0.11.0",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    "tp-or-cp-needs-one-connection": (
        f"{TP}; CUDA_DEVICE_MAX_CONNECTIONS=32; compute=9.0",
        "compute=10.0",
    ),
    "a2a-overlap-with-one-connection": (
        f"{A2A}; CUDA_DEVICE_MAX_CONNECTIONS=1",
        "CUDA_DEVICE_MAX_CONNECTIONS=32",
    ),
    "fsdp-with-one-connection": (
        f"--use-megatron-fsdp; --ckpt-format fsdp_dtensor; {DO}; CUDA_DEVICE_MAX_CONNECTIONS=1",
        "!CUDA_DEVICE_MAX_CONNECTIONS",
    ),
    "expandable-segments-with-graphs": (
        f"{GRAPH}; NCCL_GRAPH_REGISTER=0; mcore=0.15.3",
        "!PYTORCH_CUDA_ALLOC_CONF",
    ),
    "expandable-segments-with-te-graphs": (GRAPH, "NCCL_GRAPH_REGISTER=0"),
    "full-iteration-graph-with-nan-check": (
        "--cuda-graph-impl full_iteration; --te-rng-tracker",
        "--no-check-for-nan-in-loss-and-grad",
    ),
    "full-iteration-graph-with-modules": (
        "--cuda-graph-impl full_iteration; --cuda-graph-modules attn; "
        "--no-check-for-nan-in-loss-and-grad; --te-rng-tracker",
        "!--cuda-graph-modules",
    ),
    "graphs-with-cpu-offloading": (
        "--cuda-graph-impl local; --cpu-offloading-num-layers 1",
        "--cpu-offloading-num-layers 0",
    ),
    "deepep-with-graph-of-moe": (
        f"{FLEX}; --moe-flex-dispatcher-backend deepep; --cuda-graph-modules moe",
        "--cuda-graph-modules attn",
    ),
    "deepep-needs-flex": (
        f"{FLEX}; --moe-enable-deepep; --moe-token-dispatcher-type alltoall",
        "--moe-token-dispatcher-type flex",
    ),
    "flex-needs-a-backend": (f"{FLEX}; mcore=0.14.0; !--moe-enable-deepep", "--moe-enable-deepep"),
    "flex-needs-ep-or-tp": (
        f"{FLEX}; --expert-model-parallel-size 1",
        "--expert-model-parallel-size 2",
    ),
    "deepep-and-hybridep": (
        f"{FLEX}; --moe-enable-deepep; --moe-flex-dispatcher-backend hybridep",
        "!--moe-enable-deepep",
    ),
    "deepep-pads-nothing": (
        f"{FLEX}; --moe-flex-dispatcher-backend deepep; --moe-pad-expert-input-to-capacity; "
        "--moe-expert-capacity-factor 1.0",
        "--moe-token-dispatcher-type alltoall",
    ),
    "deepep-wants-fp32-router": (
        f"{FLEX}; --moe-flex-dispatcher-backend deepep; !--moe-router-dtype",
        "--moe-router-dtype fp32",
    ),
    "shared-overlap-needs-alltoall": (
        "--moe-shared-expert-overlap; --num-experts 8; --moe-shared-expert-intermediate-size 64; "
        "--moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type alltoall",
    ),
    "capacity-needs-a-compatible-balance": (
        "--num-experts 8; --moe-expert-capacity-factor 1.0; --moe-router-load-balancing-type sinkhorn",
        "--moe-router-load-balancing-type aux_loss",
    ),
    "padding-needs-capacity": (
        "--num-experts 8; --moe-pad-expert-input-to-capacity",
        "--moe-expert-capacity-factor 1.0",
    ),
    "capacity-needs-alltoall": (
        "--num-experts 8; --moe-expert-capacity-factor 1.0; --moe-pad-expert-input-to-capacity; "
        "--moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type alltoall",
    ),
    "allgather-is-for-small-ep": (
        "--num-experts 64; --expert-model-parallel-size 8",
        "--moe-token-dispatcher-type alltoall",
    ),
    "quantization-padding-needs-alltoall": (
        f"{FP8}; --moe-router-padding-for-quantization",
        "--moe-token-dispatcher-type alltoall",
    ),
    "quantization-padding-needs-low-precision": (
        "--num-experts 8; --moe-router-padding-for-quantization; --moe-token-dispatcher-type alltoall",
        "--fp8-format hybrid",
    ),
    "sequence-parallel-for-moe-with-tp": (f"--num-experts 8; {TP}", "--sequence-parallel"),
    "hybridep-sms-without-hybridep": (
        f"{FLEX}; --moe-hybridep-num-sms 32",
        "--moe-flex-dispatcher-backend hybridep",
    ),
    "backend-without-flex": ("--moe-flex-dispatcher-backend deepep; --num-experts 8", FLEX),
    "expert-bias-needs-sigmoid": (
        "--num-experts 8; --moe-router-enable-expert-bias",
        "--moe-router-score-function sigmoid",
    ),
    "top-1-softmax-needs-pre-softmax": (
        "--num-experts 8; --moe-router-topk 1",
        "--moe-router-pre-softmax",
    ),
    "groups-divide-experts": (
        f"{GROUPS}; --moe-router-num-groups 3",
        "--moe-router-num-groups 4",
    ),
    "group-topk-needs-groups": (f"{GROUPS}; !--moe-router-num-groups", "--moe-router-num-groups 4"),
    "group-topk-above-groups": (
        f"{GROUPS}; --moe-router-num-groups 2; --moe-router-group-topk 4",
        "--moe-router-group-topk 2",
    ),
    "topk-divides-into-groups": (f"{GROUPS}; --moe-router-topk 3", "--moe-router-topk 4"),
    "balance-lists-of-one-length": (
        "--num-experts 8; --moe-router-load-balancing-type aux_loss seq_aux_loss; --moe-aux-loss-coeff 0.1",
        "--moe-aux-loss-coeff 0.1 0.1",
    ),
    "forced-balance-is-a-benchmark": (
        "--num-experts 8; --moe-router-force-load-balancing",
        "!--moe-router-force-load-balancing",
    ),
    "moe-bias-needs-etp-1": (
        f"--num-experts 8; {TP}; --expert-tensor-parallel-size 2; --sequence-parallel; "
        "!--disable-bias-linear",
        "--disable-bias-linear",
    ),
    "a2a-overlap-needs-vpp": (f"{A2A}; {PP}", "--num-virtual-stages-per-pipeline-rank 2"),
    "a2a-overlap-needs-ep": (
        f"{A2A}; --expert-model-parallel-size 1",
        "--expert-model-parallel-size 2",
    ),
    "a2a-overlap-needs-alltoall-or-flex": (
        f"{A2A}; --moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type alltoall",
    ),
    "a2a-overlap-with-full-recompute": (
        f"{A2A}; --recompute-granularity full; --recompute-method uniform; --recompute-num-layers 1",
        "--recompute-granularity selective; !--recompute-method; !--recompute-num-layers",
    ),
    "a2a-overlap-with-moe-recompute": (
        f"{A2A}; {SELECT}; --recompute-modules moe",
        "--recompute-modules moe_act",
    ),
    "a2a-overlap-with-shared-overlap": (
        f"{A2A}; --moe-shared-expert-overlap; --moe-shared-expert-intermediate-size 64",
        "!--moe-shared-expert-overlap",
    ),
    "a2a-overlap-with-several-mtp-layers": (f"{A2A}; --mtp-num-layers 2", "--mtp-num-layers 1"),
    "a2a-overlap-needs-16-bit": (f"{A2A}; !--bf16", "--bf16"),
    "delay-wgrad-needs-an-overlap": ("--delay-wgrad-compute", A2A),
    "moe-act-recompute-needs-grouped-gemm": (
        f"{SELECT}; --recompute-modules moe_act; !--moe-grouped-gemm",
        "--moe-grouped-gemm",
    ),
    "mla-recompute-needs-mla": (
        f"{SELECT}; --recompute-modules mla_up_proj",
        "--multi-latent-attention; !--group-query-attention; !--num-query-groups",
    ),
    "shared-recompute-with-overlap": (
        f"{SELECT}; --recompute-modules shared_experts; --moe-shared-expert-overlap; "
        "--moe-shared-expert-intermediate-size 64; --moe-token-dispatcher-type alltoall",
        "!--moe-shared-expert-overlap",
    ),
    "recompute-modules-without-selective": (
        "--recompute-modules core_attn",
        "--recompute-granularity selective",
    ),
    "selective-recompute-takes-no-method": (
        "--recompute-granularity selective; --recompute-method uniform",
        "!--recompute-method",
    ),
    "full-recompute-needs-a-method": (
        "--recompute-granularity full; --recompute-num-layers 1",
        "--recompute-method uniform",
    ),
    "optimizer-offload-needs-precision-aware": (
        f"--optimizer-cpu-offload; {DO}",
        "--use-precision-aware-optimizer",
    ),
    "optimizer-offload-with-fp8-params": (
        f"{FP8}; --optimizer-cpu-offload; --use-precision-aware-optimizer; {DO}; --fp8-param-gather; "
        "--fp8-recipe tensorwise",
        "--fp8-recipe delayed",
    ),
    "fp8-params-need-distributed-optimizer": (f"{FP8}; --fp8-param-gather", DO),
    "param-gather-overlap-needs-distributed-optimizer": (
        "--overlap-param-gather; --overlap-grad-reduce",
        DO,
    ),
    "param-gather-overlap-needs-grad-overlap": (
        f"--overlap-param-gather; {DO}",
        "--overlap-grad-reduce",
    ),
    "activation-offload-with-recompute": (
        "--cpu-offloading-num-layers 1; --recompute-granularity selective",
        "!--recompute-granularity",
    ),
    "activation-offload-with-pipeline": (
        f"--cpu-offloading-num-layers 1; {PP}",
        "--pipeline-model-parallel-size 1",
    ),
    "layout-and-virtual-stages": (
        f"{PP}; --pipeline-model-parallel-layout Et*4|t*4L; --num-virtual-stages-per-pipeline-rank 2",
        "!--num-virtual-stages-per-pipeline-rank",
    ),
    "uneven-stages-need-virtual-stages": (
        f"{PP}; --num-layers-per-virtual-pipeline-stage 2; --decoder-first-pipeline-num-layers 2; "
        "--num-layers 8",
        "!--decoder-first-pipeline-num-layers",
    ),
    "vpp-needs-pp": (
        "--num-virtual-stages-per-pipeline-rank 2",
        PP,
    ),
    "uneven-last-stage-of-one-stage": (
        "--decoder-last-pipeline-num-layers 2",
        f"{PP}; --decoder-last-pipeline-num-layers 4",
    ),
    "te-cross-entropy-is-refused": (
        "--cross-entropy-loss-fusion; --cross-entropy-fusion-impl te",
        "--cross-entropy-fusion-impl native",
    ),
    "cross-entropy-impl-without-fusion": (
        "--cross-entropy-fusion-impl te",
        "--cross-entropy-loss-fusion; --cross-entropy-fusion-impl native",
    ),
    "mla-and-gqa": (
        "--multi-latent-attention; --group-query-attention; --num-query-groups 2",
        "!--group-query-attention; !--num-query-groups",
    ),
    "mla-with-rope-fusion": (
        "--multi-latent-attention; --position-embedding-type rope; mcore=0.12.3",
        "--no-rope-fusion",
    ),
    "mla-rope-fusion-overruns-heads": (
        "--multi-latent-attention; --transformer-impl transformer_engine; --num-attention-heads 6",
        "--num-attention-heads 8",
    ),
    "distributed-recompute-needs-tp": (
        "--distribute-saved-activations; --recompute-granularity full; --recompute-method uniform; "
        "--recompute-num-layers 1",
        TP,
    ),
    "steps-and-samples": ("--train-samples 160", "!--train-iters; --lr-decay-samples 160"),
    "samples-with-a-schedule-in-steps": (
        "!--train-iters; --train-samples 160; --lr-decay-iters 5",
        "!--lr-decay-iters; --lr-decay-samples 80",
    ),
    "warmup-said-twice": ("--lr-warmup-fraction 0.1; --lr-warmup-iters 5", "!--lr-warmup-iters"),
    "two-precisions": ("--bf16; --fp16", "!--fp16"),
    "torch-fsdp-with-experts": (
        "--use-torch-fsdp2; --num-experts 8; --expert-model-parallel-size 2; --no-gradient-accumulation-fusion",
        "--expert-model-parallel-size 1",
    ),
    "mtp-needs-position-ids": (
        "--mtp-num-layers 1; --position-embedding-type relative",
        "--position-embedding-type rope",
    ),
    "save-needs-an-interval": ("--save /nowhere", "--save-interval 10"),
}
BASE = (
    "--num-layers 8; --hidden-size 64; --num-attention-heads 4; --seq-length 128; --max-position-embeddings 128; "
    "--micro-batch-size 1; --global-batch-size 16; --train-iters 10; --lr 1e-3; --position-embedding-type rope; "
    "--normalization RMSNorm; --swiglu; --disable-bias-linear; --bf16; --untie-embeddings-and-output-weights; "
    "--vocab-size 256; --mock-data; --attention-dropout 0.0; --hidden-dropout 0.0; --moe-router-topk 2; "
    "te=2.9.0; compute=9.0; torch=2.11.0; mcore=0.19.2"
)
"""A run that every release accepts, on 8 ranks."""


def laid_over(*texts: str) -> dict[str, str]:
    """Settings by name, later texts over earlier ones."""
    found: dict[str, str] = {}
    for item in (part.strip() for text in texts for part in text.split(";")):
        if item.startswith("!"):
            found.pop(item[1:], None)
        elif item.startswith("--"):
            flag, _, value = item.partition(" ")
            found[flag] = value
        else:
            name, _, value = item.partition("=")
            found[name] = value
    return found


def run_of(settings: dict[str, str]) -> ResolvedRun:
    """A run with these flags and variables."""
    run = make_run(NNODES="1", GPUS_PER_NODE="8", MCORE_RELEASE_VERSION=settings["mcore"])
    flags = {name: _setting(value) for name, value in settings.items() if name.startswith("--")}
    variables = {name: setting(value) for name, value in settings.items() if name.isupper()}
    return replace(run, args=flags, env=variables)


def _setting(value: str) -> Setting:
    return replace(setting(value), words=tuple(value.split())) if value else setting("true")


def versions_of(settings: dict[str, str]) -> dict[str, str | None]:
    """The versions among the settings."""
    return {name: settings.get(name) for name in ("te", "torch", "compute")}


def packages_of(settings: dict[str, str]) -> Callable[[str], bool]:
    """Every package is there but the one that the settings lack."""
    return lambda name: name != settings.get("lacks")
