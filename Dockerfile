# docker build -t memgen .
# docker run --gpus all --shm-size 8g -v "$PWD/runs:/home/memgen/runs" memgen fit --config conf/weaver_sft.yaml
# What a container writes into runs/ belongs to user 1000; another one: docker build --build-arg UID="$(id -u)" ...
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# g++: DeepSpeed and Triton compile their launchers at run time. git: a run records the code's revision.
# The release of the distribution is what pins these: its archive keeps only the newest build of a package.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ git \
 && rm -rf /var/lib/apt/lists/*

# Ubuntu's images have a user 1000 of their own.
ARG UID=1000
RUN if id ubuntu >/dev/null 2>&1; then userdel --remove ubuntu; fi \
 && useradd --create-home --uid "$UID" memgen
USER memgen
WORKDIR /home/memgen
RUN python3 -m venv .venv
ENV PATH=/home/memgen/.venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    PIP_NO_CACHE_DIR=1

# Dependencies first: they change less often than the source.
COPY --chown=memgen:memgen pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p src/memgen runs \
 && touch src/memgen/__init__.py \
 && pip install -c constraints.txt -e .

COPY --chown=memgen:memgen src ./src
COPY --chown=memgen:memgen conf ./conf

ENTRYPOINT ["memgen"]
CMD ["--help"]
