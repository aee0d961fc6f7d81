"""Log lines cannot be forged, name their request, and are JSON where that is asked for."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm_bento.log_format import PACKAGE, fields, request_id, set_up

logger = logging.getLogger(f"{PACKAGE}.test_log_format")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is written, with all loggers as they were afterwards."""
    loggers = [logging.getLogger(name) for name in ("", PACKAGE, "bentoml", "py.warnings")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    token = request_id.set(None)
    for one in loggers:
        one.handlers = []
    try:
        yield io.StringIO()
    finally:
        logging.captureWarnings(False)
        request_id.reset(token)
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers, one.propagate, one.level = handlers, propagate, level


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_hold_the_message_its_origin_and_its_values(stream: io.StringIO) -> None:
    set_up("json", "engine", stream=stream)
    logger.info("loaded %d layers", 28, extra=fields(seconds=1.5, kind={"a": [1]}))
    (line,) = objects(stream)
    assert line.pop("time").endswith("Z") and line.pop("pid") > 0
    assert line == {
        "level": "info",
        "logger": logger.name,
        "process": "engine",
        "message": "loaded 28 layers",
        "seconds": 1.5,
        "kind": {"a": [1]},
    }


def test_text_lines_hold_the_same(stream: io.StringIO) -> None:
    set_up("text", "worker", stream=stream)
    logger.warning("careful", extra=fields(path="/v1/models", what="two words", count=3))
    line = stream.getvalue()
    assert line.endswith('Z [worker] WARNING careful path=/v1/models what="two words" count=3\n')


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\u2028b\u2029c", "\x1b[31mred\x00\x85", "\ud800", "é"])
def test_no_text_makes_a_second_line_or_an_escape_code(stream: io.StringIO, log_format: Any, text: str) -> None:
    set_up(log_format, "worker", stream=stream)
    logger.error("it said %s", text, extra=fields(value=text))
    written = stream.getvalue()
    assert len(written.splitlines()) == 1
    assert all(character.isprintable() or character == "\ud800" for character in written[:-1])


def test_every_line_of_a_request_names_it(stream: io.StringIO) -> None:
    set_up("json", "worker", stream=stream)
    logger.info("before")
    request_id.set("abc")
    logger.info("within")
    assert [line.get("request_id") for line in objects(stream)] == [None, "abc"]


def test_a_traceback_is_part_of_its_json_line(stream: io.StringIO) -> None:
    set_up("json", "worker", stream=stream)
    try:
        raise ValueError("no\nway")
    except ValueError:
        logger.exception("failed")
    (line,) = objects(stream)
    assert line["exception"].startswith("Traceback") and "no\nway" in line["exception"]


def test_the_level_holds(stream: io.StringIO) -> None:
    set_up("text", "worker", level="warning", stream=stream)
    logger.info("quiet")
    logger.warning("loud")
    assert "quiet" not in stream.getvalue() and "loud" in stream.getvalue()


def test_loggers_that_another_configuration_turned_off_speak_again(stream: io.StringIO) -> None:
    """As logging.config.dictConfig does, which BentoML calls, to all loggers that exist before it."""
    logger.disabled = True
    set_up("json", "worker", stream=stream)
    logger.info("here")
    assert objects(stream)[0]["message"] == "here"


def test_with_json_other_loggers_lines_are_json_too(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, which come after the fixture
    theirs = logging.getLogger("bentoml")
    theirs.handlers, theirs.propagate = [logging.StreamHandler(stream)], False
    theirs.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    theirs.setLevel("INFO")
    set_up("json", "worker", stream=stream)
    theirs.info("starting")
    logging.getLogger("tokenizers").warning("old")
    assert [(line["logger"], line["message"]) for line in objects(stream)] == [
        ("bentoml", "starting"),
        ("tokenizers", "old"),
    ]


def test_setting_up_again_does_not_double_lines(stream: io.StringIO) -> None:
    for _ in range(2):
        set_up("json", "worker", stream=stream)
    logger.info("once")
    assert len(objects(stream)) == 1
