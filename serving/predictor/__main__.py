"""``python -m serving.predictor``: serve one release by KServe's protocols and OpenAI's chat API."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.predictor.errors import Refusal, outline

if TYPE_CHECKING:
    from serving.predictor.loading import Loaded
    from serving.predictor.plane import Plane

_PROGRAM = "python -m serving.predictor"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog=_PROGRAM, description="Serve one release of MedForge.")
    add = top.add_argument
    add("--model-dir", "--model_dir", required=True, metavar="PLACE", help="the release: a folder, or s3://…/<digest>/")
    add("--release", metavar="DIGEST", help="the SHA-256 that its manifest must have; without it, the place's own name")
    add("--trusted", type=Path, nargs="+", action="extend", default=[], metavar="FILE.pub",
        help="public keys of the reviewers; one of them must have approved the release")  # fmt: skip
    add("--allow-unsigned", action="store_true", help="serve a candidate that nobody has decided about")
    add("--model-name", "--model_name", default="medforge", metavar="NAME", help="what it is served as (%(default)s)")
    add("--http_port", "--http-port", type=_number(int, 1, 65535), default=8081, metavar="PORT", help="(%(default)s)")
    add("--max-batch", type=_number(int, 1, 1024), default=8, metavar="N", help="requests of a batch (%(default)s)")
    add("--max-wait-ms", type=_number(float, 0, 10_000), default=5.0, metavar="MS",
        help="how long the first request of a batch waits for others (%(default)s)")  # fmt: skip
    add("--queue", type=_number(int, 0, 100_000), default=64, metavar="N",
        help="requests that may wait; more are refused with 429 (%(default)s)")  # fmt: skip
    add("--timeout", type=_number(float, 0.1, 86_400), default=120.0, metavar="SECONDS",
        help="the longest that a request may take, its waiting included (%(default)s)")  # fmt: skip
    add("--max-new-tokens", type=_number(int, 1, 1 << 20), default=512, metavar="N",
        help="the longest answer (%(default)s)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="precision; the model's own if none is given")
    return top


def _number(kind: type[int] | type[float], least: float, most: float) -> Any:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"a number from {least} to {most} is expected")
        return value

    return read


class _NoPayload(logging.Filter):
    """Keeps exceptions' messages out of the log: KServe's and uvicorn's may hold what a request does."""

    def filter(self, record: logging.LogRecord) -> bool:
        """True: the record stays, with the exception's kind and place only."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg, record.args = outline(record.exc_info[1]), ()
            record.exc_info = record.exc_text = None
        return True


def _configure_logging() -> None:
    from kserve.logging import configure_logging

    configure_logging()
    kserve = logging.getLogger("kserve")
    for name in ("serving", "medforge"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = kserve.handlers, False
        logger.setLevel(logging.INFO)
    logging.getLogger("kserve.trace").setLevel(logging.WARNING)  # two lines a request of what the metrics tell
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # KServe's, at each of its answers
    for name in ("kserve", "uvicorn.error"):
        logging.getLogger(name).addFilter(_NoPayload())


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it. Returns 0, or 1 after one line that tells what is wrong."""
    arguments = parser().parse_args(argv)
    # KServe reads the command line when it is imported, and would take --timeout for one of its own
    sys.argv = sys.argv[:1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until the server takes it over
    try:
        with tempfile.TemporaryDirectory(prefix="medforge-") as work:
            _serve(arguments, Path(work))
    except ValueError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(arguments: argparse.Namespace, work: Path) -> None:
    from serving.predictor.engine import Engine
    from serving.predictor.loading import load, obtain, warm_up
    from serving.predictor.metrics import Metrics
    from serving.predictor.plane import Plane

    _configure_logging()
    log = logging.getLogger("serving.predictor")
    release = obtain(arguments.model_dir, arguments.release, arguments.trusted, arguments.allow_unsigned, work)
    log.info("release %s is whole, and %s", release.digest, release.status)
    loaded = load(release, arguments.dtype)
    metrics = Metrics()
    engine = Engine(
        loaded.generation,
        metrics,
        max_batch=arguments.max_batch,
        max_wait=arguments.max_wait_ms / 1000,
        queue=arguments.queue,
    )
    plane = Plane(engine, loaded.generation, max_new_tokens=arguments.max_new_tokens, timeout=arguments.timeout)
    warm_up(plane)
    engine.probe = partial(warm_up, plane)
    _tell(loaded, metrics, arguments.model_name)
    log.info("%s is ready on %s", loaded.version, loaded.generation.model.device)
    _run(arguments, loaded, plane)


def _tell(loaded: Loaded, metrics: Any, name: str) -> None:
    import torch

    release, family = loaded.release, loaded.generation.encoder.family.name
    metrics.release.labels(release.digest, name, loaded.version, family, release.status).set(1)
    if torch.cuda.is_available():
        metrics.watch_memory(torch.cuda.memory_allocated)


def _run(arguments: argparse.Namespace, loaded: Loaded, plane: Plane) -> None:
    """KServe's server with our routes beside its own. gRPC is off: images travel in JSON."""
    from kserve import ModelServer
    from kserve.model_server import app
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    from serving.predictor.front import Front
    from serving.predictor.kserving import ReleaseDataPlane, ReleaseModel
    from serving.predictor.openai import Served, routes

    async def refuse(_: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        return JSONResponse({"error": refusal.message}, refusal.status, refusal.headers())

    name, digest = arguments.model_name, loaded.release.digest
    served = Served(name, digest, loaded.entry(plane.heads, plane.context))
    app.router.routes.extend(routes(plane, served))
    app.add_exception_handler(Refusal, refuse)
    app.add_middleware(Front, headers={"x-medforge-release": digest, "x-medforge-model": name})
    model = ReleaseModel(name, digest[:12], plane)
    server = ModelServer(
        http_port=arguments.http_port,
        workers=1,
        enable_grpc=False,
        enable_latency_logging=False,
        grace_period=round(arguments.timeout) + 1,  # what is in flight may finish
        timeout_keep_alive=65,
    )
    server.dataplane = ReleaseDataPlane(server.registered_models, model)
    server.start([model])


if __name__ == "__main__":
    raise SystemExit(main())
