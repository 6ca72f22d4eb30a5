# One image for every host of a GPU cluster: CUDA, the pinned torch, jp_train, pdsh and ssh.
#   docker build -t jp_train .
#   docker run --gpus all --ipc=host --network=host -v /data:/data -v $PWD/runs:/home/trainer/runs jp_train check ...
# It has not been run on a GPU. DeepSpeed builds its operators with nvcc on first use, so the base is a devel image.
# CUDA must be a release that TORCH_INDEX has wheels for.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG USER_ID=1000

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# no secret: tokenizers would warn of forks
# hadolint ignore=DL3064
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# Debian and Ubuntu keep one version of a package only: a pin breaks the build with every security update
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git ninja-build openssh-client openssh-server pdsh python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && { userdel --remove ubuntu 2>/dev/null || true; } \
    && useradd --create-home --uid "${USER_ID}" --shell /bin/bash trainer \
    && install -d -o trainer -g trainer /opt/venv /opt/jp_train

USER ${USER_ID}
WORKDIR /opt/jp_train
# torch first: the largest layer, and the same for every version of the code; pinned in ARG TORCH
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
COPY --chown=trainer:trainer . .
# pinned in setup.cfg
# hadolint ignore=DL3013
RUN pip install '.[cloud,parquet,zstd,tensorboard]'

# pdsh starts ranks over ssh: keys come from a mounted ~/.ssh, and sshd runs on the host or on a port of its own
ENV PDSH_RCMD_TYPE=ssh
WORKDIR /home/trainer
ENTRYPOINT ["tini", "--", "jp-train"]
CMD ["--help"]
