# What runs the steps with a model: base, validate, train, merge, predict.
# `make images` gives the bases, which images/bases.env pins; VARIANT=gpu has CUDA's torch, DeepSpeed and liger-kernel.
# FlashAttention-2 is in torch's own attention; FLASH_ATTN=flash-attn==… adds the package, which nvcc then compiles.
ARG BUILD_BASE
ARG RUNTIME_BASE

FROM ${BUILD_BASE} AS libraries
ARG VARIANT=cpu
ARG TORCH_INDEX=""
ARG FLASH_ATTN=""
WORKDIR /build
COPY images/venv.sh pyproject.toml constraints.txt LICENSE ./
COPY src/medforge/__init__.py src/medforge/
# a component brings its own code in its command, and needs kfp's executor alone, not the client and what is behind it;
# tensorboard writes curves here, and what serves them to a browser is elsewhere
RUN if [ "$VARIANT" = gpu ]; then set -- ".[train,distributed]" liger-kernel; else set -- ".[train]"; fi \
    && ALONE=kfp WITHOUT=tensorboard-data-server sh venv.sh libraries "$@"

FROM libraries AS code
COPY README.md ./
COPY src src
RUN sh venv.sh medforge app

FROM ${RUNTIME_BASE}
ARG VARIANT=cpu
RUN --mount=type=bind,source=images/runtime.sh,target=/mnt/runtime.sh sh /mnt/runtime.sh compiler
COPY --from=libraries /opt/venv /opt/venv
COPY --from=code /build/app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
