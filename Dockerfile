# tailseg in a container, on a CPU or a GPU:
#   docker build --target cpu  --tag tailseg:cpu .
#   docker build --target cuda --tag tailseg:cuda .
# `docker run --rm tailseg:cpu` takes the arguments of `tailseg`; compose.yaml starts the web page.
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
RUN pip install --no-cache-dir build==1.6.1
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m build --wheel --outdir /dist

# Every user of the image may write below /work and /cache, whatever --user says.
FROM python:3.11-slim-bookworm AS base
RUN useradd --create-home --uid 1000 tailseg && mkdir --mode 1777 /work /cache
ENV TAILSEG_CACHE=/cache/tailseg HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch MPLCONFIGDIR=/tmp/matplotlib
COPY --from=wheel /dist /dist

FROM base AS cuda
# Triton compiles the launchers of its kernels with gcc. CUDA itself comes with PyTorch's wheels, the driver from outside.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "$(echo /dist/*.whl)[app,backbones]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /work
ENTRYPOINT ["tailseg"]
CMD ["--help"]

# The last one is what `docker build` makes without --target.
FROM base AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "$(echo /dist/*.whl)[app,backbones]"
USER 1000
WORKDIR /work
ENTRYPOINT ["tailseg"]
CMD ["--help"]
