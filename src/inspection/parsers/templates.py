"""Chat templates: Jinja that whoever loads a model renders, not always in a sandbox.

What a template of a chat never needs, and what leads out of one that is not in a sandbox: dunder
names, attributes by a computed name, modules.
"""

import re
from typing import Final

from modelharbor.db.jobs import Level
from modelharbor.inspection.results import Finding

MOST_TEMPLATE: Final = 1024 * 1024  # characters

_BLOCK_START: Final = re.compile(r"\{[{%]")
_BLOCK_END: Final = re.compile(r"[%}]\}")
# One that is not closed ends with the template; looking for its end from each quote takes for ever.
_LITERAL: Final = re.compile(
    r"""'(?:[^'\\]|\\.)*+(?:'|\\?\Z)|"(?:[^"\\]|\\.)*+(?:"|\\?\Z)""", re.DOTALL
)
# The rule, what it finds, where, and whether texts are left out: the name of an attribute may be one.
_RULES: Final = (
    ("template.dunder", "a dunder name", r"__|\\x5f|\\u005f|\\n\{low line\}", False),
    ("template.attribute", "an attribute by a computed name", r"\|\s*attr\b", True),
    ("template.import", "an import", r"\b(?:import|include|extends)\b", True),
    ("template.module", "a module of the system", r"\b(?:os|subprocess|builtins)\s*[.\[]", True),
)


def template_findings(template: str, offset: int | None = None) -> list[Finding]:
    """One warning for each rule that the blocks of a template break; its prose may say anything."""
    if len(template) > MOST_TEMPLATE:
        return [Finding(Level.WARNING, "template.too_long", "A chat template is too long.", offset)]
    blocks = _blocks(template)
    code = _LITERAL.sub("''", blocks)
    return [
        Finding(Level.WARNING, rule, f"A chat template has {what}.", offset)
        for rule, what, pattern, is_code in _RULES
        if re.search(pattern, code if is_code else blocks, re.IGNORECASE)
    ]


def _blocks(template: str) -> str:
    """What stands between `{{ }}` and `{% %}`; up to the end where one is not closed."""
    parts = []
    at = 0
    while start := _BLOCK_START.search(template, at):
        end = _BLOCK_END.search(template, start.end())
        at = end.end() if end else len(template)
        parts.append(template[start.end() : at])
    return "\n".join(parts)
