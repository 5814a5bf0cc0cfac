"""Train the model of examples/train_char_gpt.py in float32 and in low precision, and compare the loss curves.

    python bench/quality.py --out bench/results/training/quality.json     # what is recorded: some minutes of two cores
    python bench/quality.py --report                             # docs/precision.md and its picture from the record

Every precision starts, for each seed, from the same float32 weights and sees the same batches; weights, batches and so
the whole curve differ from seed to seed, which is the yardstick. The low precisions compute in bfloat16 as well, as a
user's model would. The validation loss is that of the float32 weights that ``full_precision_parameters()`` exports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file: the folder above holds the packages `bench` and `examples`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fusedlr
from bench.records import ROOT, environment
from examples.train_char_gpt import BETAS, GPT, MAX_NORM, read_text, windows
from fusedlr import Precision, schedules

RECORD = ROOT / "bench" / "results" / "training" / "quality.json"
PAGE = ROOT / "docs" / "precision.md"
PICTURE = ROOT / "docs" / "images" / "precision-quality.svg"
BEGIN, END = "<!-- bench/quality.py writes from here -->", "<!-- to here -->"

FLOAT32 = "float32"
# By the code that makes them; the first is the yardstick, the last what bfloat16 loses without any of this.
PRECISIONS: dict[str, Precision | None] = {
    FLOAT32: None,
    "Precision.exact()": Precision.exact(),
    "Precision.compact()": Precision.compact(),
    'Precision(rounding="stochastic")': Precision(rounding="stochastic"),
    "None": None,
}
# Steps whose mean is one point of a curve: a batch's own loss says little.
POINT = 20


class Setting(NamedTuple):
    """How a model is trained."""

    steps: int = 240
    warmup: int = 24
    batch_size: int = 8
    context: int = 128
    width: int = 256
    layers: int = 3
    lr: float = 7e-4
    held_out: int = 64  # windows of the validation loss


def train(name: str, seed: int, setting: Setting, text: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """One run: the training loss of every step, and the validation loss of the exported weights."""
    torch.manual_seed(seed)
    model = GPT(setting.context, setting.width, setting.layers, heads=setting.width // 32)
    if name != FLOAT32:
        for p in model.parameters():
            p.data = p.data.bfloat16()
    optimizer = fusedlr.AdamW(
        model.param_groups(),
        lr=setting.lr,
        betas=BETAS,
        schedule=schedules.Warmup(setting.warmup).then(
            schedules.Cosine(setting.steps - setting.warmup, min_lr=setting.lr / 10)
        ),
        clip=MAX_NORM,
        precision=PRECISIONS[name],
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(setting.steps):
        loss = model.loss(windows(text[0], setting.batch_size, setting.context, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    full = optimizer.full_precision_parameters()
    for p in model.parameters():
        p.data = full[p]
    held_out = windows(text[1], setting.held_out, setting.context, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {"precision": name, "seed": seed, "losses": losses, "validation": model.loss(held_out).item()}


def curve(run: dict[str, Any]) -> list[float]:
    """The means of every POINT steps."""
    losses = run["losses"]
    return [statistics.fmean(losses[i : i + POINT]) for i in range(0, len(losses), POINT)]


class Row(NamedTuple):
    """What is said of a precision: validation losses, and how far its runs are from float32's of the same seeds."""

    name: str
    validation: list[float]
    apart: list[float]  # in validation loss, by seed
    curves_apart: float  # at the farthest point of any curve


class Comparison(NamedTuple):
    """All rows, with how far float32 runs are apart from seed to seed: at the end, and of the curves on average."""

    rows: list[Row]
    spread: float
    curves_spread: float


def compare(runs: list[dict[str, Any]]) -> Comparison:
    """The runs of every precision against those in float32."""
    by_name = {name: {run["seed"]: run for run in runs if run["precision"] == name} for name in PRECISIONS}
    float32 = by_name[FLOAT32]
    rows = []
    for name, own in by_name.items():
        apart = [run["validation"] - float32[seed]["validation"] for seed, run in own.items()]
        points = [
            abs(a - b) for seed, run in own.items() for a, b in zip(curve(run), curve(float32[seed]), strict=True)
        ]
        rows.append(Row(name, [run["validation"] for run in own.values()], apart, max(points)))
    curves = [max(point) - min(point) for point in zip(*map(curve, float32.values()), strict=True)]
    return Comparison(rows, max(rows[0].validation) - min(rows[0].validation), statistics.fmean(curves))


def page_of(record: dict[str, Any]) -> str:
    """The section of docs/precision.md."""
    comparison, setting = compare(record["runs"]), record["setting"]
    seeds = len(comparison.rows[0].validation)
    size = f"{record['n_params'] / 1e6:.1f} million parameters, {setting['steps']} steps, {seeds} seeds"
    lines = [
        f"The demo's model ({size}), trained on the CPU with torch {record['torch']} at commit {record['commit'][:7]}.",
        f"In float32 the validation losses are {comparison.spread:.4f} apart from seed to seed, the curves (means of "
        f"{POINT} steps) {comparison.curves_spread:.4f}:",
        "",
        "| precision | validation loss, mean | from float32's, by seed | curve from float32's, at most |",
        "|---|---|---|---|",
    ]
    for row in comparison.rows:
        name = "float32 parameters" if row.name == FLOAT32 else f"`{row.name}`"
        apart = " ".join(f"{x:+.4f}" for x in row.apart) if row.name != FLOAT32 else ""
        most = f"{row.curves_apart:.4f}" if row.name != FLOAT32 else ""
        lines.append(f"| {name} | {statistics.fmean(row.validation):.4f} | {apart} | {most} |")
    return "\n".join([*lines, "", "![loss curves](images/precision-quality.svg)"])


def written(page: str, section: str) -> str:
    """The page with its section between the marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def draw(record: dict[str, Any], path: Path) -> None:
    """Each run's curve less float32's of the same seed, over the band that the seeds of float32 make."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "fusedlr"
    runs = record["runs"]
    float32 = {run["seed"]: curve(run) for run in runs if run["precision"] == FLOAT32}
    means = [statistics.fmean(point) for point in zip(*float32.values(), strict=True)]
    x = [POINT * (i + 0.5) for i in range(len(means))]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    low, high = ([pick(p) - m for p, m in zip(zip(*float32.values(), strict=True), means, strict=True)]
                 for pick in (min, max))  # fmt: skip
    axes.fill_between(x, low, high, color="0.88", label="float32, seed to seed")
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for name, color in zip([name for name in PRECISIONS if name != FLOAT32], colors, strict=True):
        for i, run in enumerate(run for run in runs if run["precision"] == name):
            off = [a - b for a, b in zip(curve(run), float32[run["seed"]], strict=True)]
            axes.plot(x, off, color=color, lw=1.2, label=name if i == 0 else None)
    axes.set(title="Training loss less that of float32 with the same seed", xlabel="step", ylabel="nats per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def measure(setting: Setting, seeds: int) -> dict[str, Any]:
    """All runs, with what is needed to run them again."""
    shared = environment("cpu", None)
    text = read_text()
    runs = []
    for seed in range(seeds):
        for name in PRECISIONS:
            runs.append(train(name, seed, setting, text))
            print(f"seed {seed}  {name:<34} validation loss {runs[-1]['validation']:.4f}", flush=True)
    n_params = sum(p.numel() for p in GPT(setting.context, setting.width, setting.layers, 8).parameters())
    return {**shared, "setting": setting._asdict(), "n_params": n_params, "runs": runs}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where the record goes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    parser.add_argument("--report", action="store_true", help="write docs/precision.md and its picture from the record")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"expected --seeds of at least 2, to see how far they are apart, but got {args.seeds}")
    if args.report == (args.out is not None):
        parser.error("give either --out FILE or --report")
    if args.report:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), page_of(record)), encoding="utf-8")
        draw(record, PICTURE)
        return
    record = measure(Setting(), args.seeds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
