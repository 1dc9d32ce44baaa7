"""How docstrings become pages of the reference, as an extension of griffe (mkdocs.yml). The words are the docstring's;
their form is Google's style with two additions of this package: a `Source:` line, and entries for several arguments.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import (
    Docstring,
    DocstringSection,
    DocstringSectionParameters,
    DocstringSectionRaises,
    ExprTuple,
    Extension,
    Object,
)

__all__ = ["OurStyle"]

# Its first line, and those indented below it.
_SOURCE = re.compile(r"^Source: *(.+(?:\n +\S.*)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class OurStyle(Extension):
    """Sources as paragraphs, examples as code, arguments that share an entry with their type."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        before = obj.docstring
        if before is not None:
            text = _SOURCE.sub(lambda found: "**Source:** " + " ".join(found[1].split()), before.value)
            text = _EXAMPLE.sub("Examples:", text)
            obj.docstring = _Typed(
                text,
                lineno=before.lineno,
                endlineno=before.endlineno,
                parent=obj,
                parser=before.parser,
                parser_options=before.parser_options,
            )


class _Typed(Docstring):
    def parse(self, *args: Any, **options: Any) -> list[DocstringSection]:
        sections = super().parse(*args, **options)
        known = {each.name.lstrip("*"): each for each in getattr(self.parent, "parameters", ())}
        for section in sections:
            for entry in section.value if isinstance(section, DocstringSectionParameters) else ():
                first = known.get(entry.name.split(",")[0].strip(" *"))
                if first is not None and entry.annotation is None:
                    entry.annotation, entry.value = first.annotation, first.default
            for raised in section.value if isinstance(section, DocstringSectionRaises) else ():
                if isinstance(raised.annotation, ExprTuple):  # several errors: without brackets
                    raised.annotation.implicit = True
        return sections
