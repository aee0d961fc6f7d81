"""Chat templates render as transformers renders them, and never break the server."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm_bento.errors import CorruptFileError, InvalidRequestError, NanoVLLMError, UnsupportedFieldError
from nanovllm_bento.text.chat_template import ChatTemplate

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<call>' + call.function.name + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
PARTS = """{% for message in messages %}{{ bos_token }}{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"""
USER = [{"role": "user", "content": "hi <b>'é'"}]


def test_a_conversation_renders_with_and_without_the_generation_prompt():
    template = ChatTemplate(CHATML)
    assert template.render(USER) == "<|im_start|>user\nhi <b>'é'<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(USER, add_generation_prompt=False) == "<|im_start|>user\nhi <b>'é'<|im_end|>\n"
    assert template.render(USER, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_json_is_written_without_html_escapes():
    tools = [{"name": "f<&>", "description": "d'é"}]
    assert '{"name": "f<&>", "description": "d\'é"}' in ChatTemplate(CHATML).render(USER, tools=tools)


def test_arguments_sent_as_json_text_reach_the_template_as_an_object():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":"<é>"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert '<call>f{"a": "<é>"}' in ChatTemplate(CHATML).render(messages)
    assert call["function"]["arguments"] == '{"a":"<é>"}'


def test_text_parts_are_joined_for_a_template_of_strings_and_kept_for_one_that_reads_lists():
    message = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate(CHATML).render(message, add_generation_prompt=False) == "<|im_start|>user\na\nb<|im_end|>\n"
    assert ChatTemplate(PARTS, {"bos_token": "<s>"}).render(message) == "<s>[a][b]"
    str_of_list = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    assert ChatTemplate(str_of_list).render(message) == "a\nb"


def test_parts_that_are_not_text_are_refused_by_name():
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(UnsupportedFieldError, match=r"messages\[0\].*'image_url'") as error:
        ChatTemplate(CHATML).render(message)
    assert error.value.param == "messages"


def test_what_the_template_refuses_is_the_requests_error():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate") as error:
        template.render(USER)
    assert (error.value.param, error.value.status_code) == ("messages", 400)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ 1 // 0 }}",
        "{{ undefined.attribute }}",
        "{{ range(10**9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | tojson(indent='x', sort_keys={}) }}{{ [messages] + 1 }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_a_bad_request(source):
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source).render(USER)


def test_a_model_without_a_template_says_what_to_do():
    with pytest.raises(InvalidRequestError, match=r"no chat template.*chat_template\.jinja"):
        ChatTemplate(None).render(USER)


def test_a_template_that_does_not_compile_is_the_models_error():
    with pytest.raises(CorruptFileError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_loop_controls_generation_tags_dates_and_block_trimming_work_as_in_transformers():
    source = (
        "{% for m in messages %}\n  {% generation %}\n{{ m.role }}\n  {% endgeneration %}\n{% break %}\n{% endfor %}"
    )
    assert ChatTemplate(source).render(USER * 2) == "user\n"
    assert len(ChatTemplate("{{ strftime_now('%Y') }}").render(USER)) == 4


def test_a_request_cannot_replace_the_messages_through_template_variables():
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatTemplate(CHATML).render(USER, messages=[])
    assert ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"}).render(USER, bos_token="x") == "x"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["role", "content", "tool_calls", "reasoning", "name", "type"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=4) | JSON, max_size=3), st.sampled_from([CHATML, PARTS]))
def test_any_json_renders_or_is_refused(messages, source):
    try:
        assert isinstance(ChatTemplate(source).render(messages), str)
    except NanoVLLMError as e:
        assert isinstance(e, InvalidRequestError)


def test_renders_what_transformers_renders():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    conversation = [*USER, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    tools = [{"type": "function", "function": {"name": "f<&>", "description": "é"}}]
    for variables in ({}, {"enable_thinking": False}, {"tools": tools}, {"add_generation_prompt": False}):
        theirs, _ = utils.render_jinja_template(
            [conversation], chat_template=CHATML, **{"add_generation_prompt": True, **variables}
        )
        assert ChatTemplate(CHATML).render(conversation, **variables) == theirs[0]
