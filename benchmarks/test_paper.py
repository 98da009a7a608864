"""The page of the paper's experiments shows the results that are kept."""

from benchmarks.paper import PAGE, RESULTS, filled


def test_the_tables_are_the_results():
    page = PAGE.read_text()
    assert filled(page) == page, "python -m benchmarks.paper writes them anew"


def test_every_result_is_shown():
    page = PAGE.read_text()
    for folder in RESULTS.iterdir():
        if (folder / "table.csv").is_file():
            assert f"<!-- {folder.name} -->" in page
