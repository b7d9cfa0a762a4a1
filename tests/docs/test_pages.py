"""Links and paths on the pages that mkdocs does not check: the README and its like name files that exist."""

import re

import pytest

from dlkernels._version import __version__
from tests.docs.pages import FENCE, PAGES
from tests.support.paths import ROOT

FOLDERS = "csrc|dlkernels|tests|bench|docs|examples|tools|_build"
# A page may name a file that a command makes.
MADE = {"bench/results/local"}


def named(page):
    return str(page.relative_to(ROOT))


def prose(page):
    return FENCE.sub("", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = re.sub("`[^`]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{target} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_in_the_text_exist(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", prose(page)):
        assert path in MADE or (ROOT / path).exists(), f"{path} does not exist: was it renamed?"


def test_the_citation_has_the_version_of_the_package():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__
