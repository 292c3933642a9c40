"""Chat templates: those of known models are fine, ways out of Jinja are not."""

import pytest

from modelharbor.inspection.parsers.templates import MOST_TEMPLATE, template_findings

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = "{%- if tools %}{{- 'Environment: ipython\n# import os. __init__' | trim }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "",
        CHATML,
        "import os. __class__ is prose outside of the blocks",
        "{{ 'it is important to import os.' }}",
        "{{ messages | map(attribute='content') | join('\\n') | tojson(indent=4) }}",
        "{# a comment #}{{ bos_token }}",
        "{{ '{{' }}",
    ],
)
def test_harmless(template: str) -> None:
    assert template_findings(template) == []


@pytest.mark.parametrize(
    ("template", "rules"),
    [
        ("{{ ''.__class__.__mro__[1] }}", ["dunder"]),
        ("{% set x = cycler.__init__.__globals__.os.popen('id') %}", ["dunder", "module"]),
        ("{{ x['__class__'] }}", ["dunder"]),
        ("{{ x['\\x5f\\x5fclass\\x5f\\x5f'] }}", ["dunder"]),
        ("{{ x['\\u005f\\u005fclass'] }}", ["dunder"]),
        ("{{ x | attr('_' ~ '_class') }}", ["attribute"]),
        ("{{ x|attr(y) }}", ["attribute"]),
        ("{% import 'evil' as e %}", ["import"]),
        ("{%- include 'evil' -%}", ["import"]),
        ("{% extends evil %}", ["import"]),
        ("{{ os.system('id') }}", ["module"]),
        ("{{ subprocess ['run'] }}", ["module"]),
        ("{{ 'never closed' }} {{ x.__class__", ["dunder"]),
        ("{{ 'a text that is not closed }} os.", []),
        ("{% if x %}{{ 'a' }}{% endif %}{{ builtins.eval }}", ["module"]),
    ],
)
def test_ways_out(template: str, rules: list[str]) -> None:
    found = template_findings(template, 7)
    assert [finding.rule.removeprefix("template.") for finding in found] == rules
    assert {finding.offset for finding in found} <= {7}
    assert {finding.severity.value for finding in found} <= {"WARNING"}


@pytest.mark.parametrize(
    "template", ["'", "{{", "{{'\\'", "{{ |", "{%'\"", "{{}}", "__", "{{\\", "{{ os "]
)
def test_long_templates_take_no_longer_for_each_character(template: str) -> None:
    """A pattern that goes back would take hours for these."""
    template_findings(template * (MOST_TEMPLATE // len(template)))


def test_too_long() -> None:
    assert [each.rule for each in template_findings("x" * (MOST_TEMPLATE + 1))] == [
        "template.too_long"
    ]
