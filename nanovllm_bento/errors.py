"""Every error this package raises on purpose, by name.

Bad input from a caller is an ``InvalidRequestError`` (HTTP 400 or 404, in OpenAI's shape: message, type, param, code);
a wrong setting is a ``ConfigError``; a model that cannot be found or read is a ``ModelError``; a fault of the engine
itself is an ``EngineError``. Messages name the value, the bound and the way out.
"""


class NanoVLLMError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidRequestError(NanoVLLMError, ValueError):
    """A request that cannot be served as asked. ``param`` names the field, ``code`` is OpenAI's error code."""

    status_code = 400
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class EmptyPromptError(InvalidRequestError):
    """The prompt holds no token."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for one output token within max_model_len."""

    code = "context_length_exceeded"


class PromptExceedsCacheError(InvalidRequestError):
    """The request can never fit in the whole KV cache."""

    code = "context_length_exceeded"


class TokenOutOfVocabularyError(InvalidRequestError):
    """A prompt token id or a stop token id is negative or not below the vocabulary size."""


class SamplingParamsError(InvalidRequestError):
    """A sampling parameter is out of its range or of the wrong type."""


class UnsupportedFieldError(InvalidRequestError):
    """A request field that this version does not support."""

    code = "unsupported_parameter"


class ModelNotServedError(InvalidRequestError):
    """The request names a model that this service does not serve."""

    status_code = 404
    code = "model_not_found"


class ConfigError(NanoVLLMError, ValueError):
    """An engine or service setting is unknown, out of range, or not possible on this machine."""


class ModelError(NanoVLLMError):
    """Base of errors about a model's files."""


class ModelNotFoundError(ModelError):
    """The model's name leads to no files; the message names the remedy."""


class UnsupportedArchitectureError(ModelError):
    """The checkpoint's architecture is not one of the supported ones (the message lists those)."""


class CheckpointError(ModelError):
    """A checkpoint has missing, extra or misshapen tensors; the message names them."""


class CorruptFileError(ModelError):
    """A model file is truncated or not what its name says."""


class EngineError(NanoVLLMError):
    """Base of faults of the engine."""


class EngineDeadError(EngineError):
    """The engine ended or hangs; the request could not be finished."""


class RankError(EngineDeadError):
    """A tensor-parallel rank died, failed or hangs; the message names it."""


class ShuttingDownError(EngineDeadError):
    """The service ends, and the request had not finished in the time it was given for that."""


class DeadlineExceededError(EngineError):
    """The request's deadline passed before it had finished."""


class EngineNotReadyError(EngineError):
    """The engine is still starting, or is being restarted."""


class DeviceMemoryError(EngineError):
    """The device has no memory left for a step; the step's requests cannot be finished, the engine goes on."""
