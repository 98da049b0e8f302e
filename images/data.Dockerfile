# What runs the steps without a model (convert, evaluate, gate, report, publish, approved, promote), and what speaks with
# the cluster: submission and schedules of pipelines, rollout, conformance of the store. No torch.
# `make images` gives the bases, which images/bases.env pins.
ARG BUILD_BASE
ARG RUNTIME_BASE

FROM ${BUILD_BASE} AS libraries
WORKDIR /build
COPY images/venv.sh pyproject.toml constraints.txt LICENSE ./
COPY src/medforge/__init__.py src/medforge/
RUN sh venv.sh libraries . jinja2 matplotlib kfp kfp-kubernetes

FROM libraries AS code
COPY README.md ./
COPY src src
COPY components app/components
COPY pipelines app/pipelines
RUN sh venv.sh medforge app

FROM ${RUNTIME_BASE}
COPY --from=libraries /opt/venv /opt/venv
COPY --from=code /build/app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
