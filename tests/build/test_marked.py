"""The tables that programs write into pages."""

import argparse

import pytest

from tools import marked

BEGIN, END = marked.marks("rows")


def test_only_what_is_between_the_marks_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    (tmp_path / "link.md").symlink_to(page)
    for _ in range(2):  # a second time changes nothing
        marked.write(tmp_path / "link.md", "rows", "\nnew\n\n")
        assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert marked.between(page.read_text(), "rows") == "\nnew\n"
    assert (tmp_path / "link.md").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_an_interruption_leaves_the_old_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\nold\n{END}\n")

    def interrupted(path, text):
        with open(path, "w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(page), "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        marked.write(page, "rows", "new")
    assert page.read_text() == f"{BEGIN}\nold\n{END}\n" and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("text", ["no marks", BEGIN, END + BEGIN, BEGIN + END + BEGIN + END])
def test_a_page_without_its_marks_is_refused(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="expected one line <!-- rows:begin --> and after it one line"):
        marked.write(page, "rows", "table")
    assert page.read_text() == text
    with pytest.raises(argparse.ArgumentTypeError, match="expected one line"):
        marked.page_with("rows")(str(page))
    with pytest.raises(argparse.ArgumentTypeError, match="No such file"):
        marked.page_with("rows")(str(tmp_path / "none.md"))
