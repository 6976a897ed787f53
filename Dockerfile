# docker build -t memgen . && docker run --gpus all -v "$PWD/runs:/home/memgen/runs" memgen fit --config conf/weaver_sft.yaml
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# g++ and ninja: DeepSpeed and Triton compile their launchers at run time.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 python3-dev python3-venv g++ git ninja-build \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home memgen
USER memgen
WORKDIR /home/memgen
RUN python3 -m venv .venv
ENV PATH=/home/memgen/.venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    PIP_NO_CACHE_DIR=1

# Dependencies first: they change less often than the source.
COPY --chown=memgen:memgen pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p src/memgen \
 && touch src/memgen/__init__.py \
 && pip install "$(sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)" \
 && pip install -c constraints.txt -e .

COPY --chown=memgen:memgen src ./src
COPY --chown=memgen:memgen conf ./conf

ENTRYPOINT ["memgen"]
CMD ["--help"]
