"""Keeps what clients send out of BentoML's log.

What BentoML's own routes (generate_batch, score) refuse it logs with a traceback, and pydantic puts pieces of the body
into that: a prompt with one mistyped field would be written down. Here such a record only says where it was.
"""

import logging

from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from nanovllm_bento.errors import InvalidRequestError

_BENTOML_LOGGER = "bentoml._internal.server.http_app"
_FAULTS_OF_CLIENTS = (ValidationError, InvalidRequestError, ClientDisconnect)


class _WithoutInput(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        exc = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(exc, _FAULTS_OF_CLIENTS):
            record.msg = f"{record.getMessage()}: refused ({type(exc).__name__})"
            record.args, record.exc_info, record.exc_text = (), None, None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


def keep_bodies_out_of_logs() -> None:
    """To be called once in each worker; more often does no harm."""
    logger = logging.getLogger(_BENTOML_LOGGER)
    if not any(isinstance(known, _WithoutInput) for known in logger.filters):
        logger.addFilter(_WithoutInput())
