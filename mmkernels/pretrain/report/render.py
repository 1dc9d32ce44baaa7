"""Pages from templates: one self-contained file, with everything escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["rendered"]


def rendered(template: str, **values: Any) -> str:
    """A page of the templates in this package."""
    pages = Environment(
        loader=PackageLoader("mmkernels.pretrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["percent"] = lambda share: f"{100 * share:.1f}"
    return pages.get_template(template).render(**values)
