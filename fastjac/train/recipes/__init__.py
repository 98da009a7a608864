"""Recipes: YAML files of options, by name or by path.

A key is an option of a command. A mapping under a command's name (``teacher:``, ``student:``,
``table:``) holds options for that command alone, over the shared ones.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fastjac.errors import FastjacError, is_file, read_text, unknown
from fastjac.train.options import StudentOptions, TableOptions, TeacherOptions, names

SECTIONS: dict[str, type] = {
    "teacher": TeacherOptions,
    "student": StudentOptions,
    "table": TableOptions,
}


class _Loader(yaml.SafeLoader):
    """YAML, where a key that stands twice in a mapping is an error, as the standard has it.

    A value is a text or null, to be read by the type of its option, as on the command line: YAML would
    make 750 of 12:30, 1.1 of 1.10 and False of no.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                problem = f"the key {key[1]!r} stands there twice"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node


def known() -> list[str]:
    """The names of the recipes that come with the package."""
    found = (Path(entry.name) for entry in files(__name__).iterdir())
    return sorted(path.stem for path in found if path.suffix == ".yaml")


def read_recipe(name: str, command: str) -> dict[str, Any]:
    """The options that recipe ``name`` (or the YAML file of that path) has for ``command``.

    Raises for an unknown recipe or key, with the nearest right names.
    """
    if name in known():
        text = files(__name__).joinpath(f"{name}.yaml").read_text("utf-8")
    elif is_file(name):
        text = read_text(name)
    elif Path(name).suffix in (".yaml", ".yml"):
        raise FastjacError(f"--config {name}: no such file")
    else:
        raise unknown("recipe", name, known())
    try:
        content = yaml.load(text, _Loader)
        json.dumps(content, skipkeys=True, default=str)  # raises for an alias of what it is in
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date in month 13; [[[[...
        raise FastjacError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise FastjacError(f"{name}: expected a mapping of options to values")
    shared, sections = {}, {}
    for key, value in content.items():
        key = str(key)
        if isinstance(value, dict) and key in SECTIONS:
            sections[key] = {str(k): v for k, v in value.items()}
        else:
            shared[key] = value
    everywhere = sorted({n for cls in SECTIONS.values() for n in names(cls)})
    _check_keys(shared, everywhere, name)
    for section, values in sections.items():
        _check_keys(values, names(SECTIONS[section]), f"{name}, section {section!r}")
    own = names(SECTIONS[command])
    merged = {**shared, **sections.get(command, {})}
    options = {key.replace("-", "_"): value for key, value in merged.items()}
    return {key: value for key, value in options.items() if key in own and key != "config"}


def _check_keys(values: dict[str, Any], right: list[str], where: str) -> None:
    for key in values:
        if key.replace("-", "_") not in right:
            raise unknown("recipe key", key, [n.replace("_", "-") for n in right], where)
        if "_" in key and key.replace("_", "-") in values:
            raise FastjacError(f"{where}: the key {key!r} stands there twice, with - and with _")
