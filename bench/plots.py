"""The plots of docs/performance.md: against the number of parameters, and case by case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.records import bandwidth_fraction, ratio

Record = dict[str, Any]
Points = list[tuple[float, float]]


class Plot(NamedTuple):
    """A picture: its file's name, what it shows, and how it is drawn."""

    file: str
    title: str
    draw: Callable[[Path], None]


def plots_of(slug: str, rows: list[Record]) -> list[Plot]:
    """The plots that the records of a machine give."""
    sweep = [line for line in rows if "-sweep-" in line["case"]]
    others = [line for line in rows if "-sweep-" not in line["case"]]
    plots = []
    if sweep:
        own = [line for line in sweep if line["peer"] == "torch-fused"]
        times = {"fusedlr": points(own, lambda line: float(line["fusedlr_ms_p50"]))}
        ratios, bandwidth = {}, {"fusedlr": points(own, bandwidth_fraction)}
        for peer in dict.fromkeys(line["peer"] for line in sweep):
            lines = [line for line in sweep if line["peer"] == peer]
            # The graph comparison has a fusedlr of its own, replayed from a graph: its times belong to no other curve.
            if not lines[0]["graph"]:
                times[peer] = points(lines, lambda line: float(line["peer_ms_p50"]))
            ratios[peer] = points(lines, ratio)
        title = "Time of an AdamW step with clipping against the number of parameters"
        plots.append(curves(f"{slug}-time.svg", title, "ms", times, log=True))
        title = "How many times as long each peer takes, against the number of parameters"
        plots.append(curves(f"{slug}-ratio.svg", title, "ratio", ratios, line=1.0))
        title = "Share of a copy's bandwidth against the number of parameters"
        plots.append(curves(f"{slug}-bandwidth.svg", title, "share", bandwidth, line=1.0))
    if others:
        plots.append(dots(f"{slug}-cases.svg", "How many times as long each peer takes, case by case", others))
    return plots


def points(lines: list[Record], value: Callable[[Record], float]) -> Points:
    return sorted((float(line["n_params"]), value(line)) for line in lines)


def curves(
    file: str, title: str, unit: str, series: dict[str, Points], log: bool = False, line: float | None = None
) -> Plot:
    def draw(path: Path) -> None:
        figure, axes = new_figure(title, height=4.0)
        for name, values in series.items():
            x, y = zip(*values, strict=True) if values else ((), ())
            axes.plot(x, y, marker="o", label=name, linewidth=2.5 if name == "fusedlr" else 1.2)
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel(unit)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if line is not None:
            axes.axhline(line, color="gray", linewidth=0.8)
        axes.legend()
        save(figure, path)

    return Plot(file, title, draw)


def dots(file: str, title: str, rows: list[Record]) -> Plot:
    def draw(path: Path) -> None:
        names = list(dict.fromkeys(line["case"] for line in rows))
        figure, axes = new_figure(title, height=1.5 + 0.3 * len(names))
        for peer in dict.fromkeys(line["peer"] for line in rows):
            lines = [line for line in rows if line["peer"] == peer]
            axes.plot([ratio(line) for line in lines], [names.index(line["case"]) for line in lines], "o", label=peer)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("ratio")
        axes.axvline(1.0, color="gray", linewidth=0.8)
        axes.legend()
        save(figure, path)

    return Plot(file, title, draw)


def new_figure(title: str, height: float) -> tuple[Any, Any]:
    # Only who draws needs matplotlib: the page can be checked without it.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing the plots needs matplotlib, which is not installed; pip install 'fusedlr[bench]'"
        ) from error
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    # Without a date and with fixed ids, the same records and the same matplotlib give the same file.
    with rc_context({"svg.hashsalt": "fusedlr"}):
        figure.savefig(path, metadata={"Date": None})
