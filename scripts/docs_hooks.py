"""What the build of the documentation adds: pictures, drawn by ``docs_pictures.py``, and formulas."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import ziamath
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import docs_pictures

FORMULA = re.compile(r"^\$\$(.+?)\$\$$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config) -> Files:
    for name, draw in docs_pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    return FORMULA.sub(lambda found: drawn(found[1]), markdown)


def on_post_page(output: str, page, config) -> str:
    if "$$" in output:
        raise PluginError(f"{page.file.src_uri}: a formula that begins or ends within a line")
    return output


def drawn(latex: str) -> str:
    """A formula as a picture in the text's colour: no script, and nothing fetched from elsewhere."""
    latex = " ".join(latex.split())
    svg = ziamath.Latex(latex, size=18, color="currentColor").svg()
    return f'<div role="img" aria-label="{html.escape(latex)}" style="overflow-x: auto">{svg}</div>'
