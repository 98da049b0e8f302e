"""Logs as JSON lines on stdout: the gateway's own through structlog, other libraries' through the standard logging.

An exception is logged by its kind and place only: its message may hold what a caller sent.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any

import msgspec
import structlog

_FRAMES = 6


def place(error: BaseException) -> dict[str, Any]:
    """An exception's kind, and the innermost frames that it came through, innermost last; never its message."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return {
        "exception": type(error).__name__,
        "frames": [f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}" for frame in frames],
    }


def _render(_: Any, __: str, event: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


_SHARED: list[Any] = [
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
]


class _Formatter(logging.Formatter):
    """A standard record as the same kind of line."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {"event": "log", "logger": record.name, "message": record.getMessage().strip()}
        if record.exc_info and record.exc_info[1] is not None:
            event |= place(record.exc_info[1])
        for process in _SHARED:
            event = process(None, record.levelname.lower(), event)
        return _render(None, "", event)


def configure(level: str) -> None:
    """Send all logs of this process, of `level` and above, to stdout."""
    structlog.configure(
        processors=[*_SHARED, _render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Formatter())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # whoever imported it may have given it its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.basicConfig(level=max(logging.getLevelName(level), logging.INFO), handlers=[handler], force=True)


def logger() -> Any:
    """The gateway's logger: `logger().info("event", name=value)`."""
    return structlog.get_logger()
