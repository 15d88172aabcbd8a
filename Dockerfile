# Image with megagrow, for GPUs and CPUs. The host needs only NVIDIA's driver and container toolkit:
# torch's package for Linux contains the CUDA libraries. Commands run as user 1000, who must be able to
# write to the mounted folder.
#   docker build --tag megagrow .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" megagrow train RUN.yaml
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/work" --entrypoint torchrun \
#       megagrow --nproc-per-node 8 -m megagrow train RUN.yaml
FROM python:3.11-slim

# Triton compiles the launchers of its kernels with a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch is the largest layer and changes least. `--build-arg TORCH=...` selects another build.
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir $TORCH

WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY megagrow megagrow
COPY kernels kernels
COPY configs configs
RUN grep -vE '^(torch|triton)==' constraints.txt > versions.txt \
    && DS_BUILD_OPS=0 pip install --no-cache-dir -c versions.txt '.[hf,eval]'

RUN useradd --create-home --uid 1000 megagrow
USER megagrow
WORKDIR /work
ENTRYPOINT ["megagrow"]
CMD ["--help"]
