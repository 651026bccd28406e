# docker build --target cpu  -t thermaflux:cpu .
# docker build --target cuda -t thermaflux:cuda .
# docker run --rm --gpus all --shm-size 16g -v "$PWD/datasets:/data" -v "$PWD/runs:/app/runs" \
#   thermaflux:cuda train.py --data_path /data/mine
# PyTorch's wheels bring CUDA: of NVIDIA's software, the host needs the driver alone. The cpu image is
# 4 GB smaller with wheels that do not: --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels>

FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    XDG_CACHE_HOME=/app/cache HF_HOME=/app/cache/huggingface OMP_NUM_THREADS=1
WORKDIR /app
RUN useradd --create-home --uid 1000 thermaflux \
    && mkdir -p /app/cache /app/runs \
    && chown -R thermaflux:thermaflux /app

FROM base AS cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY setup.py pyproject.toml ./
RUN pip install .
COPY --chown=thermaflux:thermaflux . .
USER 1000
ENTRYPOINT ["python"]
CMD ["generate.py", "--help"]

FROM base AS cuda
# Triton compiles a small launcher in C when the blocks are first compiled.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY setup.py pyproject.toml ./
RUN pip install .
COPY --chown=thermaflux:thermaflux . .
USER 1000
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
