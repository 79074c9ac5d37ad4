"""The page: one template, its style and scripts, and the data, put into one file.

No value of a record ever becomes markup: all of them travel in one JSON block, in which ``<``, ``>``
and ``&`` are escaped, and the script only ever sets text. A content security policy in the page
allows no address but the page's own data.
"""

from __future__ import annotations

import base64
import json
import re
from importlib.resources import files
from typing import Any

# Inside <script>, "</script>" and "<!--" must not occur; U+2028 and U+2029 end lines in old engines.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def embed_json(value: Any) -> str:
    """Return ``value`` as JSON that may stand inside an HTML script element.

    >>> embed_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).translate(_ESCAPES)


def render(data: dict[str, Any], title: str) -> str:
    """Return the page.

    Args:
        data: from :func:`ssl3d.report.data.report_data`. Without scenes the viewer is left out.
        title: of the report.
    """
    folder = files("ssl3d.report")
    viewer = bool(data["viewer"]["scenes"])
    niivue = (folder / "vendor" / "niivue.umd.js.gz").read_bytes() if viewer else b""
    licence = (folder / "vendor" / "LICENSE-niivue").read_text(encoding="utf-8") if viewer else ""
    parts = {
        "style": (folder / "report.css").read_text(encoding="utf-8"),
        "script": (folder / "report.js").read_text(encoding="utf-8"),
        "data": embed_json({"title": title, **data}),
        "niivue": base64.b64encode(niivue).decode(),
        "licence": licence,
    }
    template = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
