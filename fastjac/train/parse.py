"""Options from a command line and a recipe."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from fastjac.errors import FastjacError, unknown
from fastjac.train.options import TOPICS, StudentOptions, flag, names
from fastjac.train.recipes import SECTIONS, read_recipe

Options = TypeVar("Options")


def parse(
    command: str,
    cls: type[Options],
    argv: Sequence[str],
    overrides: dict[str, Any] | None = None,
) -> Options:
    """``argv`` as the options of ``command``: flags over the recipe over the defaults.

    ``overrides`` stand over everything. Raises for what is unknown (with the nearest right names)
    or of the wrong type. ``--help`` prints and exits.
    """
    parser = _parser(command, cls)
    argv = _switches_alone(argv, cls)
    flags = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in flags:
            raise unknown("option", name, flags)
    try:
        chosen = parser.parse_args(argv)
        recipe = chosen.get("config")
        if recipe is not None:
            section = command if command in SECTIONS else "table"
            given = read_recipe(os.path.expanduser(recipe), section)
            values = _typed(parser, cls, given, f"in {recipe}")
            if rows := values.get("rows"):
                values["rows"] = {str(name): _typed_row(name, row) for name, row in rows.items()}
            parser.set_defaults(values)
            parser.set_defaults({"config": recipe})
            chosen = parser.parse_args(argv)
    except ArgumentError as error:
        raise FastjacError(_one_line(error, flag)) from error
    return cls(**{**chosen.as_dict(), **(overrides or {})})


def _typed(parser: ArgumentParser, cls: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of ``cls``, with those that are ``given`` by a file; raises for a wrong type."""
    for name, kind in get_type_hints(cls).items():
        expected = None
        if get_origin(kind) is list and not isinstance(given.get(name, []), list):
            expected = "a list"
        if kind in _SWITCH and name in given:
            if (word := str(given[name]).lower()) in _YES_OR_NO:
                given = given | {name: _YES_OR_NO[word]}
            else:
                expected = "true or false"
        if expected is not None:
            raise FastjacError(
                f"recipe key {flag(name)[2:]!r} {where}: expected {expected}, got {given[name]}"
            )
    try:
        return parser.parse_object(given).as_dict()
    except ArgumentError as error:
        named = _one_line(error, lambda name: f"recipe key {flag(name)[2:]!r} {where}")
        raise FastjacError(named) from error


def _typed_row(name: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The options of a table's row, by their types; what is no option stays, to be found later."""
    parser, known = _parser("student", StudentOptions), names(StudentOptions)
    given = {field: row[key] for key in row if (field := str(key).replace("-", "_")) in known}
    typed = _typed(parser, StudentOptions, given, f"in row {name!r}")
    return {key: typed.get(str(key).replace("-", "_"), value) for key, value in row.items()}


_SWITCH = (bool, bool | None)
_YES_OR_NO = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_YES_OR_NO |= {"none": None}


def _switches_alone(argv: Sequence[str], cls: type) -> list[str]:
    """``argv`` with ``--amp`` and ``--no-amp`` for ``--amp=true`` and ``--amp false``."""
    switches = [flag(name) for name, kind in get_type_hints(cls).items() if kind in _SWITCH]
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals and words and words[-1] in switches:
            name, value = words[-1], word
        chosen = _YES_OR_NO.get(value.lower())
        if name not in switches or chosen is None:
            words.append(word)
            continue
        if not equals:
            words.pop()
        words.append(name if chosen else f"--no-{name[2:]}")
    return words


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the example's command in one line."""


def _parser(command: str, cls: type) -> ArgumentParser:
    positional = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
    parser = ArgumentParser(
        prog=f"python -m fastjac.train {command}",
        usage=" ".join(["%(prog)s [OPTIONS]", *positional]),
        description=cls.__doc__,
        epilog=f"example:\n  python -m fastjac.train {cls.example}",
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    hints = get_type_hints(cls)
    groups = {}  # by the option
    for topic in TOPICS:
        if issubclass(cls, topic):
            groups |= dict.fromkeys(names(topic), parser.add_argument_group(topic.__doc__))
    for f in fields(cls):
        group = groups.get(f.name, parser)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        kind, text = hints[f.name], f.metadata["help"]
        if default is MISSING:
            group.add_argument(f.name, type=kind, help=text)
        elif kind in (bool, bool | None):
            yes_no = ActionYesNo(yes_prefix="", no_prefix="no-")
            group.add_argument(flag(f.name), action=yes_no, default=default, help=text)
        elif get_origin(kind) is list:
            (item,) = get_args(kind)
            group.add_argument(flag(f.name), type=item, nargs="+", default=default, help=text)
        else:
            group.add_argument(flag(f.name), type=kind, default=default, help=text)
    return parser


# A value of a wrong type, in jsonargparse's words: the option, the types and the value.
_KEY = re.compile(r'Parser key "(\w+)"(?: element \d+)?: ')
_KIND = re.compile(r"Expected a (Literal\[.*?\]|\w+)")
_VALUE = re.compile(r"(?:Got|Given) value: (.*)")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "dict": "a mapping",
    "NoneType": "",
}


def _one_line(error: ArgumentError, named: Callable[[str], str]) -> str:
    """What ``error`` says; of a value of a wrong type, plainly, with the option as ``named``."""
    text = " ".join(str(error).split())
    text = text.replace("<class '", "").replace("'>", "").replace("typing.", "")
    key, kinds, value = _KEY.match(text), _KIND.findall(text), _VALUE.search(text)
    if not (key and kinds and value):
        return text
    expected = [_KINDS.get(kind, kind.removeprefix("Literal[").rstrip("]")) for kind in kinds]
    wanted = " or ".join(filter(None, expected))
    return f"{named(key[1])}: expected {wanted}; got {value[1]}"
