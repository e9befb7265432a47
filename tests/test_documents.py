"""Links between the documents lead somewhere, also to the heading that they name; options of `serve` are explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.service.option_values import option_names

REPOSITORY = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
FOLDERS = (".", "docs", "docs/decisions", "benchmarks/results", "benchmarks/texts", "models/stories-moe")


def _documents() -> list[str]:
    paths = (path for folder in FOLDERS for path in sorted((REPOSITORY / folder).glob("*.md")))
    return [str(path.relative_to(REPOSITORY)) for path in paths]


def _anchors(path: Path) -> Iterator[str]:
    """As pages on the web make them of headings."""
    for heading in re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8")):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", _documents())
def test_links_lead_to_a_file_and_a_heading(document: str) -> None:
    source = REPOSITORY / document
    for target, anchor in LINK.findall(source.read_text(encoding="utf-8")):
        path = source.parent / target if target else source
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{document} links to {target}#{anchor}"


def test_documents_are_found() -> None:
    assert {"README.md", "docs/exactness.md", "benchmarks/results/README.md"} < set(_documents())


def test_every_option_of_serve_is_explained() -> None:
    text = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    assert not [name for name in option_names() if f"`--{name}`" not in text and f"`{name}`" not in text]
