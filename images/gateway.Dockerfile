# What hospital systems and readers call. No torch, no model. What it keeps lies in /data, which is to be mounted.
# `make images` gives the bases, which images/bases.env pins.
ARG BUILD_BASE
ARG RUNTIME_BASE

FROM ${BUILD_BASE} AS libraries
WORKDIR /build
COPY images/venv.sh pyproject.toml constraints.txt LICENSE ./
COPY src/medforge/__init__.py src/medforge/
# it opens no data set, and pyarrow would be a third of the image
RUN WITHOUT=pyarrow sh venv.sh libraries ".[gateway]"

FROM libraries AS code
COPY README.md ./
COPY src src
COPY serving/__init__.py app/serving/
COPY serving/gateway app/serving/gateway
RUN sh venv.sh medforge app \
    && mkdir data

FROM ${RUNTIME_BASE}
COPY --from=libraries /opt/venv /opt/venv
COPY --from=code /build/app /app
COPY --from=code --chown=10001:10001 /build/data /data
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MEDFORGE_GATEWAY_HOST=0.0.0.0 MEDFORGE_GATEWAY_DATA_DIR=/data
WORKDIR /app
EXPOSE 8080
USER 10001:10001
CMD ["python", "-m", "serving.gateway"]
