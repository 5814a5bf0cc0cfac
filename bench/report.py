"""Write docs/performance.md and the number on the front page from the records under bench/results/.

    python bench/report.py            # the page, its plots, and the sentence in README.md
    python bench/report.py --check    # write nothing; exit status 1 if the page or the sentence is not up to date
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a file: the folder above holds the package `bench`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import MINIMUM_ROUNDS
from bench.plots import Plot, plots_of
from bench.records import ROOT, bandwidth_fraction, ratio
from bench.targets import BANDWIDTH_TARGETS, FRONT_PAGE, NEVER_SLOWER, TARGETS, limit_of

Record = dict[str, Any]

# What `make bench` writes: the numbers of whoever ran it, ignored by git and here.
LOCAL = "local.jsonl"
BEGIN, END = "<!-- RECORDED NUMBER, written by bench/report.py -->", "<!-- END OF RECORDED NUMBER -->"
INTRODUCTION = """\
# Performance

Written by `python bench/report.py` (`make report`) from the records under `bench/results/`; do not edit.
[bench/README.md](../bench/README.md) says what is timed and how both sides are checked against each other; every peer
clips and follows the same schedule. *Ratio*: how many times as long the peer takes. *Bandwidth*: the bytes that a step
must move, per second, as a part of what a copy moves on the same machine; above 100 % where caches hold the model, or
where a copy also reads the memory that it writes. *Backward*: the ratio of the backward passes before the steps, which
must not pay for them. Times are medians, with the 20th and 80th percentiles, on a
CPU of each of four builds, and then the mean of these.
"""
NOTHING = "No record yet.\n"
TARGETS_OF = {True: "Targets, set for an H200:\n", False: "Targets:\n"}


class Machine(NamedTuple):
    """What numbers are compared within: a device, and on a CPU the threads that were used."""

    device: str
    threads: int | None

    @property
    def title(self) -> str:
        if self.threads is None:
            return self.device
        return f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def read(folder: Path) -> list[Record]:
    """All records that count, oldest run first; ValueError for one that should not have been kept."""
    records: list[Record] = []
    for path in sorted(folder.glob("*.json*")):
        if path.name == LOCAL:
            continue
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for line in lines:
            if line["dirty"] or not line["checked"] or line["rounds"] < MINIMUM_ROUNDS:
                raise ValueError(
                    f"{path}: expected records of clean commits, checked and of {MINIMUM_ROUNDS} rounds or more, got "
                    f"dirty={line['dirty']}, checked={line['checked']}, rounds={line['rounds']} for {line['case']}; "
                    "delete the record, and measure again"
                )
        records += lines
    return sorted(records, key=lambda line: str(line["time"]))


def by_machine(records: Iterable[Record]) -> dict[Machine, list[Record]]:
    machines: dict[Machine, list[Record]] = {}
    for line in records:
        machines.setdefault(Machine(line["device"], line.get("threads")), []).append(line)
    return dict(sorted(machines.items(), key=lambda item: (item[0].device, item[0].threads or 0)))


def newest(records: list[Record]) -> list[Record]:
    """Of every case the records of the newest run that has it, in the order of that run."""
    last = {line["case"]: line["time"] for line in records}
    return [line for line in records if line["time"] == last[line["case"]]]


def sentence(records: list[Record]) -> str | None:
    """The number on the front page, or None while nothing is recorded that may stand there."""
    for case in FRONT_PAGE:
        found = [line for line in records if line["case"] == case and line["peer"] == "torch-fused"]
        if found:
            line = found[-1]
            machine = Machine(line["device"], line.get("threads"))
            return (
                f"{machine.title}, {line['n_params']:,} {line['dtype']} parameters in {line['n_tensors']} tensors: "
                f"`clip_grad_norm_`, `AdamW(fused=True)` and `LambdaLR` take {ratio(line):.2f} times as long as "
                f"fusedlr's step (commit {line['commit'][:10]}, [all numbers](docs/performance.md))."
            )
    return None


def readme(text: str, records: list[Record]) -> str:
    """README.md with the sentence between its two marks."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    said = sentence(records)
    return f"{before}{BEGIN}\n{said + chr(10) if said else ''}{END}{after}"


def page(records: list[Record]) -> str:
    """docs/performance.md."""
    machines = by_machine(records)
    parts = [INTRODUCTION]
    for kind, on_gpu in (("GPU", True), ("CPU", False)):
        parts.append(f"## {kind}\n")
        chosen = {machine: lines for machine, lines in machines.items() if (lines[0]["cuda"] is not None) == on_gpu}
        if not chosen:
            parts += [NOTHING, TARGETS_OF[on_gpu], targets([], on_gpu)]
        for machine, lines in chosen.items():
            parts += section(machine, lines, on_gpu)
    return "\n".join(parts)


def section(machine: Machine, records: list[Record], on_gpu: bool) -> list[str]:
    rows = newest(records)
    parts = [f"### {machine.title}\n", runs(records, rows), TARGETS_OF[on_gpu], targets(rows, on_gpu)]
    for plot in plots_of(machine.slug, rows):
        parts.append(f"![{plot.title}](performance/{plot.file})\n")
    parts += ["#### Cases\n", cases(rows), "#### What limits the rest\n"]
    parts.append("".join(f"- `{name}`: {limit}.\n" for name, limit in limits(line["case"] for line in rows).items()))
    return parts


def limits(names: Iterable[str]) -> dict[str, str]:
    """A line for each case, and one for all sizes of a sweep."""
    return {re.sub(r"-sweep-.*", "-sweep-*", name): limit for name in names if (limit := limit_of(name))}


def runs(records: list[Record], rows: list[Record]) -> str:
    """Every run of a machine, newest first, and how many cases it still stands for."""
    lines = []
    for time in sorted({line["time"] for line in records}, reverse=True):
        run = [line for line in records if line["time"] == time]
        counted = {line["case"] for line in rows if line["time"] == time}
        first = run[0]
        versions = [f"torch {first['torch']}", f"Triton {first['triton']}"]
        if first["cuda"]:
            versions += [f"CUDA {first['cuda']}", f"driver {first['driver']}"]
        measured = {line["case"] for line in run}
        lines.append(
            [time, f"`{first['commit'][:10]}`", ", ".join(versions), f"{first['copy_gbps']:.1f} GB/s",
             f"{len(counted)} of {len(measured)}"]
        )  # fmt: skip
    return table(["run", "commit", "versions", "copy", "cases that count here"], lines)


def targets(rows: list[Record], on_gpu: bool) -> str:
    """What was aimed at beside what was reached."""
    prefix = "cuda-" if on_gpu else "cpu-"
    measured = {(line["case"], line["peer"]): line for line in rows}
    lines = []
    for target in TARGETS:
        if not target.case.startswith(prefix):
            continue
        wanted = f"{'>' if target.strict else '≥'} {target.ratio:g}x"
        line = measured.get((target.case, target.peer))
        if line is None:
            lines.append([f"`{target.case}`", f"`{target.peer}`", wanted, "not measured", ""])
            continue
        reached = ratio(line) > target.ratio if target.strict else ratio(line) >= target.ratio
        lines.append([f"`{target.case}`", f"`{target.peer}`", wanted, f"{ratio(line):.3f}x", yes(reached)])
    for aim in BANDWIDTH_TARGETS:
        if aim.case.startswith(prefix):
            line = measured.get((aim.case, "torch-fused"))
            fraction = None if line is None else bandwidth_fraction(line)
            got = "not measured" if fraction is None else f"{fraction:.1%}"
            said = "" if fraction is None else yes(fraction >= aim.fraction)
            lines.append([f"`{aim.case}`", "a copy", f"≥ {aim.fraction:.0%} of its bandwidth", got, said])
    if rows:
        slowest = min(rows, key=ratio)
        where = f"{ratio(slowest):.3f}x: `{slowest['case']}`, `{slowest['peer']}`"
        lines.append(["every case", "every peer", f"≥ {NEVER_SLOWER:g}x", where, yes(ratio(slowest) >= NEVER_SLOWER)])
    return table(["case", "peer", "wanted", "measured", "reached"], lines)


def cases(rows: list[Record]) -> str:
    lines = []
    for line in rows:
        dtypes = line["dtype"]
        if line["state_dtype"] != dtypes:
            dtypes += f", state {line['state_dtype']}"
        lines.append(
            [f"`{line['case']}`", line["optimizer"], f"{line['n_params']:,} in {line['n_tensors']:,}", dtypes,
             f"`{line['peer']}`", times(line, "fusedlr"), times(line, "peer"), f"{ratio(line):.2f}x",
             f"{line['bytes_per_param_floor']:g}", f"{bandwidth_fraction(line):.0%}", backward(line)]
        )  # fmt: skip
    head = ["case", "rule", "parameters in tensors", "dtype", "peer", "fusedlr, ms", "peer, ms", "ratio"]
    return table([*head, "bytes a parameter", "bandwidth", "backward"], lines)


def times(line: Record, side: str) -> str:
    low, middle, high = (milliseconds(line[f"{side}_ms_p{p}"]) for p in (20, 50, 80))
    return f"{middle} ({low} to {high})"


def backward(line: Record) -> str:
    """How many times as long the peer's backward pass takes; empty where it was not timed."""
    ours, theirs = (line.get(f"{side}_backward_ms_p50") for side in ("fusedlr", "peer"))
    return f"{theirs / ours:.2f}x" if ours and theirs else ""


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def all_plots(records: list[Record]) -> list[Plot]:
    machines = by_machine(records).items()
    return [plot for machine, lines in machines for plot in plots_of(machine.slug, newest(lines))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of the records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file that the sentence stands in")
    args = parser.parse_args(argv)
    try:
        records = read(args.results)
    except ValueError as error:
        parser.error(str(error))
    target, drawn = args.docs / "performance.md", args.docs / "performance"
    plots = all_plots(records)
    texts = {target: page(records), args.readme: readme(args.readme.read_text(encoding="utf-8"), records)}
    if args.check:
        stale = [diff for path, text in texts.items() if (diff := difference(path, text))]
        # What a plot shows is in the tables, too; how it is drawn depends on the version of matplotlib.
        stale += [f"{drawn / p.file} is missing\n" for p in plots if not (drawn / p.file).exists()]
        sys.stderr.write("".join(stale) + ("run: python bench/report.py\n" if stale else ""))
        return 1 if stale else 0
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for plot in plots:
        drawn.mkdir(exist_ok=True)
        plot.draw(drawn / plot.file)
    for old in set(drawn.glob("*.svg")) - {drawn / plot.file for plot in plots}:
        old.unlink()
    print(f"{len(records)} records: wrote {target} and {len(plots)} plots")
    return 0


def difference(path: Path, text: str) -> str:
    now = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = difflib.unified_diff(now.splitlines(True), text.splitlines(True), str(path), "from the records")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
