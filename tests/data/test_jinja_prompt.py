"""Prompts worded by a Jinja template: its values, its limits, and refusals before training."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys

import pytest

from nextquill.data import HistoryItem, PromptTemplate
from nextquill.errors import ArgumentError, BackendUnavailableError, RecordError

DATED = HistoryItem("Long waves.", title="Sea", timestamp=1711843200.0)
HISTORY = (DATED, HistoryItem("Thin plot."))
OFFICIAL = """\
[Request]:
{{ query }}

[User's past texts]:
{% if counterfactual %}
None
{% endif %}
{% for item in history %}
{% if item.title is not none %}
[Title]: {{ item.title }}
{% endif %}
[Text]: {{ item.text }}
{% if not loop.last %}

{% endif %}
{% endfor %}

[Response]:
"""


def test_the_built_in_wording_as_a_template() -> None:
    template = PromptTemplate(prompt_jinja=OFFICIAL)
    for history in ((), HISTORY[:1], HISTORY):
        assert template.render("a tale", history) == PromptTemplate().render("a tale", history)


def test_items_have_title_text_and_day() -> None:
    source = "{{ query }}{% for i in history %}|{{ i.title }},{{ i.text }},{{ i.timestamp }}{% endfor %}"
    template = PromptTemplate(prompt_jinja=source)
    assert template.render("q", HISTORY) == "q|Sea,Long waves.,2024-03-31|None,Thin plot.,None"
    newest_first = PromptTemplate(prompt_jinja=source, newest_first=True)
    assert newest_first.render("q", HISTORY) == "q|None,Thin plot.,None|Sea,Long waves.,2024-03-31"


def test_a_timestamp_that_is_no_day_matters_only_where_it_is_shown() -> None:
    item = HistoryItem("x", timestamp=1e15)
    assert PromptTemplate(prompt_jinja="{{ query }} {{ history[0].text if history }}{{ history | length }}").render(
        "q", [item]
    )
    with pytest.raises(RecordError, match=r"^timestamp: expected seconds"):
        PromptTemplate(prompt_jinja="{{ query }} {% for i in history %} {{ i.timestamp }} {% endfor %}").render(
            "q", [item]
        )


def test_what_is_inserted_is_cleaned_after_the_templates_filters() -> None:
    template = PromptTemplate(prompt_jinja="<s>{{ query | lower }} {% for i in history %}{{ i.text }} {% endfor %}")
    rendered = template.render("<S>", [HistoryItem("<s>")], lambda text: text.replace("<s>", "< s>"))
    assert rendered == "<s>< s> < s> "


def test_the_template_travels_as_json_and_pickle() -> None:
    template = PromptTemplate(prompt_jinja=OFFICIAL, counterfactual="placebo", show_dates=True)
    assert PromptTemplate(**json.loads(json.dumps(dataclasses.asdict(template)))) == template
    assert pickle.loads(pickle.dumps(template)).render("a", HISTORY) == template.render("a", HISTORY)


REFUSED = {
    "syntax": ("{{ query }}\n{% for item in history %}", "line 2: Unexpected end of template"),
    "unknown-name": ("{{ query }}\n\n{{ user_id }} {{ history | length }}", "line 3: 'user_id' is undefined"),
    "unknown-field": (
        "{{ query }} {% for i in history %}\n{{ i.author }}{% endfor %}",
        "line 2: .* has no attribute 'author'",
    ),
    "title-of-none": ("{{ query }}\n{% for i in history %} {{ i.title + '!' }} {% endfor %}", "line 2: unsupported"),
    "no-query": ("{% for i in history %}{{ i.text }}\n{% endfor %}", "shows the query, got none with a history"),
    "query-only-with-history": (
        "{% for i in history %}{{ query }} {{ i.text }}\n{% endfor %}",
        "shows the query, got none without history",
    ),
    "no-history": ("{{ query }}", "shows the history, got one prompt for all"),
    "history-not-read": ("{{ query }} {{ 'some' if history else 'none' }}", "shows the history, got one prompt"),
    "texts-adjoin": (
        "{{ query }} {% for i in history %}{{ i.text }}{% endfor %}",
        "between the texts, got a text followed by a text at once",
    ),
    "query-adjoins": (
        "{% for i in history %}{{ i.text }} {% endfor %}{% for i in history %}{{ i.text }}{% endfor %}{{ query }}",
        "between the texts, got a text followed by ",
    ),
    "reaches-out": ("{{ query.__class__.__mro__ }} {{ query }}", "line 1: .*unsafe"),
    "reads-private": ("{{ query }} {% for i in history %}{{ i._day }}{% endfor %}", "line 1: .*unsafe"),
    "changes-values": ("{{ query }} {{ history.append(1) }}", "line 1: "),
    "runs-away": ("{{ query }}{% for i in range(999999999) %} {% endfor %}{{ history }}", "line 1: Range too big"),
    "deep-brackets": (f"{{{{ query }}}} {{{{ {'(' * 3000}1{')' * 3000} }}}} {{{{ history }}}}", "nested too deep"),
    "deep-ifs": ("{{ query }}" + "{% if query %}" * 200 + "{% endif %}" * 200 + "{{ history }}", "nested too deep"),
    "deep-loops": ("{{ query }}" + "{% for i in history %}" * 99 + "{% endfor %}" * 99 + "{{ history }}", "nested too"),
    "endless-macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ query }} {{ f() }}{{ history }}", "maximum recursion"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_template_that_cannot_be_used_is_refused(source: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^prompt_jinja: .*{message}"):
        PromptTemplate(prompt_jinja=source)


LOOPS = {
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered": "{% for i in range(99999) %}{% for j in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "recursive": "{% for i in range(9) recursive %}{{ loop(range(9)) if loop.depth < 99 }}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "call": "{% macro f() %}{% for i in range(9) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% call f() %}{% call f() %}{% call f() %}{% call f() %}{% call f() %}{% call f() %}{% call f() %}"
    "{% endcall %}{% endcall %}{% endcall %}{% endcall %}{% endcall %}{% endcall %}{% endcall %}{% endcall %}",
}
COSTS = {
    "string": "{{ (' ' * 3000000000) | length }}",
    "folded": "{{ 9 ** (9 ** 9) }}",
    "words": "{{ lipsum(n=10 ** 6) | length }}",
    "slices": "{{ history | slice(10 ** 9) | list | length }}",
    "nested-lists": "{% set n = namespace(a=[0]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
}
SHOWS = "{{ query }} {{ history | length }} "


@pytest.mark.parametrize("source", [*LOOPS.values(), *COSTS.values()], ids=[*LOOPS, *COSTS])
def test_a_template_beyond_its_budget_is_refused_in_one_line(source: str) -> None:
    beyond = r"takes more than (1 second of computing|512 MiB)|line 1: more than 100,000 steps of loops and macros"
    with pytest.raises(ArgumentError, match=rf"^prompt_jinja: [^\n]*({beyond})$"):
        PromptTemplate(prompt_jinja=SHOWS + source)


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_loops_are_bounded_where_only_later_texts_start_them(source: str) -> None:
    template = PromptTemplate(prompt_jinja=SHOWS + f"{{% if query | length > 20 %}}{source}{{% endif %}}")
    with pytest.raises(ArgumentError, match=r"^prompt_jinja: line 1: more than 100,000 steps of loops and macros$"):
        template.render("a long query, which no probe is", HISTORY)
    assert template.render("q", HISTORY) == "q 2 ", "the next prompt starts with a whole budget"


@pytest.mark.parametrize("piece", ["{{ ' ' * 999999 }}", " " * 99999], ids=["inserted", "written"])
def test_the_output_is_bounded_where_only_later_texts_start_it(piece: str) -> None:
    loop = f"{{% for i in range(9999) %}}{piece}{{% endfor %}}"
    template = PromptTemplate(prompt_jinja=SHOWS + f"{{% if query | length > 20 %}}{loop}{{% endif %}}")
    with pytest.raises(ArgumentError, match=r"^prompt_jinja: (line 1: )?more than 50,000,000 characters$"):
        template.render("a long query, which no probe is", HISTORY)


def test_a_template_cannot_set_what_counts() -> None:
    source = "{% set step = query %}{% set spent = 1 %}{% for i in range(9) %}{% endfor %}"
    assert PromptTemplate(prompt_jinja=SHOWS + source).render("q") == "q 0 "


def test_a_failure_on_later_values_names_the_line() -> None:
    template = PromptTemplate(prompt_jinja="{{ query }}\n{{ 10 // (query | length - 3) }} {{ history | length }}")
    with pytest.raises(ArgumentError, match=r"^prompt_jinja: line 2: .*by zero"):
        template.render("abc", HISTORY)


def test_jinja_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendUnavailableError, match=r"^prompt_jinja: needs jinja2.*nextquill\[cli\]"):
        PromptTemplate(prompt_jinja="{{ query }} {{ history }} unseen before")
