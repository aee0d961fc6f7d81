"""How log lines look, in API workers and in the engine's process: text for people, or one JSON object a line.

A line cannot be forged: whatever a message holds, its line breaks and control characters are written as escapes.
"""

import json
import logging
import os
import re
import sys
import time
from contextvars import ContextVar
from typing import Any, Literal, TextIO

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The HTTP request that the current task works for; every line logged there names it."""

PACKAGE = "nanovllm_bento"
_FOREIGN = ("", "bentoml", "uvicorn", "uvicorn.error", "uvicorn.access", "circus", "py.warnings")
"""Loggers whose handlers somebody else installs in the same process ("" is the root)."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def fields(**values: Any) -> dict[str, Any]:
    """``extra`` of a logging call whose line holds these values besides its message."""
    return {"fields": values}


def set_up(
    log_format: Literal["text", "json"], process: str, *, level: str = "info", stream: TextIO | None = None
) -> None:
    """Have this package's loggers write to ``stream`` (standard error), and with json all others' in that form too.

    process: what it is, "worker" or "engine". May be called again; the last call counts.
    """
    formatter = JsonFormatter(process) if log_format == "json" else TextFormatter(process)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    ours = logging.getLogger(PACKAGE)
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(level.upper())
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(PACKAGE) and isinstance(logger, logging.Logger):
            logger.disabled = False  # logging.config.dictConfig turns off what existed before it
    root = logging.getLogger()
    if not root.handlers:  # nobody else logs here: libraries' warnings are for us
        root.handlers = [handler]
    logging.captureWarnings(True)
    if log_format == "json":
        for name in _FOREIGN:
            for other in logging.getLogger(name).handlers:
                other.setFormatter(formatter)


class TextFormatter(logging.Formatter):
    """``time [process] LEVEL message key=value …``; a traceback follows on lines of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), f"[{self.process}]", record.levelname, record.getMessage().translate(_ESCAPES)]
        parts += [f"{key}={_shown(value)}" for key, value in _values(record).items()]
        line = " ".join(parts)
        exception = _exception(self, record)
        return line if exception is None else f"{line}\n{exception}"


class JsonFormatter(logging.Formatter):
    """An object with time, level, logger, process, pid and message, then request_id, the line's values, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self.process,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        line |= _values(record)
        exception = _exception(self, record)
        if exception is not None:
            line["exception"] = exception
        return json.dumps(line, default=str)  # ASCII only, so that it holds any text, lone surrogates too


def _time(record: logging.LogRecord) -> str:
    """UTC, RFC 3339, to the millisecond."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.created * 1000) % 1000:03d}Z"


def _values(record: logging.LogRecord) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if (current := request_id.get()) is not None:
        values["request_id"] = current
    values |= getattr(record, "fields", {})
    return values


_PLAIN = re.compile(r"[!#-<>-~]+")
"""Text that is written without quotes: printable ASCII but no space, quote or equals sign."""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value, default=str)


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    if record.exc_info and record.exc_info[0] is not None:
        return formatter.formatException(record.exc_info)
    return record.exc_text
