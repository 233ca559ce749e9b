# dstrain in a container, for GPUs and for CPUs:
#
#     docker build -t dstrain .
#     launch/docker.sh run --zero 2 --pipeline 4
#
# launch/docker.sh types the `docker run` that a training wants; launch/README.md says what goes where, and how to
# train on several machines. Every Python package is a file whose hash stands in requirements/. Nothing here needs a
# newer engine than Docker 20.10 (until 23 with DOCKER_BUILDKIT=1) or podman 4.
#
# BASE_IMAGE may be any Debian or Ubuntu whose own Python is 3.11 or newer (Debian 12, Ubuntu 24.04).
#
# torch is PyPI's, of requirements/torch.txt: its build for Linux brings CUDA's libraries along, as packages that it names
# to the digit: so the base needs none of them, only what lets a GPU in. It also runs where there is no GPU. For a smaller
# one for CPUs, or another build of torch, name a base, a lock with the hashes of that build, and hand pip a configuration
# that names the index of those wheels; it does not stay in the image. docs/containers.md has the commands. (dstrain
# looks for GPUs with nvidia-smi: it finds no others yet.)
#
#     docker build -t dstrain --build-arg BASE_IMAGE=debian:bookworm-slim \
#         --build-arg TORCH_LOCK=requirements/own-torch.txt --secret id=pip,src=pip.conf .
#
# CUDA 13.0 is what torch 2.13.0 is built with.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1


# What the build and the finished image both stand on.
FROM ${BASE_IMAGE} AS base
# git: each run records the state of the folder it is started from. libaio: for --offload nvme; its
# name ends in t64 on newer systems. openssh and pdsh: for runs on several nodes. The host keys that Debian makes are
# thrown away: who has the image has them too.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git '^libaio1(t64)?$' openssh-client openssh-server pdsh python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/* /etc/ssh/ssh_host_*


FROM base AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ccache g++ libaio-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dstrain
ENV PATH=/opt/dstrain/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements requirements

# Each file that pip fetches has a hash that stands in a lock; `pip check` tells in the end whether the locks are whole.
# What other packages are built with stays out of the image: it lies in a folder of its own.
ARG TORCH_LOCK=requirements/torch.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache \
    sed '/^deepspeed==/,/[^\\]$/d' requirements/runtime.txt > others.txt \
    && sed -n '/^deepspeed==/,/[^\\]$/p' requirements/runtime.txt > deepspeed.txt \
    && pip install --require-hashes --no-deps --target /tools -r requirements/build.txt \
    && pip install --require-hashes --no-deps -r "$TORCH_LOCK" \
    && pip install --require-hashes --no-deps -r others.txt

# DeepSpeed compiles its CPU operators on first use, with a compiler that the image does not have. So those that dstrain
# calls are built in: CPU Adam for --offload cpu and nvme, and the reading and writing of nvme. DeepSpeed loads them only
# where the accelerator is of the kind that it was built for: GPUs with a torch for GPUs, CPUs with one for CPUs.
# It builds for the processor at hand; image/c++ makes that one which others have too. Its link line forgets libaio.
COPY image/c++ /usr/local/bin/c++
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache \
    case "$(python -c 'import torch; print(torch.version.cuda or torch.version.hip)')" in \
        None) export DS_ACCELERATOR=cpu ;; \
        *) export DS_ACCELERATOR=cuda ;; \
    esac \
    # pip unpacks it under another name each time, which would spoil the compiler's cache.
    && export CCACHE_DIR=/root/.cache/ccache CCACHE_BASEDIR=/tmp CCACHE_NOHASHDIR=1 \
    && CXX=/usr/local/bin/c++ LDFLAGS='-Wl,--no-as-needed -laio' DS_ENABLE_NINJA=1 \
        DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 DS_BUILD_AIO=1 \
        pip install --require-hashes --no-deps --no-build-isolation --no-cache-dir --no-binary deepspeed \
            -r deepspeed.txt \
    && ccache --show-stats

COPY pyproject.toml .
COPY README.md LICENSE ./
COPY ds_configs ds_configs
COPY dstrain dstrain
COPY launch/docker.sh launch/
RUN PYTHONPATH=/tools pip install --no-deps --no-build-isolation --no-index .
# What nothing runs: headers, and the tests of others.
WORKDIR /opt/dstrain/lib
RUN rm -rf python3*/site-packages/torch/include python3*/site-packages/torch/share python3*/site-packages/torch/test \
        python3*/site-packages/torch/bin/*[tT]est* python3*/site-packages/pandas/tests \
        python3*/site-packages/pyarrow/tests python3*/site-packages/pyarrow/include \
    && pip check


# What the image holds, by name and version. Debian's packages are those of the base: the build's own stay behind.
FROM base AS sbom
COPY --from=build /tools /tools
COPY --from=build /opt/dstrain /opt/dstrain
COPY tools/sbom.py /tools/sbom.py
ENV PYTHONPATH=/tools
RUN dpkg-query --show --showformat '${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n' > /tmp/packages \
    && python3 /tools/sbom.py /opt/dstrain/bin/python < /tmp/packages > /sbom.cdx.json


FROM base
# HOME and USER: the libraries ask for both, and with --user there may be neither. All that is written goes to /work and
# /tmp: mount those, and the rest may be read-only.
ENV PATH=/opt/dstrain/bin:$PATH HOME=/tmp USER=dstrain DSTRAIN_CACHE=/work/cache HF_HOME=/work/cache/huggingface \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /bin/bash dstrain \
    && install -d -m 1777 /work
COPY image/ssh_config /etc/ssh/ssh_config.d/dstrain.conf
COPY image/sshd_config /etc/ssh/dstrain_sshd_config
COPY image/dstrain-node image/dstrain-healthy /usr/local/bin/
COPY --from=build /opt/dstrain /opt/dstrain
COPY --from=sbom /sbom.cdx.json /usr/share/dstrain/sbom.cdx.json
# An image in which something is missing is found here and not on a cluster. One operator takes symbols from another.
RUN python -c 'import ctypes, torch, deepspeed.ops.adam.cpu_adam_op, deepspeed.ops.pin_memory.pin_memory_op as pin; \
    ctypes.CDLL(pin.__file__, ctypes.RTLD_GLOBAL); import deepspeed.ops.aio.async_io_op'
# The version is compared with dstrain's own by the tests.
ARG VERSION=0.2.0.dev0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dstrain" \
      org.opencontainers.image.description="A configuration-driven trainer on DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
WORKDIR /work
USER 10001
HEALTHCHECK --interval=1m --timeout=20s --start-period=30s CMD ["dstrain-healthy"]
ENTRYPOINT ["dstrain"]
CMD ["--help"]
