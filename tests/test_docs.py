"""docs/: the generated pages are what docs/build.py would write, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES

import fusedlr
from fusedlr import clipping, schedules

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MADE = [page for page in PAGES if page.read_text(encoding="utf-8").startswith("<!-- Made by docs/build.py")]


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
    assert {DOCS / name for name in build.PAGES} == set(MADE)
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
    members = {name for part in build.SCHEDULES.values() for name in part}
    assert members == set(schedules.__all__) - made_by_methods
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



def anchors(page: Path) -> set[str]:
    """The names by which GitHub links the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert link.startswith("http") or target.exists(), link
        assert not anchor or link.startswith("http") or anchor in anchors(target), link


def headings(name: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_optimizer_is_on_its_familys_page(build: Any) -> None:
    overview = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    for name in fusedlr.optimizers.__all__:
        cls = getattr(fusedlr, name)
        page = f"optimizers/{cls.__module__.rpartition('.')[2]}.md"
        assert page in build.PAGES
        assert f"| [{name}]({page}) |" in overview
        found = headings(page)
        assert name in found[0].split(", ")
        assert {"Algorithm", "Arguments", "State", "Differs from torch", "Source", "Example"} <= set(found)
        told = (DOCS / page).read_text(encoding="utf-8")
        assert all(f"| `{argument}` |" in told for argument in inspect.signature(cls).parameters)


def test_the_tables_of_state_are_the_state() -> None:
    """Of every case, the keys in the optimizer's state are those of its page; what is not always there is told."""
    for case in CASES:
        told = (DOCS / "optimizers" / f"{case.fused.__module__.rpartition('.')[2]}.md").read_text(encoding="utf-8")
        told = told.split(f"## {case.fused.__name__}\n")[-1].split("\n## ")[0]
        kinds = "a tensor like the parameter|a float32 number"
        rows = dict(re.findall(rf"^\| `(\w+)` \| (?:{kinds}) \| (.*?) \|$", told, re.MULTILINE))
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = case.make([p])
        optimizer.step()
        state = set(optimizer.state[p])
        assert state <= set(rows)
        assert {key for key, when in rows.items() if when == "always"} <= state


def test_bytes_are_those_of_the_arrays() -> None:
    """The table of docs/optimizers.md beside docs/architecture.md, whose numbers tests/test_bytes.py counts."""
    overview = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    counted = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = {
        "[AdamW](optimizers/adam.md)": ("AdamW with clipping", 8, 28),
        "[SGD](optimizers/sgd.md), momentum": ("SGD with momentum and clipping", 4, 20),
        "[LAMB](optimizers/lamb.md)": ("LAMB with clipping", 8, 44),
        "[LARS](optimizers/lars.md), momentum": ("LARS with momentum and clipping", 4, 28),
    }
    for label, (title, state, moved) in rows.items():
        (cells,) = [line.split(" | ") for line in overview.splitlines() if line.startswith(f"| {label} |")]
        assert [int(cell) for cell in cells[2:5]] == [state, moved, moved + 4]
        assert re.search(rf"^\| {title} \| 4 \|.* \| {moved + 4} \|$", counted, re.MULTILINE)


def test_every_clip_has_a_section(build: Any) -> None:
    names = set(clipping.__all__) - {"Clip"}
    assert names
    assert names <= set(headings("clipping.md"))


def test_every_exported_name_is_in_the_documentation() -> None:
    told = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    names = [*fusedlr.optimizers.__all__, *clipping.__all__, *fusedlr.__all__]
    internal = {"FusedOptimizer", "__version__", "Clip"}
    assert {name for name in names if not re.search(rf"\b{name}\b", told)} <= internal


def test_every_member_for_users_is_in_the_overview() -> None:
    overview = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    members = {name for name in vars(fusedlr.FusedOptimizer) if not name.startswith("_")}
    assert len(members) >= 11
    assert {name for name in members if f"| `{name}` |" not in overview} == set()


@pytest.mark.parametrize("page", MADE, ids=lambda page: str(page.relative_to(DOCS)))
def test_formulas_are_githubs(page: Path) -> None:
    """Nothing of Sphinx is left, blocks are closed, and no macro that GitHub refuses is used."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "```" not in prose
    assert not re.search(r":\w+:`|\.\. \w+::", text)
    assert "operatorname" not in text
    for formula in re.findall(r"^```math\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert formula.count("{") == formula.count("}")
        assert formula.count(r"\left") - formula.count(r"\leftarrow") == formula.count(r"\right")
        assert "\\begin{aligned}" in formula or not re.search(r"(?<!\\)&|\\\\", formula)


def test_docstrings_become_markdown(build: Any) -> None:
    """One of each: math in a block and in the line, references, literals, sections, notes after them, and a doctest."""
    module = sys.modules["docstrings"]

    def thing() -> None:
        r"""First, with :math:`\operatorname{sign}(x)`.

        .. math::
            a &= b \\
            c &= d

        and :class:`torch.optim.Adam`, ``code``.

        Args:
            a: what it is,
                in two lines.
            "b": another.

        A note.

        Example:
            >>> 1 + 1
            2
        """

    told = module.sections(thing)
    assert list(told) == ["", "Args", "notes", "Example"]
    assert module.items(told["Args"]) == {"a": "what it is, in two lines.", '"b"': "another."}
    assert module.arguments(told["Args"]).splitlines()[1] == '- `"b"`: another.'
    assert told["notes"] == "A note."
    assert module.text_of(thing).split("\n\n") == [
        r"First, with $`\mathrm{sign}(x)`$.",
        "```math\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n```",
        "and `torch.optim.Adam`, `code`.",
    ]
    assert module.example(told["Example"]) == "```python\n1 + 1\n# 2\n```"
