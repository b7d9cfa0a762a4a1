"""The pages that users read, and the code blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *sorted(ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# The first line of a block that cannot run where the tests run. Readers see it too.
NOT_RUN = re.compile(r"# not run by the tests: (\S.*)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line of code
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def not_run(self) -> str:
        """The reason that the block gives for not being run; empty if it is run."""
        marker = NOT_RUN.match(self.text)
        return marker[1] if marker else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[2], re.sub(f"^{found[1]}", "", found[3], flags=re.M))
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
