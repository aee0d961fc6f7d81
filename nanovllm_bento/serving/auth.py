"""Who is asking: API keys, and the caller that a key stands for.

Keys come from ServiceConfig.api_keys (NANOVLLM_API_KEYS) and ServiceConfig.api_keys_file, which is read again when it
changes. Only their SHA-256 is kept. What a caller may use is the business of admission.py; the HTTP side of refusing
one is in middleware.py.

A list of keys, separated by commas, spaces or line ends (``#`` begins a comment)::

    name:key             a caller and its key; several keys of one name are one caller, for changing keys without a gap
    name:key:priority    the smallest (most urgent) priority its requests may have; 0 if not given
    key                  a caller named after the key's hash
    name:sha256=HEX      the key's SHA-256 in its place, so that the file holds no secret

or JSON, which can also say each caller's own limits::

    [{"name": "a", "key": "...", "priority": 0, "max_concurrency": 8, "requests_per_minute": 60,
      "tokens_per_minute": 100000}]
"""

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import msgspec

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError, InvalidRequestError, UnsupportedFieldError

logger = logging.getLogger(__name__)

SCOPE_KEY = "nanovllm.caller"
"""Where the authentication middleware leaves the caller in an ASGI scope. Nothing a client sends can set it."""
MIN_KEY_LENGTH = 8
MAX_NAMES = 1024
"""Different callers, at most: each has a row in the table of limits."""
RELOAD_INTERVAL = 1.0
"""Seconds between looks at the keys' file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_KEY = re.compile(rf"[\x21-\x7e]{{{MIN_KEY_LENGTH},512}}")
_HASHED = "sha256="
_PRIORITY_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """A caller's own limits; None takes the setting of the same name (max_concurrency: max_concurrency_per_key)."""

    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


_NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request runs.

    priority: the most urgent (smallest) its requests may have, and the one they have if they ask for none.
    cache_salt: not empty where its cached prefixes are its own.
    """

    name: str
    priority: int = 0
    cache_salt: str = ""
    limits: KeyLimits = _NO_LIMITS

    def salt(self, asked: str | None) -> str:
        """The salt for the engine of a request that asks for ``asked`` (the body's cache_salt).

        Callers with a salt of their own never meet: hashed, so that no choice of ``asked`` gives another's.
        """
        if not self.cache_salt:
            return asked or ""
        return hmac.digest(self.cache_salt.encode(), (asked or "").encode(), "sha256").hex()

    def effective_priority(self, asked: int | None, policy: str) -> int:
        """The priority for the engine, whose scheduling_policy is ``policy``, of a request that asks for ``asked``.

        Raises UnsupportedFieldError if the policy knows no priorities, InvalidRequestError for one that is more urgent
        than the caller's own.
        """
        if policy != "priority":
            if asked:
                raise UnsupportedFieldError(
                    f"priority={asked} needs scheduling_policy=priority, but it is {policy} here.", param="priority"
                )
            return 0
        if asked is None or self.name == ANONYMOUS.name:
            return asked or self.priority
        if asked < self.priority:
            raise InvalidRequestError(
                f"priority must be at least {self.priority} with this API key, got {asked} (lower is more urgent).",
                param="priority",
            )
        return asked


ANONYMOUS = Caller("")
"""The caller of every request where no keys are configured."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)
"""The caller of the request this task serves, for code that sees no scope: BentoML parses a batch item in its own
request's task, but runs the batch in another."""


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """The caller of a request, by its ASGI scope."""
    caller: Caller = scope.get(SCOPE_KEY, ANONYMOUS)
    return caller


class ApiKey(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One key as configured. key: the key itself, or sha256=HEX."""

    key: str
    name: str = ""
    priority: int = 0
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the key."""
        if self.key.startswith(_HASHED):
            return bytes.fromhex(self.key.removeprefix(_HASHED))
        return hashlib.sha256(self.key.encode()).digest()


class KeyStore:
    """All keys. ``find`` is called with every request; the file is looked at once in RELOAD_INTERVAL.

    Raises ConfigError for keys that cannot be read, and where keys are configured but there are none: that never means
    that everybody may ask. A file that breaks later leaves the keys as they are and says so in the log; one that is
    emptied lets nobody in.
    """

    def __init__(self, text: str | None, path: str | None, *, isolated: bool = True) -> None:
        self._isolated = isolated
        self._path = path
        self._fixed = parse_keys(text, "NANOVLLM_API_KEYS") if text is not None else []
        self._callers: list[tuple[bytes, Caller]] = []
        self._seen: tuple[int, ...] | None = None
        self._next_look = 0.0
        if path is not None:
            self._seen = self._look()
        self._set(self._read())
        if not self._callers:
            raise ConfigError(
                "API keys are configured, but there is none. Add one, or unset api_keys and api_keys_file."
            )

    @classmethod
    def of(cls, config: ServiceConfig) -> "KeyStore | None":
        """The configured keys; None if no keys are configured, so that everybody may ask."""
        text = config.api_keys.get_secret_value() if config.api_keys is not None else None
        if text is None and config.api_keys_file is None:
            return None
        return cls(text, config.api_keys_file, isolated=config.prefix_cache_isolation == "key")

    def find(self, key: bytes) -> Caller | None:
        """The caller whose key this is. Takes the same time for any key: every hash is compared, none only in part."""
        if self._path is not None and time.monotonic() >= self._next_look:
            self._refresh()
        digest = hashlib.sha256(key).digest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(digest, known):
                found = caller
        return found

    def _refresh(self) -> None:
        self._next_look = time.monotonic() + RELOAD_INTERVAL
        try:
            seen = self._look()
            if seen == self._seen:
                return
            keys = self._read()
            self._set(keys)
        except ConfigError as e:
            logger.error("the API keys stay as they were: %s", e)
        else:
            self._seen = seen
            logger.info("API keys read again: %d", len(keys))

    def _look(self) -> tuple[int, ...]:
        """What changes when the file does."""
        assert self._path is not None
        try:
            status = os.stat(self._path)
        except OSError as e:
            raise ConfigError(f"api_keys_file={self._path!r} cannot be read: {e.strerror}.") from None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[ApiKey]:
        if self._path is None:
            return self._fixed
        try:
            with open(self._path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
            raise ConfigError(f"api_keys_file={self._path!r} cannot be read: {reason}.") from None
        return self._fixed + parse_keys(text, f"api_keys_file={self._path!r}")

    def _set(self, keys: Sequence[ApiKey]) -> None:
        callers: dict[bytes, Caller] = {}
        by_name: dict[str, Caller] = {}
        for key in keys:
            digest = key.digest
            name = key.name or f"key-{digest.hex()[:12]}"
            limits = KeyLimits(key.max_concurrency, key.requests_per_minute, key.tokens_per_minute)
            caller = Caller(name, key.priority, f"key:{name}" if self._isolated else "", limits)
            if by_name.setdefault(name, caller) != caller:
                raise ConfigError(f"the API keys named {name!r} must have the same priority and limits.")
            if callers.setdefault(digest, caller).name != name:
                raise ConfigError(f"{name!r} and {callers[digest].name!r} have the same API key.")
        if len(by_name) > MAX_NAMES:
            raise ConfigError(f"there are {len(by_name)} names of API keys; at most {MAX_NAMES} are supported.")
        self._callers = [(digest, by_name[caller.name]) for digest, caller in callers.items()]


def parse_keys(text: str, source: str) -> list[ApiKey]:
    """The keys in a text of either form (see the module). No message of an error holds a key. Raises ConfigError."""
    if text.lstrip().startswith(("[", "{")):
        try:
            keys = msgspec.json.decode(text, type=list[ApiKey])
        except (msgspec.MsgspecError, RecursionError) as e:
            raise ConfigError(f"{source} is not a JSON array of API keys: {e}.") from None
    else:
        lines = [line.partition("#")[0] for line in text.splitlines()]
        entries = re.split(r"[,\s]+", "\n".join(lines).strip(", \t\r\n"))
        keys = [_parse_entry(entry, source, i) for i, entry in enumerate(entries) if entry]
    for i, key in enumerate(keys):
        _check(key, f"{source}, key {i + 1}{f' ({key.name})' if _NAME.fullmatch(key.name) else ''}")
    return keys


def _parse_entry(entry: str, source: str, index: int) -> ApiKey:
    parts = entry.split(":")
    if len(parts) == 1:
        return ApiKey(entry)
    try:
        name, key, priority = parts if len(parts) == 3 else (*parts, "0")
        return ApiKey(key, name, int(priority))
    except ValueError:
        raise ConfigError(f"{source}, key {index + 1}: write name:key or name:key:priority (a number).") from None


def _check(key: ApiKey, where: str) -> None:
    if key.name and not _NAME.fullmatch(key.name):
        raise ConfigError(f"{where}: a name has 1 to 64 letters, digits and _.@- in it.")
    if key.key.startswith(_HASHED):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", key.key.removeprefix(_HASHED)):
            raise ConfigError(f"{where}: {_HASHED} must be followed by 64 hexadecimal digits.")
    elif not _KEY.fullmatch(key.key):
        raise ConfigError(f"{where}: a key has {MIN_KEY_LENGTH} to 512 ASCII characters and no space.")
    if not -_PRIORITY_LIMIT <= key.priority < _PRIORITY_LIMIT:
        raise ConfigError(f"{where}: priority must fit 32 bits.")
    for name in KeyLimits.__slots__:
        value = getattr(key, name)
        if value is not None and value < 1:
            raise ConfigError(f"{where}: {name} must be at least 1, got {value}.")
