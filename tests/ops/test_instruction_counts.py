"""No CPU operator takes more instructions than it was accepted to take."""

from __future__ import annotations

import json

import instruction_counts
import pytest

SLACK = 1.05


@pytest.mark.check
def test_no_operator_takes_more_instructions_than_accepted():
    accepted = json.loads(instruction_counts.ACCEPTED.read_text())
    compiler = instruction_counts.compiler(instruction_counts.library())
    if compiler != accepted["compiler"]:
        pytest.skip(f"compiled by {compiler}; the counts are of {accepted['compiler']}")
    try:
        found = instruction_counts.counts()
    except instruction_counts.Unavailable as reason:
        pytest.skip(str(reason))
    assert found.keys() == accepted["instructions"].keys()
    more = {
        name: f"{count / accepted['instructions'][name]:.2f} times {accepted['instructions'][name]}"
        for name, count in found.items()
        if count > SLACK * accepted["instructions"][name]
    }
    assert min(found.values()) > 0
    assert not more, f"to accept: python -m tests.ops.instruction_counts\n{more}"
