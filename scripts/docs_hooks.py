"""What the build of the documentation adds: pictures, drawn by ``docs_pictures.py``; optional pages."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import docs_pictures

# Pages that are in the menu once they are written.
OPTIONAL = {"scaling.md", "theory.md", "paper.md"}


def _existing(nav: list, folder: Path) -> list:
    kept = []
    for entry in nav:
        ((title, page),) = entry.items()
        if isinstance(page, list):
            kept.append({title: _existing(page, folder)})
        elif page not in OPTIONAL or (folder / page).exists():
            kept.append(entry)
    return kept


def on_config(config):
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config) -> Files:
    for name, draw in docs_pictures.PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}.svg", content=draw()))
    return files
