"""docs/: the generated pages are what docs/build.py would write, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedlr import schedules

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def build() -> Any:
    path = DOCS / "build.py"
    spec = importlib.util.spec_from_file_location("docs_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    searched = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = searched
    return module


def test_pages_and_pictures_are_up_to_date(build: Any) -> None:
    assert build.PAGES
    assert {name: build.stale(name) for name in build.PAGES} == {name: [] for name in build.PAGES}
    assert build.main(["--check"]) == 0


def test_what_is_not_up_to_date_is_noticed(
    build: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build.Picture("schedule-cosine", "Cosine(81)", 100)
    missing = build.Picture("schedule-nothing", "Cosine(80)", 100)
    monkeypatch.setitem(build.PAGES, "schedules.md", lambda: build.Page("other text", [other, missing]))
    assert build.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert "schedules.md, images/schedule-cosine.png, images/schedule-nothing.png; run python docs/build.py" in told


def test_every_schedule_has_a_section_and_a_picture(build: Any) -> None:
    made_by_methods = {"Schedule", "Chain", "ForSteps", "PerEpoch", "Product", "MomentumCycle"}
    tools = {"Kind", "Packed", "Row", "pack", "value"}
    members = {name for part in build.SCHEDULES.values() for name in part}
    assert members == set(schedules.__all__) - made_by_methods - tools
    pictured = {name for part in build.SCHEDULES.values() for name, (expression, _) in part.items() if expression}
    assert members - pictured == {"from_torch", "Plateau"}


def test_a_picture_is_drawn_and_knows_its_expression(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(build, "DOCS", tmp_path)
    picture = build.Picture("one", "Cosine(9)", 12)
    assert not picture.is_current()
    picture.draw()
    assert picture.is_current()
    assert not build.Picture("one", "Cosine(9)", 13).is_current()


def test_pictures_stay_small() -> None:
    sizes = [path.stat().st_size for path in (DOCS / "images").iterdir()]
    assert max(sizes) < 50_000
    assert sum(sizes) < 1_000_000


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (DOCS / link).exists(), link
