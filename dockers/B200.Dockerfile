# moe_bench on B200. Build from the project's root:
#   docker build --platform linux/amd64 --file dockers/B200.Dockerfile --tag moe-bench:B200 .
# With Transformer Engine's user buffers, which --tp-comm-overlap needs (it covers dense layers, not MoE layers):
#   docker build --build-arg USER_BUFFERS=1 ...
# The base brings CUDA, NCCL, PyTorch, Apex and Transformer Engine, built for one another. No secret belongs in here: keys
# reach a run through its environment.
FROM nvcr.io/nvidia/pytorch:25.12-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Version of Transformer Engine for the user-buffer build; the base's own is kept otherwise.
ARG USER_BUFFERS=0
ARG TRANSFORMER_ENGINE_COMMIT=99df881061ba6949081fdd8f00dccd0f617c6594
RUN if [ "$USER_BUFFERS" = 1 ]; then \
      unset PIP_CONSTRAINT \
      && NVTE_WITH_USERBUFFERS=1 MPI_HOME=/usr/local/mpi NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="100a" \
         pip install --no-cache-dir --no-build-isolation \
         "git+https://github.com/NVIDIA/TransformerEngine.git@$TRANSFORMER_ENGINE_COMMIT"; \
    fi

# DeepEP: DISPATCHER=deepep uses it. The commit of its release v1.2.1.
ARG DEEPEP_COMMIT=9af0e0d0e74f3577af1979c9b9e1ac2cad0104ee
RUN git clone --quiet https://github.com/deepseek-ai/DeepEP.git /opt/DeepEP \
    && git -C /opt/DeepEP checkout --quiet "$DEEPEP_COMMIT" \
    && TORCH_CUDA_ARCH_LIST=10.0 pip install --no-cache-dir --no-build-isolation /opt/DeepEP \
    && rm -rf /opt/DeepEP

# This project's own packages, at their locked versions and checked by hash; torch and its kin stay the base's.
COPY locks /opt/moe_bench/locks
RUN unset PIP_CONSTRAINT \
    && pip install --no-cache-dir --require-hashes --no-deps --requirement /opt/moe_bench/locks/container.txt

COPY . /opt/moe_bench
WORKDIR /opt/moe_bench
ENV PYTHONPATH=/opt/moe_bench NVLINK_DOMAIN_SIZE=8
CMD ["python", "-m", "moe_bench", "doctor"]
