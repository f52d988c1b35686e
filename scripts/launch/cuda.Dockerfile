# dsjax for NVIDIA GPUs: docker build --file scripts/launch/cuda.Dockerfile --tag dsjax-cuda .
# CUDA's libraries come with jax; of the host it needs a driver of 580 or newer and NVIDIA's
# container toolkit. For an older driver: --build-arg EXTRA=cuda12.
FROM python:3.12-slim
ARG EXTRA=cuda
WORKDIR /opt/dsjax
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY pallas_kernels pallas_kernels
COPY dsjax dsjax
# What is installed is this folder, whose version needs no pin.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRA}]"
WORKDIR /work
CMD ["dsjax", "--help"]
