# dsjax for TPUs: docker build --file scripts/launch/tpu.Dockerfile --tag dsjax-tpu .
FROM python:3.12-slim
WORKDIR /opt/dsjax
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY pallas_kernels pallas_kernels
COPY dsjax dsjax
# What is installed is this folder, whose version needs no pin.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[tpu]'
WORKDIR /work
CMD ["dsjax", "--help"]
