"""The licence, the citation and the package's metadata agree; CONTRIBUTING.md names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
README = (ROOT / "README.md").read_text()


def project(key: str) -> str:
    """A string of pyproject.toml's table ``project``, which Python 3.10 has no parser for."""
    text = (ROOT / "pyproject.toml").read_text()
    (value,) = re.findall(rf'^{key} = "(.+)"$', text.partition("\n[project]\n")[2], re.MULTILINE)
    return value


@pytest.mark.parametrize(
    ("ours", "theirs"), [("title", "name"), *[(k, k) for k in ("version", "license")]]
)
def test_the_citation_is_of_this_project(ours, theirs):
    assert CITATION[ours] == project(theirs)


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith(f"{CITATION['license']} License\n")
    (author,) = CITATION["authors"]
    assert re.search(rf"^Copyright \(c\) \d{{4}} {author['name']}$", text, re.MULTILINE)


def test_the_readme_cites_the_same():
    software, paper = re.findall(r"^@\w+\{.+?^\}", README, re.MULTILINE | re.DOTALL)
    assert f"version = {{{CITATION['version']}}}" in software
    (reference,) = CITATION["references"]
    plain = re.sub(r"[{}]", "", paper)
    assert reference["title"] in plain
    assert re.search(rf"volume += {reference['volume']},", plain)
    assert all(author["family-names"] in plain for author in reference["authors"])


def test_contributing_names_commands_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make (\w+)`", text)
    assert "test" in targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    paths = set(
        re.findall(r"(?:\(|`)((?:csrc|docs|fastjac|scripts|tests)/[\w./]*|[A-Z]+\.md)[`)]", text)
    )
    assert "docs/design.md" in paths
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_design_has_the_sections_that_contributing_points_to():
    design = (ROOT / "docs" / "design.md").read_text()
    for number, title in {
        2: "The gradient",
        6: "Rules",
        12: "Native operators",
        13: "The tree",
    }.items():
        assert f"\n## {number}. {title}" in design
