"""What a 3x3 pool's cell takes, in instructions: counted from the machine code, without a GPU.

A cell is what a turn of a thread's innermost loop works on: 2x2 pixels and a window of four
channels. Its instructions are those of the longest way through that loop, whatever its branches
test; where the loop holds two cells, the way's half. Activation and residual are fixed (cells.cu),
so every way that is left is one that a ResNet's stem can take.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.check, pytest.mark.xdist_group("sass")]

HERE = Path(__file__).parent
MOST = 600  # at more, an H100 waits for the arithmetic and not for its memory
AT_ONCE = {"cells_of_pushforward": 2}  # cells in a turn, where not one

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+)?\s*(?P<name>[A-Z][\w.]*)")
LABEL = re.compile(r"(?P<label>[.$]\w+):")


def tool(name: str) -> str:
    """NVIDIA's, from the PATH or beside Triton's compiler."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) for p in (triton.submodule_search_locations if triton else [])]
    found = shutil.which(name) or next(
        (str(p) for f in folders if (p := f / "backends" / "nvidia" / "bin" / name).exists()), None
    )
    return found or pytest.skip(f"there is no {name}")


class Kernel:
    """A kernel's instructions: which may follow which."""

    def __init__(self, text: str):
        lines, labels = [], {}
        for line in text.splitlines():
            if match := LABEL.match(line):
                labels[match["label"]] = len(lines)
            elif match := INSTRUCTION.match(line):
                lines.append((match, line[match.end() :]))
        self.follow = [self._following(i, *line, labels) for i, line in enumerate(lines)]

    @staticmethod
    def _following(i, match, operands, labels) -> list[int]:
        kind = match["name"].split(".")[0]
        falls_through = match["predicate"] is not None
        if kind in {"BRA", "BRX", "BRXU"}:
            targets = [labels[label] for label in re.findall(r"\.L_x_\w+", operands)]
            assert targets, operands
            falls_through |= bool(re.match(r"\s*!?U?P\d", operands)) or ".DIV" in match["name"]
            return targets + [i + 1] * falls_through
        return [i + 1] if falls_through or kind not in {"EXIT", "RET"} else []

    def loops(self, among: set[int]) -> list[set[int]]:
        """The sets of instructions from each of which the others can be reached."""
        index, low, stack, found = {}, {}, [], []
        for root in among:
            if root in index:
                continue
            path = [(root, iter(self.follow[root]))]
            index[root] = low[root] = len(index)
            stack.append(root)
            while path:
                node, following = path[-1]
                for other in following:
                    if other in among and other not in index:
                        index[other] = low[other] = len(index)
                        stack.append(other)
                        path.append((other, iter(self.follow[other])))
                        break
                    if other in stack:
                        low[node] = min(low[node], index[other])
                else:
                    path.pop()
                    if path:
                        low[path[-1][0]] = min(low[path[-1][0]], low[node])
                    if low[node] == index[node]:
                        start = stack.index(node)
                        loop = set(stack[start:])
                        del stack[start:]
                        if len(loop) > 1:
                            found.append(loop)
        return found

    def innermost(self) -> set[int]:
        """The largest of the loops that hold none."""
        loops, found = self.loops(set(range(len(self.follow)))), []
        while loops:
            loop = loops.pop()
            inner = self.loops(loop - {min(loop)})
            loops += inner
            if not inner:
                found.append(loop)
        return max(found, key=len)

    def longest_way(self, loop: set[int]) -> int:
        """From the loop's first instruction until it comes again."""
        head, longest = min(loop), {}
        path = [(head, iter(self.follow[head]))]
        seen = {head}
        while path:
            node, following = path[-1]
            for other in following:
                if other in loop and other not in seen:
                    seen.add(other)
                    path.append((other, iter(self.follow[other])))
                    break
            else:
                path.pop()
                ways = [longest[o] for o in self.follow[node] if o in loop and o != head]
                longest[node] = 1 + max(ways, default=0)
        return longest[head]


def test_the_longest_way_is_counted():
    kernel = Kernel(
        """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;
.L_x_1:
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R1, R1, R2 ;
        /*0040*/               @P2 FADD R1, R1, R2 ;
.L_x_2:
        /*0050*/                   BRA P1, `(.L_x_1) ;
        /*0060*/               @P3 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    )
    loop = kernel.innermost()
    assert loop == {2, 3, 4, 5}
    assert kernel.longest_way(loop) == 4


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, Kernel]:
    binary = tmp_path_factory.mktemp("cells") / "cells.cubin"
    nvcc, disassembler = tool("nvcc"), tool("nvdisasm")
    subprocess.run(
        [nvcc, "-cubin", "-arch=sm_90", "-std=c++20", "-O3", HERE / "cells.cu", "-o", binary],
        check=True,
    )
    said = subprocess.run([disassembler, "-c", binary], check=True, capture_output=True, text=True)
    sections = re.split(r"^\.text\.(\w+):\n", said.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(sections[::2], map(Kernel, sections[1::2]), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "cells_of_forward",
        "cells_of_backward_sums",
        "cells_of_backward",
        "cells_of_pushforward_sums",
        "cells_of_pushforward",
        "cells_of_fixed_pushforward",
    ],
)
def test_a_cell_of_16_bits_takes_few_instructions(kernels, name):
    found = [k for symbol, k in kernels.items() if f"{len(name)}{name}I" in symbol]
    assert len(found) == 2  # of bfloat16, of float16
    for kernel in found:
        cell = kernel.longest_way(kernel.innermost()) / AT_ONCE.get(name, 1)
        assert 100 < cell <= MOST
