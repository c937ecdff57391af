# One image for everything that runs our code: Prefect's server and worker, MLflow, Dask's scheduler and workers.
# From the repository's root:  docker build -f infra/docker/deepzero.Dockerfile -t deepzero:0.1.0 .
FROM python:3.11.14-slim-bookworm AS build

# Wheels of torch without CUDA; empty for those of PyPI, with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# What else is wanted of pyproject.toml.
ARG EXTRAS=onnx,postgres

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/deepzero
ENV PATH=/opt/deepzero/bin:$PATH
WORKDIR /source
COPY pyproject.toml constraints.txt README.md ./
COPY deepzero_core deepzero_core
COPY simulators simulators
COPY configs configs
COPY tasks tasks
COPY infra infra
COPY flows flows
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[$EXTRAS]"

FROM python:3.11.14-slim-bookworm

# The engine compiles its kernels once, on the machine that it runs on.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 deepzero \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin deepzero \
 && mkdir /state /artifacts \
 && chown 10001:10001 /state /artifacts
COPY --from=build /opt/deepzero /opt/deepzero
COPY prefect.yaml /opt/deepzero/prefect.yaml
COPY --chmod=0555 infra/docker/with-secrets.sh /usr/local/bin/with-secrets

ENV PATH=/opt/deepzero/bin:$PATH \
    DEEPZERO_HOME=/state \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    XDG_CACHE_HOME=/tmp/cache \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=1
USER 10001:10001
WORKDIR /state
ENTRYPOINT ["with-secrets"]
CMD ["deepzero", "--help"]
