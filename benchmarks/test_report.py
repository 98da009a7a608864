"""The pages show the results that are kept."""

import pytest

from benchmarks.report import PAGES, PAPER, TABLES, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_the_results(page):
    text = page.read_text()
    assert filled(text) == text, "python -m benchmarks.report writes them anew"


def test_every_result_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    folders = [folder.name for folder in PAPER.iterdir() if (folder / "table.csv").is_file()]
    for name in [*TABLES, *folders]:
        assert f"<!-- {name} -->" in text
