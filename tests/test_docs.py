"""Every block of Python in the README and the documentation runs, and every page is in the menu.

The blocks of a page are one program, in order; their assertions are the page's claims.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastjac

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in DOCS if BLOCK.search(page.read_text())]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block, below as many empty lines as give it the page's line numbers."""
    text = page.read_text()
    found = [("\n" * text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]
    assert len(found) == len(re.findall(r"^ *```python", text, re.MULTILINE)), page
    return found


def run(page: Path, block: tuple[str, str], names: dict) -> None:
    exec(compile("".join(block), str(page), "exec"), names)


def test_the_pages_have_programs():
    assert {"index.md", "tutorial.md", "losses.md", "pitfalls.md", "theory.md"} <= {
        p.name for p in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, monkeypatch, tmp_path):
    for package in ("sklearn", "torchvision"):
        if f"from {package}" in page.read_text():
            pytest.importorskip(package, reason=f"the page's program needs {package}")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    with torch.random.fork_rng():
        for block in blocks(page):
            run(page, block, names)


def loop(device: str) -> dict:
    """What the README's loops take as given."""
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            return self.head(self.layer1(x).relu().mean((2, 3)))

    student, teacher = Small(4).to(device), Small(8).to(device)
    x, y = torch.rand(4, 3, 16, 16, device=device), torch.arange(4, device=device)
    target = fastjac.AttentionWindow("layer1")
    return {
        "fastjac": fastjac,
        "torch": torch,
        "F": F,
        "student": student,
        "teacher": teacher,
        "matcher": fastjac.JacobianMatching(student, teacher, target),
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "loader": [(x, y)] * 6,
    }


README = ROOT / "README.md"


def test_the_readmes_first_program_prints_what_the_readme_shows(capsys):
    """To the accuracy's ups and downs from one machine to the next."""
    pytest.importorskip("sklearn", reason="the program needs sklearn")
    program, *_ = blocks(README)
    with torch.random.fork_rng():
        run(README, program, {"__name__": "readme"})
    shown = re.search(r"```\n(teacher: .*?)```", README.read_text(), re.DOTALL)
    line = re.compile(r"^(.*): (\d+)%$", re.MULTILINE)
    printed, expected = (dict(line.findall(text)) for text in (capsys.readouterr().out, shown[1]))
    assert list(printed) == list(expected)
    assert len(printed) == 3
    for name, accuracy in printed.items():
        assert abs(int(accuracy) - int(expected[name])) < 8, name


@pytest.mark.parametrize("place", range(1, len(blocks(README))))
def test_the_readmes_blocks_run(place):
    block = blocks(README)[place]
    if "fastjac.graphed" in block[1] and not torch.cuda.is_available():
        pytest.skip("the block captures a CUDA graph; torch.cuda.is_available() is false")
    names = loop("cuda" if "fastjac.graphed" in block[1] else "cpu")
    student = names["student"]
    before = [p.clone() for p in student.parameters()]
    with torch.random.fork_rng():
        run(README, block, names)
    if "for x, y in loader" in block[1]:  # a training loop: it has trained
        assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    else:
        module = next(v for v in names.values() if isinstance(v, nn.Sequential))
        assert all(p.grad is not None for p in module.parameters())


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in DOCS} <= menu


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: fastjac\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(fastjac.__all__)
