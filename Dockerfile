# dstrain on CPUs, in a container:
#
#     docker build -t dstrain .
#     docker run --rm dstrain run --zero 2 --pipeline 4
#
# -v "$PWD/work:/work" keeps the run folders (and the cache of prepared data); the user is 10001, so make that
# folder writable for it, or add --user "$(id -u):$(id -g)".
#
# There is no compiler inside: --offload, whose optimizer DeepSpeed compiles on first use, does not work here.
#
# BASE_IMAGE may be any Debian or Ubuntu with Python 3.10 or newer, its headers and its venv module.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# pip reads these from its environment: say --build-arg PIP_EXTRA_INDEX_URL=... for wheels of another index.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv /opt/dstrain
ENV PATH=/opt/dstrain/bin:$PATH
WORKDIR /src
COPY constraints.txt .
RUN pip install -c constraints.txt torch numpy ninja psutil py-cpuinfo setuptools wheel
RUN DS_ACCELERATOR=cpu pip install --no-build-isolation -c constraints.txt deepspeed
COPY pyproject.toml README.md LICENSE ./
COPY ds_configs ds_configs
COPY dstrain dstrain
RUN pip install -c constraints.txt . \
    && pip uninstall -y setuptools wheel \
    && rm -rf /opt/dstrain/lib/python3*/site-packages/torch/include /opt/dstrain/lib/python3*/site-packages/torch/share

FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home dstrain \
    && install -d -o dstrain -g dstrain /work
COPY --from=build /opt/dstrain /opt/dstrain
# HOME and USER: the libraries ask for both, and with --user there may be neither.
ENV PATH=/opt/dstrain/bin:$PATH DSTRAIN_CACHE=/work/cache HOME=/tmp USER=dstrain \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /work
USER 10001
ENTRYPOINT ["dstrain"]
CMD ["--help"]
