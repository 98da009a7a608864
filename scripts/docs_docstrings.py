"""Docstrings as the documentation shows them: roles as links, examples as code."""

from __future__ import annotations

import re
from pathlib import Path

import griffe

API = Path(__file__).parents[1] / "docs" / "api.md"
SHOWN = {path.rpartition(".")[2]: path for path in re.findall(r"(?m)^::: (\S+)", API.read_text())}
ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


def link(role: re.Match[str]) -> str:
    """A name as code; one that the page of the API has, as a link to it."""
    path, name = role[2], role[2].rpartition(".")[2]
    ours = path.startswith("fastjac.")
    if name in SHOWN and (ours or path == name):
        return f"[`{name}`][{SHOWN[name]}]"
    return f"`{name if ours or role[1] else path}`"


class Docstrings(griffe.Extension):
    """Rewrites each docstring of the package."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(link, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", text)
