# KServe's model server for one release; `command` in a pod is this CMD, its arguments are the release's.
# `make images` gives the bases, which images/bases.env pins; VARIANT=gpu has CUDA's torch.
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
RUN sh venv.sh libraries ".[predictor]"

FROM libraries AS code
COPY README.md ./
COPY src src
COPY serving/__init__.py app/serving/
COPY serving/predictor app/serving/predictor
RUN sh venv.sh medforge app

FROM ${RUNTIME_BASE}
ARG VARIANT=cpu
RUN --mount=type=bind,source=images/runtime.sh,target=/mnt/runtime.sh sh /mnt/runtime.sh
COPY --from=libraries /opt/venv /opt/venv
COPY --from=code /build/app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
EXPOSE 8081
USER 10001:10001
CMD ["python", "-m", "serving.predictor"]
