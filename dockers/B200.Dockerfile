# moe_bench on B200. Build from the project's root; docs/containers.md says more:
#   docker build --platform linux/amd64 --file dockers/B200.Dockerfile --tag moe-bench:B200 .
# The base brings CUDA 13, NCCL, PyTorch, Apex and Transformer Engine, built for one another; its Python is 3.12, which
# megatron-core 0.19 needs. NVIDIA does not move a released tag; where a policy wants a digest, give the one of your mirror's
# copy: --build-arg BASE=REGISTRY/pytorch@sha256:...
# No secret belongs in here: keys reach a run through its environment.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# --tp-comm-overlap needs Transformer Engine's user buffers; it covers dense layers, not MoE layers. Since 1.9 they are
# part of every build and are set up through NCCL (--tp-comm-bootstrap-backend nccl, the default). USER_BUFFERS=1 builds
# Transformer Engine anew for the MPI way as well; NVTE_WITH_USERBUFFERS is what releases before 1.9 call it.
ARG USER_BUFFERS=0
ARG TRANSFORMER_ENGINE_COMMIT=99df881061ba6949081fdd8f00dccd0f617c6594
RUN if [ "$USER_BUFFERS" = 1 ]; then \
      unset PIP_CONSTRAINT \
      && NVTE_UB_WITH_MPI=1 NVTE_WITH_USERBUFFERS=1 MPI_HOME=/usr/local/mpi NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="100a" \
         pip install --no-cache-dir --no-build-isolation --no-deps \
         "git+https://github.com/NVIDIA/TransformerEngine.git@$TRANSFORMER_ENGINE_COMMIT"; \
    fi

# DeepEP: DISPATCHER=deepep uses it. The commit of its release v1.2.1. Without NVSHMEM it would be built for one node only;
# CUDA 13 keeps CCCL's headers in a folder of their own; IBGDA opens libmlx5.so by that name.
ARG DEEPEP_COMMIT=9af0e0d0e74f3577af1979c9b9e1ac2cad0104ee
COPY locks/nvshmem.txt /opt/nvshmem.txt
RUN unset PIP_CONSTRAINT \
    && pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/nvshmem.txt \
    && ln -sf /usr/lib/x86_64-linux-gnu/libmlx5.so.1 /usr/lib/x86_64-linux-gnu/libmlx5.so \
    && git clone --quiet https://github.com/deepseek-ai/DeepEP.git /opt/DeepEP \
    && git -C /opt/DeepEP checkout --quiet "$DEEPEP_COMMIT" \
    && CPATH="/usr/local/cuda/include/cccl${CPATH:+:$CPATH}" TORCH_CUDA_ARCH_LIST=10.0 \
       pip install --no-cache-dir --no-build-isolation --no-deps /opt/DeepEP \
    && rm -rf /opt/DeepEP

# This project's own packages, at their locked versions and checked by hash. torch and what belongs to it is not among
# them, and the build fails if it has changed all the same.
COPY locks /opt/moe_bench/locks
RUN unset PIP_CONSTRAINT \
    && before="$(python -c 'import torch; print(torch.__version__, torch.version.cuda)')" \
    && pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/moe_bench/locks/container.txt \
    && test "$before" = "$(python -c 'import torch; print(torch.__version__, torch.version.cuda)')"

COPY . /opt/moe_bench
WORKDIR /opt/moe_bench
ENV PYTHONPATH=/opt/moe_bench NVLINK_DOMAIN_SIZE=8
# What a run will import is there (found, not imported: a build has no driver).
RUN python -c 'from importlib.util import find_spec as find; \
lost = [name for name in ("torch", "apex", "transformer_engine", "deep_ep", "megatron.core", "moe_bench") if find(name) is None]; \
assert not lost, lost'
CMD ["python", "-m", "moe_bench", "doctor"]
