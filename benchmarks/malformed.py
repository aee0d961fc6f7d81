"""HTTP requests that no client should send: the cases of benchmarks/fuzz.py and tests/e2e/test_fuzz.py.

``make_case(seed, i)`` gives the same bytes each time, whatever was made before. Not responsible for sending them.
"""

import gzip
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BATCHED = "/generate_batch"
PATHS = (
    COMPLETIONS,
    CHAT,
    BATCHED,
    "/v1/models",
    "/v1/models/tiny",
    "/health",
    "/livez",
    "/readyz",
    "/healthz",
    "/metrics",
    "/docs.json",
    "/schema.json",
    "/openapi.json",
    "/docs",
    "/",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@dataclass(slots=True)
class Case:
    """One connection's worth of bytes.

    ending: what the client does once all is sent. "answer": reads one answer, which must come. "eof": says that it
    sends no more and reads until the server closes, which it must. "leave": resets the connection.
    """

    kind: str
    data: bytes
    ending: str = "answer"


def http(
    body: bytes = b"", path: str = COMPLETIONS, method: str = "POST", headers: dict[str, str] | None = None
) -> bytes:
    """A request as bytes. ``headers`` replace the usual ones; a header with the value "" is left out."""
    usual = {"Host": "fuzz", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in (usual | (headers or {})).items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1", "replace") + body


def make_case(seed: int, index: int) -> Case:
    """Case ``index`` of a run; its kind goes round."""
    rng = Random(f"{seed}-{index}")
    kinds = list(_KINDS)
    kind = kinds[index % len(kinds)]
    made = _KINDS[kind](rng)
    data, ending = made if isinstance(made, tuple) else (made, "answer")
    return Case(kind, data, ending)


def valid(rng: Random) -> tuple[str, dict[str, Any]]:
    """A path and a body that it accepts; short to serve."""
    sampling: dict[str, Any] = {"max_tokens": rng.randint(1, 4), "temperature": rng.choice((0, 0.7))}
    extras = {
        "n": 2,
        "seed": 7,
        "stop": ["x", "yz"],
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stream": True,
        "cache_salt": "salt",
        "logit_bias": {},
        "user": "u",
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "response_format": {"type": "text"},
        "priority": 0,
        "presence_penalty": 0,
        "logprobs": None,
    }
    path = rng.choice((COMPLETIONS, CHAT, BATCHED))
    if path == BATCHED:
        return path, {"requests": [{"prompt": "Hello", "sampling": dict(sampling)} for _ in range(rng.randint(1, 3))]}
    for name in rng.sample(list(extras), rng.randint(0, 4)):
        sampling[name] = extras[name]
    if path == CHAT:
        return path, {"messages": [{"role": "user", "content": "Hello"}], **sampling}
    return path, {"prompt": rng.choice(("Hello", [72, 101], ["a", "b"], [[1, 2], [3]])), **sampling}


def _junk(rng: Random, depth: int = 3) -> Any:
    """Any JSON value."""
    simple = (
        None,
        True,
        False,
        "",
        "x",
        "\x00",
        "\ud800",
        "é\U0001f600",
        0,
        -1,
        1,
        1.5,
        -0.0,
        2**31,
        2**63,
        2**64,
        -(2**63) - 1,
        10**30,
        1e308,
        5e-324,
    )
    roll = rng.random()
    if depth == 0 or roll < 0.7:
        return rng.choice(simple)
    if roll < 0.85:
        return [_junk(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    return {_word(rng): _junk(rng, depth - 1) for _ in range(rng.randint(0, 4))}


def _word(rng: Random, longest: int = 12) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + "_-.$", k=rng.randint(1, longest)))


def _noise(rng: Random, longest: int = 200) -> bytes:
    return rng.randbytes(rng.randint(1, longest))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _places(inner)
    return found


def _put(rng: Random, raw: str) -> bytes:
    """A valid request with one value replaced by ``raw``, which need not be JSON."""
    path, body = valid(rng)
    container, key = rng.choice(_places(body))
    container[key] = "@@"
    return http(json.dumps(body).replace('"@@"', raw).encode("utf-8", "surrogatepass"), path)


def _mutated_json(rng: Random) -> bytes:
    path, body = valid(rng)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = rng.choice((b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"//", b"\x00"))
            case 3:
                data[at:at] = data[: rng.randint(1, 30)]
    return http(bytes(data), path)


def _wrong_types(rng: Random) -> bytes:
    path, body = valid(rng)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(_places(body))
        container[key] = _junk(rng)
    return http(json.dumps(body).encode(), path)


def _wrong_document(rng: Random) -> bytes:
    whole = rng.choice((b"", b" ", b"null", b"[]", b"{}", b'""', b"0", b"true", b"{}{}", b"\xef\xbb\xbf{}", b"'x'"))
    return http(whole, rng.choice((COMPLETIONS, CHAT, BATCHED)))


def _unknown_fields(rng: Random) -> bytes:
    path, body = valid(rng)
    containers = [body, *(c[k] for c, k in _places(body) if isinstance(c[k], dict))]
    rng.choice(containers)[_word(rng)] = _junk(rng)
    return http(json.dumps(body).encode(), path)


def _numbers(rng: Random) -> bytes:
    exact = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "0x10", "01", "1.", ".5", "+1", "1e", "-")
    digits = rng.choice((20, 400, 5_000, 100_000))
    return _put(rng, rng.choice((*exact, "9" * digits, "-" + "9" * digits, "0." + "1" * digits, "1e" + "9" * 20)))


def _deep_nesting(rng: Random) -> bytes:
    depth = rng.choice((50, 200, 1_000, 10_000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    raw = opening * depth + "0" + closing * (depth if rng.random() < 0.7 else rng.randrange(depth))
    return http(raw.encode(), rng.choice((COMPLETIONS, CHAT, BATCHED))) if rng.random() < 0.3 else _put(rng, raw)


def _bad_text(rng: Random) -> bytes:
    """Bytes that are not UTF-8, lone surrogates, control characters."""
    path, body = valid(rng)
    data = json.dumps(body).encode()
    bad = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\\ud800", b"\\udc00x", b"\\u0000"))
    data = data.replace(b"Hello", b"He" + bad + b"llo", 1)
    if rng.random() < 0.3:
        data = json.dumps(body).encode(rng.choice(("utf-16", "utf-32", "utf-16-be")))
    return http(data, path)


def _large(rng: Random) -> bytes:
    size = rng.choice((10_000, 300_000))
    body: dict[str, Any] = rng.choice(
        (
            {"prompt": "a" * size, "max_tokens": 1},
            {"prompt": [1] * size, "max_tokens": 1},
            {"prompt": ["a"] * min(size, 20_000), "max_tokens": 1},
            {"prompt": "a", "max_tokens": 1, "stop": ["b" * 10] * (size // 10)},
            {"prompt": "a", "max_tokens": 1, "stop": ["b" * size]},
            {"prompt": "a", "max_tokens": 1, "user": "u" * size},
            {"prompt": "a", "max_tokens": 1, "stop_token_ids": list(range(size))},
            {_word(rng) + str(i): i for i in range(size // 20)},
        )
    )
    return http(json.dumps(body).encode())


def _truncated_body(rng: Random) -> tuple[bytes, str]:
    path, body = valid(rng)
    whole = http(json.dumps(body).encode(), path)
    return whole[: rng.randrange(1, len(whole))], rng.choice(("eof", "leave"))


def _content_length(rng: Random) -> tuple[bytes, str]:
    path, body = valid(rng)
    data = json.dumps(body).encode()
    right = len(data)
    if rng.random() < 0.3:  # the rest is read as the next request
        return http(data, path, headers={"Content-Length": str(rng.randrange(right))}), "answer"
    length = rng.choice((str(right + rng.randint(1, 9)), "-1", "x", f"{right}, {right + 1}", "9" * 30, "0x10", "1e2"))
    whole = http(data, path, headers={"Content-Length": length})
    if rng.random() < 0.2:
        whole = http(data, path).replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1)
    return whole, "eof"


def _pipelined(rng: Random) -> tuple[bytes, str]:
    first = http(path=rng.choice(("/health", "/v1/models", "/nothing")), method="GET", headers={"Content-Length": ""})
    path, body = valid(rng)
    more = rng.choice(
        (_noise(rng), b"\r\n\r\n\r\n", b"GET\r\n\r\n", http(json.dumps(body).encode(), path) * 3, b"\x16\x03")
    )
    return first * rng.randint(1, 3) + more, rng.choice(("answer", "eof"))


def _chunked(rng: Random) -> tuple[bytes, str]:
    path, body = valid(rng)
    data = json.dumps(body).encode()
    head = http(
        path=path, headers={"Content-Length": "", "Transfer-Encoding": rng.choice(("chunked", "chunked, gzip"))}
    )
    cut = rng.randrange(len(data))
    pieces = [b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:cut], data[cut:]) if part]
    good = b"".join(pieces) + b"0\r\n\r\n"
    match rng.randrange(5):
        case 0:
            return head.replace(b"chunked, gzip", b"chunked") + good, "answer"
        case 1:
            return head + good[: rng.randrange(len(good))], rng.choice(("eof", "leave"))
        case 2:
            return head + rng.choice((b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"\r\n")) + data, "eof"
        case 3:
            return head + b"%x\r\n" % (len(data) + 5) + data + b"\r\n0\r\n\r\n", "eof"
        case _:
            both = head.replace(b"\r\n\r\n", b"\r\nContent-Length: 4\r\n\r\n", 1)
            return both + good, "eof"


def _headers(rng: Random) -> tuple[bytes, str]:
    path, body = valid(rng)
    data = json.dumps(body).encode()
    flood = {f"X-{i}-{_word(rng)}": _word(rng, 40) for i in range(rng.choice((10, 200, 2_000)))}
    odd: dict[str, str] = rng.choice(
        (
            flood,
            {"X-Long": "v" * rng.choice((1_000, 60_000, 200_000))},
            {"X-Request-ID": _noise(rng).decode("latin-1").replace("\r", "").replace("\n", "")},
            {"X-Request-ID": "r" * 5_000},
            {"Authorization": rng.choice(("Bearer", "Bearer " + "k" * 10_000, "Basic !!!!", "\xff\xfe"))},
            {
                "Content-Type": rng.choice(
                    ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "/")
                )
            },
            {"Content-Type": "application/json; charset=" + rng.choice(("utf-16", "no-such", '"'))},
            {"Content-Encoding": rng.choice(("gzip", "br", "no-such"))},
            {"Accept": rng.choice(("text/html", "*/*;q=x", "\x7f"))},
            {"Expect": "100-continue"},
            {"Upgrade": "websocket", "Connection": "Upgrade"},
            {"Bad Name": "x"},
            {"X-Null": "a\x00b"},
            {"traceparent": _word(rng, 60)},
            {"Args": _word(rng), "Bentoml-Payload": _word(rng)},
        )
    )
    if odd.get("Content-Encoding") == "gzip" and rng.random() < 0.5:
        data = gzip.compress(data)
    return http(data, path, headers=odd), "eof" if _unframed(odd) else "answer"


def _unframed(headers: dict[str, str]) -> bool:
    """Whether the server may refuse the connection instead of answering."""
    return (
        any(c in value for value in headers.values() for c in "\x00\x7f")
        or "Bad Name" in headers
        or any(ord(c) < 32 for value in headers.values() for c in value)
    )


def _paths(rng: Random) -> bytes:
    odd = (
        "/v1/" + _word(rng),
        "/" + _word(rng),
        "/v1/models/" + _word(rng),
        "/v1/models/%00",
        "/v1/models/" + "m" * 5_000,
        "/v1/../health",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static_content/../../service.py",
        "/v1/completions/",
        "//v1//completions",
        "/v1/completions?" + _word(rng) + "=%ff",
        "/v1/%ff%fe",
        "/v1/" + "a/" * 500,
        "*",
        "http://elsewhere/v1/models",
    )
    path = rng.choice((*odd, *PATHS))
    method = rng.choice((*METHODS, "TRACE", "CONNECT" if path.startswith("/v1") else "PROPFIND"))
    body = json.dumps(_junk(rng)).encode() if rng.random() < 0.5 else b""
    return http(body, path, method)


def _garbage(rng: Random) -> tuple[bytes, str]:
    odd = (
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    return rng.choice((_noise(rng, 2_000), _noise(rng) + b"\r\n\r\n", *odd)), "eof"


def _early_leave(rng: Random) -> tuple[bytes, str]:
    path, body = valid(rng)
    return http(json.dumps(body).encode(), path) * rng.randint(1, 2), "leave"


_KINDS: dict[str, Callable[[Random], bytes | tuple[bytes, str]]] = {
    "mutated_json": _mutated_json,
    "wrong_types": _wrong_types,
    "wrong_document": _wrong_document,
    "unknown_fields": _unknown_fields,
    "numbers": _numbers,
    "deep_nesting": _deep_nesting,
    "bad_text": _bad_text,
    "large": _large,
    "truncated_body": _truncated_body,
    "content_length": _content_length,
    "pipelined": _pipelined,
    "chunked": _chunked,
    "headers": _headers,
    "paths": _paths,
    "garbage": _garbage,
    "early_leave": _early_leave,
}
