"""Templates that are called directly render what transformers renders."""

import copy
import pickle
import re
import threading
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from perce import UserError
from perce.data.chat import ChatFormat
from perce.data.prompt import PLAIN_CHAT_TEMPLATE
from perce.data.template import ChatTemplate, has_system_role, on_one_day
from perce.reading.fields import Turn
from tests.helpers.templates import CHAT_TEMPLATES
from tests.helpers.tiny import GEMMA, LLAMA3, MISTRAL, MISTRAL_V3, tiny_tokenizer
from tests.helpers.tokenizers import tokenizer_like

TALK = (
    ("system", "Be brief."),
    ("user", "  Who? {{ x }}"),
    ("assistant", "<think>\nHm.\n</think>\n\nI."),
    ("user", "é"),
)


@on_one_day()
def rendered(call):
    """The text, or the exception that is raised instead."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, None])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_template_renders_what_transformers_renders(name, variables):
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = name and CHAT_TEMPLATES[name]
    template = None if name else PLAIN_CHAT_TEMPLATE
    own = pickle.loads(pickle.dumps(ChatTemplate(tokenizer, template, variables)))
    for talk in (TALK, TALK[1:], TALK[1:2], TALK[:3], TALK[1:3]):
        for generation in (True, False):
            said = [{"role": role, "content": content} for role, content in talk]
            expected = rendered(
                lambda said=said, generation=generation: tokenizer.apply_chat_template(
                    said, tokenize=False, add_generation_prompt=generation, chat_template=template, **variables
                )
            )
            assert rendered(lambda talk=talk, generation=generation: own.render(talk, generation)) == expected


def test_most_are_called_directly_and_none_with_what_transformers_would_read():
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    assert ChatTemplate(tokenizer, None, {"enable_thinking": False})._given is not None
    for variables in ({"tools": []}, {"tokenize": True}, {"continue_final_message": True}, {"x": object()}):
        assert ChatTemplate(tokenizer, None, variables)._given is None


@pytest.mark.parametrize("variables", [{}, {"tools": []}])
def test_every_day_is_the_same(variables, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = CHAT_TEMPLATES["date-now"]
    texts = set()
    for day in (1, 2):
        now = datetime(2030, 5, day)
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda now=now: now))
        assert "May 2030" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        texts.add(ChatTemplate(tokenizer, None, variables).render(TALK[1:2], True))
    (text,) = texts
    assert "Today is 01 January 2026." in text


def test_threads_leave_the_clock_of_transformers_as_it_was():
    clock, begun = chat_template_utils.datetime, threading.Event()

    def first():
        with on_one_day():
            begun.set()
            time.sleep(0.1)

    def second():
        begun.wait()
        with on_one_day():
            time.sleep(0.2)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert chat_template_utils.datetime is clock


def test_whether_a_template_renders_a_system_message():
    assert has_system_role(tiny_tokenizer(LLAMA3)) and not has_system_role(tiny_tokenizer(GEMMA))
    assert has_system_role(tiny_tokenizer(MISTRAL)) and not has_system_role(tiny_tokenizer(MISTRAL_V3))
    assert has_system_role(tiny_tokenizer(GEMMA), LLAMA3) and not has_system_role(tiny_tokenizer(None))
    assert not has_system_role(
        tiny_tokenizer("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    )


# ---- variables that the template does not read


def with_variables(template, variables):
    tokenizer = copy.deepcopy(tokenizer_like("qwen2"))
    tokenizer.chat_template = CHAT_TEMPLATES.get(template, template)
    return ChatFormat(tokenizer, variables)


@pytest.mark.parametrize(
    ("template", "variables", "said"),
    [
        ("qwen3-switch", {"enable_thinkin": False}, "does not read enable_thinkin. Did you mean enable_thinking?"),
        ("qwen3-switch", {"x": 1, "enable_thinking": False, "y": 1}, "does not read x, y. It reads enable_thinking."),
        ("chatml", {"enable_thinking": False}, "does not read enable_thinking. It reads none."),
        (None, {"enable_thinking": False}, "does not read enable_thinking. It reads none."),
        ("named", {"documents": []}, "does not read documents. It reads none."),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(template, variables, said):
    with pytest.raises(UserError, match=f"^chat_template_kwargs: .*{re.escape(said)}"):
        with_variables(template, variables)


@pytest.mark.parametrize(
    "reads",
    [
        "{{ x }}",
        "{% macro written() %}{{ x }}{% endmacro %}{{ written() }}",
        "{% set x = x | default('') %}{{ x }}",
        "{% if x is not defined %}{% set x = '' %}{% endif %}{{ x }}",
        "{% set kept = namespace(x=x) %}{{ kept.x }}",
        "{% generation %}{{ x }}{% endgeneration %}",
    ],
)
def test_a_variable_that_the_template_reads_is_not(reads):
    assert with_variables(reads + CHAT_TEMPLATES["chatml"], {"x": "Hi."}).prompt([Turn("user", "u")], "")[:3] == "Hi."


def test_the_template_for_tools_is_the_one_that_is_asked():
    with_variables("named", {"tools": []})


def test_variables_are_not_judged_where_it_is_not_known_what_is_read():
    """A tokenizer may render in its own way, and a template that does not compile fails where it is rendered."""
    own = copy.deepcopy(tokenizer_like("qwen2"))
    own.chat_template = CHAT_TEMPLATES["chatml"]
    renders = {"apply_chat_template": lambda self, *args, **kwargs: type(own).apply_chat_template(own, *args, **kwargs)}
    other = copy.deepcopy(own)
    other.__class__ = type("Own", (type(own),), renders)
    ChatFormat(other, {"x": 1})
    with pytest.raises(UserError, match="does not render"):
        with_variables("{% if %}", {"x": 1})
