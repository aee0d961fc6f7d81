"""Keys: how they are written, what they stand for, and that nothing is served without one."""

import hashlib
import json
import os
from pathlib import Path

import httpx
import pytest

from nanovllm_bento.config import ServiceConfig
from nanovllm_bento.errors import ConfigError, InvalidRequestError, UnsupportedFieldError
from nanovllm_bento.serving import auth
from nanovllm_bento.serving.app import create_app
from nanovllm_bento.serving.auth import ANONYMOUS, Caller, KeyLimits, KeyStore, caller_of, current_caller, parse_keys
from nanovllm_bento.serving.middleware import Authentication, middlewares, protect
from tests.serving.fakes import FakeEngine, make_context

ALICE, BOB = "alice-key-1234567", "bob-key-12345678"


def store(text: str | None, path: Path | None = None, **options: bool) -> KeyStore:
    return KeyStore(text, None if path is None else str(path), **options)


def name_of(keys: KeyStore, key: str) -> str | None:
    caller = keys.find(key.encode())
    return caller and caller.name


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_INTERVAL", 0.0)


# -- how keys are written ---------------------------------------------------------------------------------------------


def test_keys_are_written_as_a_list_or_as_lines() -> None:
    for text in (f"alice:{ALICE},bob:{BOB}:-3", f"# ours\nalice:{ALICE}\n\nbob:{BOB}:-3  # urgent\n"):
        keys = store(text)
        assert (name_of(keys, ALICE), name_of(keys, BOB), name_of(keys, "no-such-key")) == ("alice", "bob", None)
        assert keys.find(BOB.encode()).priority == -3


def test_keys_are_written_as_json_with_limits_of_their_own() -> None:
    keys = store(json.dumps([{"name": "alice", "key": ALICE, "priority": 2, "max_concurrency": 8}]))
    caller = keys.find(ALICE.encode())
    assert caller == Caller("alice", 2, "key:alice", KeyLimits(max_concurrency=8))


def test_a_key_may_be_given_by_its_hash_and_without_a_name() -> None:
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    keys = store(f"alice:sha256={digest},{BOB}")
    assert name_of(keys, ALICE) == "alice"
    assert name_of(keys, f"sha256={digest}") is None, "the hash itself must open nothing"
    name = name_of(keys, BOB)
    assert name is not None and name.startswith("key-") and BOB not in name


def test_two_keys_of_one_name_are_one_caller() -> None:
    keys = store(f"alice:{ALICE},alice:{BOB}")
    assert keys.find(ALICE.encode()) is keys.find(BOB.encode())


@pytest.mark.parametrize(
    "text",
    [
        "alice:short",
        "alice:",
        f"alice:{ALICE}:high",
        f"al ice?:{ALICE}\x00",
        f"../alice:{ALICE}",
        f"alice:{ALICE}:1,alice:{BOB}:2",
        f"alice:{ALICE},bob:{ALICE}",
        "alice:sha256=12",
        f"alice:{ALICE}:99999999999",
        f"a:b:c:{ALICE}",
        "[" * 100_000,
        f'{{"alice": "{ALICE}"}}',
        json.dumps([{"name": "alice", "key": ALICE, "rate": 1}]),
        json.dumps([{"name": "alice", "key": ALICE, "requests_per_minute": 0}]),
        "",
        "# nobody",
        "[]",
    ],
)
def test_bad_keys_are_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        store(text)
    assert ALICE not in str(error.value) and "short" not in str(error.value)


def test_keys_stay_out_of_representations() -> None:
    config = ServiceConfig.create(env={"NANOVLLM_API_KEYS": f"alice:{ALICE}"})
    assert ALICE not in repr(config) + str(config.model_dump()) + repr(KeyStore.of(config).__dict__["_callers"])


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path, at_once: None) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:{ALICE}\n")
    keys = store(f"bob:{BOB}", path)
    assert (name_of(keys, ALICE), name_of(keys, BOB)) == ("alice", "bob")
    replacement = tmp_path / "new"
    replacement.write_text("carol:carol-key-123456\n")
    os.replace(replacement, path)
    assert (name_of(keys, "carol-key-123456"), name_of(keys, ALICE), name_of(keys, BOB)) == ("carol", None, "bob")


@pytest.mark.parametrize("broken", ["alice:x", "[{", None])
def test_a_file_that_breaks_leaves_the_keys_and_says_so(
    tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:{ALICE}\n")
    keys = store(None, path)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    assert name_of(keys, ALICE) == "alice"
    assert "stay as they were" in caplog.text and ALICE not in caplog.text


def test_a_file_that_is_emptied_lets_nobody_in(tmp_path: Path, at_once: None) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:{ALICE}\n")
    keys = store(None, path)
    path.write_text("# all revoked\n")
    assert name_of(keys, ALICE) is None


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        middlewares(ServiceConfig.create(env={}, api_keys_file=str(tmp_path / "absent")))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = store(f"alice:{ALICE},bob:{BOB}")
    compared: list[bytes] = []
    real = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    for key in (ALICE, BOB, "wrong", ""):
        compared.clear()
        keys.find(key.encode())
        assert len(compared) == 2, "the work must not tell which key matched, or whether one did"


# -- what a caller may do ---------------------------------------------------------------------------------------------


def test_no_cache_salt_of_one_caller_gives_anothers() -> None:
    isolated = store(f"alice:{ALICE},bob:{BOB}")
    alice, bob = (isolated.find(key.encode()) for key in (ALICE, BOB))
    asked = [None, "", "x", alice.cache_salt, bob.cache_salt, alice.salt("x"), bob.salt(None), "\0x"]
    assert not {alice.salt(salt) for salt in asked} & {bob.salt(salt) for salt in asked}
    assert alice.salt("x") != alice.salt("y") and alice.salt(None) == alice.salt("")
    shared = store(f"alice:{ALICE},bob:{BOB}", isolated=False)
    assert shared.find(ALICE.encode()).salt("x") == shared.find(BOB.encode()).salt("x") == ANONYMOUS.salt("x") == "x"


def test_a_key_makes_its_requests_less_urgent_but_never_more() -> None:
    alice = Caller("alice", 5)
    assert alice.effective_priority(None, "priority") == 5 and alice.effective_priority(9, "priority") == 9
    for asked in (4, 0, -1):
        with pytest.raises(InvalidRequestError, match="at least 5") as error:
            alice.effective_priority(asked, "priority")
        assert error.value.param == "priority"
    assert ANONYMOUS.effective_priority(-7, "priority") == -7
    assert alice.effective_priority(None, "fcfs") == alice.effective_priority(0, "fcfs") == 0
    with pytest.raises(UnsupportedFieldError, match="scheduling_policy"):
        alice.effective_priority(6, "fcfs")


# -- over HTTP --------------------------------------------------------------------------------------------------------


def client(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")  # type: ignore[arg-type]


def protected_app(engine: FakeEngine, **settings: object) -> object:
    context = make_context(engine, **settings)
    return protect(create_app(context), context.config)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong-key", f"Basic {ALICE}", ALICE, f"Bearer {ALICE} x", "Bearer é"],
)
async def test_nothing_is_served_without_a_key(header: str | None) -> None:
    engine = FakeEngine()
    async with client(protected_app(engine, api_keys=f"alice:{ALICE}")) as http:
        headers = {} if header is None else {"Authorization": header.encode()}
        for method, path in [
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/metrics"),
            ("POST", "/generate_batch"),
            ("GET", "/health/"),
            ("GET", "//health"),
            ("GET", "/elsewhere"),
        ]:
            answer = await http.request(method, path, headers=headers, json={"prompt": "a"})
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert not engine.requests


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_key_opens_everything(scheme: str) -> None:
    engine = FakeEngine()
    async with client(protected_app(engine, api_keys=f"alice:{ALICE},bob:{BOB}")) as http:
        for key in (ALICE, BOB):
            answer = await http.post(
                "/v1/completions", json={"prompt": "a"}, headers={"Authorization": f"{scheme} {key}"}
            )
            assert answer.status_code == 200


async def test_the_engine_is_asked_on_behalf_of_the_caller() -> None:
    engine = FakeEngine()
    async with client(protected_app(engine, api_keys=f"alice:{ALICE}:3,bob:{BOB}")) as http:
        for key in (ALICE, BOB):
            for body in ({}, {"cache_salt": "x"}, {"stream": True}):
                answer = await http.post(
                    "/v1/completions", json={"prompt": "a", **body}, headers={"Authorization": f"Bearer {key}"}
                )
                assert answer.status_code == 200
        urgent = {"json": {"prompt": "a", "priority": 2}, "headers": {"Authorization": f"Bearer {ALICE}"}}
        answer = await http.post("/v1/completions", **urgent)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
    salts = [salt for salt, _ in engine.options.values()]
    assert salts[0] == salts[2] and salts[3] == salts[5] and len(set(salts)) == 4 and "" not in salts
    assert [priority for _, priority in engine.options.values()] == [3, 3, 3, 0, 0, 0]


async def test_a_keys_limits_hold_over_http() -> None:
    engine = FakeEngine()
    limited = json.dumps([{"name": "alice", "key": ALICE, "requests_per_minute": 2}, {"name": "bob", "key": BOB}])
    async with client(protected_app(engine, api_keys=limited, max_stop_strings=1, max_messages=1)) as http:

        async def ask(key: str, **body: object) -> httpx.Response:
            header = {"Authorization": f"Bearer {key}"}
            return await http.post("/v1/completions", json={"prompt": "a", **body}, headers=header)

        statuses = [(await ask(ALICE, stream=stream)).status_code for stream in (False, True, False, True)]
        assert statuses == [200, 200, 429, 429]
        refusal = await ask(ALICE)
        assert 1 <= int(refusal.headers["retry-after"]) <= 30
        assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await ask(BOB)).status_code == 200
        assert (await ask(BOB, stop=["a", "b"])).json()["error"]["param"] == "stop"
        assert (await ask(BOB, prompt="x" * 100_000)).json()["error"]["code"] == "context_length_exceeded"
        two = {"messages": [{"role": "user", "content": "a"}] * 2}
        answer = await http.post("/v1/chat/completions", json=two, headers={"Authorization": f"Bearer {BOB}"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


async def test_two_authorization_headers_are_refused() -> None:
    async with client(protected_app(FakeEngine(), api_keys=f"alice:{ALICE}")) as http:
        pair = [("Authorization", f"Bearer {ALICE}"), ("Authorization", "Bearer other-key")]
        assert (await http.get("/v1/models", headers=pair)).status_code == 401


async def test_health_needs_no_key_and_more_can_be_opened() -> None:
    async with client(protected_app(FakeEngine(), api_keys=f"alice:{ALICE}")) as http:
        assert (await http.get("/health")).status_code == 200
    opened = protected_app(FakeEngine(), api_keys=f"alice:{ALICE}", api_key_open_paths="/v1/models")
    async with client(opened) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/health")).status_code == 401


async def test_without_keys_there_is_no_authentication() -> None:
    assert Authentication not in [kind for kind, _ in middlewares(ServiceConfig.create(env={}))]
    async with client(protected_app(FakeEngine())) as http:
        assert (await http.get("/v1/models")).status_code == 200


async def test_the_caller_is_known_behind_the_middleware_and_only_there() -> None:
    seen: list[Caller] = []

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        seen.extend((caller_of(scope), current_caller.get()))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    keys = store(f"alice:{ALICE}")
    async with client(Authentication(app, keys, frozenset({"/open"}))) as http:
        await http.get("/x", headers={"Authorization": f"Bearer {ALICE}"})
        await http.get("/open", headers={"nanovllm.caller": "alice", "X-Caller": "alice"})
    alice = keys.find(ALICE.encode())
    assert seen == [alice, alice, ANONYMOUS, ANONYMOUS]
    assert current_caller.get() is ANONYMOUS


def test_a_list_of_keys_may_be_longer_than_one() -> None:
    assert [key.name for key in parse_keys("a:12345678, b:12345679\nc:12345670", "test")] == ["a", "b", "c"]
