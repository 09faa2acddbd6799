"""The report of an executable: one page that needs neither a network nor a server."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_STYLES = ("page.css",)
# In this order: each uses what stands before it.
_SCRIPTS = ("source.js", "canvas.js", "model.js", "arrange.js", "graph.js", "charts.js") + (
    "details.js",
    "tables.js",
    "main.js",
)


def page(data: dict[str, Any]) -> str:
    """The page that shows `data` (see `graphc.viz.report.data`), whole: styles, programs, data."""
    folder = files(__name__)

    def read(names: tuple[str, ...]) -> str:
        return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)

    # "</script>" in a kernel's source or a name must not end the element.
    document = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    html = read(("page.html",))
    for mark, text in (("STYLE", read(_STYLES)), ("SCRIPT", read(_SCRIPTS)), ("DATA", document)):
        html = html.replace(f"/*{mark}*/", text, 1)
    return html
