"""docs/performance.md is what the records give, hides no target, and is refused records that should not be kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import report
from bench.cases import CASES
from bench.measure import Times
from bench.peers import peers_of
from bench.records import ROOT, record
from bench.targets import BANDWIDTH_TARGETS, FRONT_PAGE, TARGETS, limit_of

TABLE = {case.name: case for case in CASES}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = f"# fusedlr\n\n{report.BEGIN}\n{report.END}\n\nmore\n"


def line(case: str, peer: str, ours: float, theirs: float, day: int = 1, threads: int | None = 1) -> report.Record:
    cuda = case.startswith("cuda")
    shared = {
        "time": f"2026-11-{day:02}T00:00:00Z",
        "device": "NVIDIA H200" if cuda else "AMD EPYC",
        "commit": f"{day:02}{COMMIT[2:]}",
        "dirty": False,
        "torch": "2.13.0",
        "triton": "3.9.0",
        "cuda": "13.0" if cuda else None,
        "driver": "580.1" if cuda else None,
        "threads": None if cuda else threads,
    }
    return record(shared, TABLE[case], peer, Times([ours] * 20, [theirs] * 20), copy_gbps=4_000.0 if cuda else 20.0)


SWEEP = [
    line(f"cpu-sweep-{size}", peer, ms, ms * factor)
    for size, ms in (("1e5", 0.5), ("1e6", 1.0), ("1e7", 20.0))
    for peer, factor in (("torch-fused", 1.5), ("torch-foreach", 3.0))
]
RECORDS = [
    *SWEEP,
    line("cpu-gpt-95m", "torch-fused", 80.0, 100.0),
    line("cpu-gpt-95m", "torch-foreach", 80.0, 150.0),
    line("cpu-150x512-sgd", "torch-fused", 2.0, 2.0),
]


@pytest.fixture
def place(tmp_path: Path):
    """A folder with records, docs and README.md, and what hands it to the report."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README, encoding="utf-8")

    def run(*arguments: str) -> int:
        names = ["--results", "results", "--docs", "docs", "--readme", "README.md"]
        paths = [name if name.startswith("--") else str(tmp_path / name) for name in names]
        return report.main([*paths, *arguments])

    return tmp_path, run


def keep(folder: Path, name: str, records: list[report.Record]) -> None:
    path = folder / "results" / name
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def test_what_is_in_the_tree_is_what_its_records_give():
    assert report.main(["--check"]) == 0, "run: python bench/report.py"


def test_the_sentence_in_the_readme_is_the_recorded_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert between == (report.sentence(report.read(ROOT / "bench" / "results")) or "")


def test_without_records_the_page_says_so():
    text = report.page([])
    gpu, cpu = text.split("## GPU\n")[1].split("## CPU\n")
    for part in (gpu, cpu):
        assert part.startswith("\nNo record yet.\n")
    assert text.count("not measured") == len(TARGETS) + len(BANDWIDTH_TARGETS)
    assert "**no**" not in text and "| yes |" not in text
    assert report.sentence([]) is None
    assert report.readme(README, []) == README
    assert report.all_plots([]) == []


def test_targets_stand_beside_what_was_measured():
    text = report.page(RECORDS)
    assert "No record yet." in text.split("## CPU\n")[0]
    assert "| `cpu-gpt-95m` | `torch-fused` | ≥ 1.15x | 1.250x | yes |" in text
    assert "| `cpu-gpt-95m` | `torch-foreach` | ≥ 2x | 1.875x | **no** |" in text
    # Ahead means more than equal; not slower does not.
    assert "| `cpu-150x512-sgd` | `torch-fused` | > 1x | 1.000x | **no** |" in text
    assert "| every case | every peer | ≥ 1x | 1.000x: `cpu-150x512-sgd`, `torch-fused` | yes |" in text
    assert "| `cpu-2000x64` | `torch-fused` | ≥ 10x | not measured |  |" in text


@pytest.mark.parametrize(("ms", "said"), [(8.65, "92.5% | yes"), (9.0, "88.9% | **no**")])
def test_the_share_of_the_bandwidth_is_held_against_its_target(ms, said):
    # 1,000,243,200 parameters of 32 bytes in 8.65 ms are 3700 of 4000 GB/s.
    text = report.page([line("cuda-1g", "torch-fused", ms, 14.0)])
    assert f"| `cuda-1g` | a copy | ≥ 92% of its bandwidth | {said} |" in text


def test_the_slowest_case_is_named():
    text = report.page([*RECORDS, line("cpu-gpt-3m", "torch-foreach", 4.0, 3.0)])
    assert "| every case | every peer | ≥ 1x | 0.750x: `cpu-gpt-3m`, `torch-foreach` | **no** |" in text


def test_a_row_has_times_ratio_bytes_and_bandwidth():
    row = next(row for row in report.page(RECORDS).splitlines() if row.startswith("| `cpu-gpt-95m` | AdamW |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:5] == ["95,278,080 in 146", "float32", "`torch-fused`"]
    # 95,278,080 parameters of 32 bytes in 80 ms are 38.1 of 20 GB/s.
    assert cells[5:] == ["80.0 (80.0 to 80.0)", "100.0 (100.0 to 100.0)", "1.25x", "32", "191%", ""]
    timed = {**RECORDS[-1], "fusedlr_backward_ms_p50": 40.0, "peer_backward_ms_p50": 41.0}
    assert any(row.endswith(" | 1.02x |") for row in report.page([timed]).splitlines())


def test_of_every_case_the_newest_run_counts_and_older_ones_are_listed():
    second = [line(case, "torch-fused", 50.0, 100.0, day=2) for case in ("cpu-gpt-95m", "cpu-gpt-3m")]
    text = report.page([*RECORDS, *second])
    assert "| 2026-11-02T00:00:00Z | `0223456789` | torch 2.13.0, Triton 3.9.0 | 20.0 GB/s | 2 of 2 |" in text
    assert "| 2026-11-01T00:00:00Z | `0123456789` | torch 2.13.0, Triton 3.9.0 | 20.0 GB/s | 4 of 5 |" in text
    assert "| `cpu-gpt-95m` | `torch-fused` | ≥ 1.15x | 2.000x | yes |" in text
    # The newest run has the case, without this peer: numbers of two runs are never mixed in a case.
    assert "| `cpu-gpt-95m` | `torch-foreach` | ≥ 2x | not measured |  |" in text
    assert "| `cpu-150x512-sgd` | `torch-fused` | > 1x | 1.000x | **no** |" in text


def test_numbers_of_different_threads_are_not_mixed():
    text = report.page([*RECORDS, line("cpu-gpt-95m", "torch-fused", 50.0, 100.0, day=2, threads=2)])
    one, two = text.split("### AMD EPYC, 1 thread\n")[1].split("### AMD EPYC, 2 threads\n")
    assert "| `cpu-gpt-95m` | `torch-fused` | ≥ 1.15x | 1.250x | yes |" in one
    assert "| `cpu-gpt-95m` | `torch-fused` | ≥ 1.15x | 2.000x | yes |" in two


def test_what_limits_a_case_is_said_once_for_a_sweep():
    text = report.page(RECORDS).split("#### What limits the rest\n")[1]
    assert text.count("- `cpu-sweep-*`: ") == 1 and text.count("- `cpu-gpt-95m`: ") == 1
    assert "cpu-gpt-3m" not in text
    assert limit_of("cpu-gpt-95m-sgd-unclipped") != limit_of("cpu-gpt-95m-sgd") != limit_of("cpu-gpt-95m")
    assert limit_of("cpu-gpt-95") is None


def test_the_table_of_cases_has_what_the_targets_name():
    assert all(limit_of(name) for name in TABLE)
    assert all(target.peer in peers_of(TABLE[target.case]) for target in TARGETS)
    assert {target.case for target in BANDWIDTH_TARGETS} | set(FRONT_PAGE) <= set(TABLE)


def test_the_sentence_prefers_a_gpu_and_the_newest_run():
    own = report.sentence(RECORDS)
    assert own is not None and own.startswith("AMD EPYC, 1 thread, 95,278,080 float32 parameters in 146 tensors: ")
    assert "take 1.25 times as long" in own and "commit 0123456789," in own
    newer = [line("cuda-1g", "torch-fused", 8.0, 10.0, day=1), line("cuda-1g", "torch-fused", 8.0, 12.0, day=2)]
    best = report.sentence([*newer, line("cpu-gpt-95m", "torch-fused", 50.0, 100.0, day=3)])
    assert best is not None and best.startswith("NVIDIA H200, 1,000,243,200 float32")
    assert "take 1.50 times as long" in best and "commit 0223456789," in best
    # Twice is as once.
    once = report.readme(README, RECORDS)
    assert own in once and report.readme(once, RECORDS) == once and report.readme(once, []) == README


def test_the_page_is_written_with_its_plots_and_checked(place, capsys):
    folder, run = place
    keep(folder, "epyc.jsonl", RECORDS[:6])
    keep(folder, "more.json", RECORDS[6:])
    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    text = (folder / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text == report.page(RECORDS)
    plots = sorted((folder / "docs" / "performance").iterdir())
    names = [f"amd-epyc-1-thread-{kind}.svg" for kind in ("bandwidth", "cases", "ratio", "time")]
    assert [path.name for path in plots] == names
    for path in plots:
        assert path.read_bytes().startswith(b"<?xml") and path.stat().st_size > 5_000
        assert f"](performance/{path.name})" in text
    assert "take 1.25 times as long" in (folder / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()

    plots[0].unlink()
    assert run("--check") == 1 and f"{plots[0]} is missing" in capsys.readouterr().err
    run()
    (folder / "docs" / "performance.md").write_text(text.replace("1.25x", "1.35x"), encoding="utf-8")
    assert run("--check") == 1 and "1.35x" in capsys.readouterr().err
    run()
    keep(folder, "epyc.jsonl", [])
    assert run("--check") == 1
    assert run() == 0
    # Plots of what is recorded no more are gone.
    assert [path.name for path in (folder / "docs" / "performance").iterdir()] == [names[1]]


def test_plots_are_the_same_each_time(tmp_path):
    plot = report.all_plots(RECORDS)[0]
    plot.draw(tmp_path / "a.svg")
    plot.draw(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_local_records_do_not_count(place):
    folder, run = place
    keep(folder, "local.jsonl", RECORDS)
    assert run() == 0
    assert (folder / "docs" / "performance.md").read_text(encoding="utf-8") == report.page([])


@pytest.mark.parametrize(("field", "value"), [("dirty", True), ("checked", False), ("rounds", 19)])
def test_records_that_should_not_be_kept_are_refused(field, value, place, capsys):
    folder, run = place
    keep(folder, "epyc.jsonl", [RECORDS[-1] | {field: value}])
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert f"{field}={value}" in said and "cpu-150x512-sgd" in said and "measure again" in said
    assert not (folder / "docs").exists()
