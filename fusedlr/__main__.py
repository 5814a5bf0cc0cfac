"""The command line: what is installed, pictures of schedules, and how long a step takes here.

    python -m fusedlr info
    python -m fusedlr plot 'Warmup(100).then(Cosine(900))' --steps 1000 --out lr.png
    python -m fusedlr bench
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import platform
import sys
from pathlib import Path

import torch

import fusedlr
from fusedlr import clipping, schedules

from .backends import choose_backend, interpreting, triton_missing
from .comparison import MODELS, Model, compare, table
from .schedules.expression import parse

__all__ = ["main"]


_PRECISIONS = {
    "None": fusedlr.Precision(),
    "exact()": fusedlr.Precision.exact(),
    "compact()": fusedlr.Precision.compact(),
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    found = [f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"]
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            name = kind.__name__.rpartition(".")[2]
            found += [f"{name}:{i}: {kind.get_device_name(i)}" for i in range(kind.device_count())]
    return found


def _is_optimizer(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, fusedlr.FusedOptimizer)


def info() -> str:
    """Versions, backends, devices and public names, a line each."""
    versions = {name: _version(name) for name in ("torch", "triton", "numpy", "matplotlib")}
    missing = triton_missing()
    triton = missing or ("its interpreter, on CPU tensors" if interpreting() else "compiled, on GPU tensors")
    try:
        auto = choose_backend("auto").explain([device.split(":")[0] for device in _devices()])
    except (RuntimeError, ValueError) as error:  # of the environment variable
        auto = f"none: {error}"
    lines = [
        f"fusedlr: {fusedlr.__version__}",
        f"python: {platform.python_version()} on {platform.platform()}",
        *(f"{name}: {version}" for name, version in versions.items()),
        "backend torch: yes",
        f"backend triton: {triton}",
        f"backend auto: {auto}",
        *(f"device {device}" for device in _devices()),
        f"optimizers: {', '.join(name for name in fusedlr.__all__ if _is_optimizer(getattr(fusedlr, name)))}",
        f"schedules: {', '.join(schedules.__all__)}",
        f"clipping: {', '.join(clipping.__all__)}",
        *(f"precision {name}: {value!r}" for name, value in _PRECISIONS.items()),
    ]
    return "\n".join(lines)


def plot(expression: str, steps: int | None, out: Path, base_lr: float, log: bool) -> None:
    """Draw the schedule that an expression describes into a file."""
    schedule = parse(expression)
    try:
        import matplotlib
    except ImportError:
        pass  # schedule.plot says what to install
    else:
        matplotlib.use("Agg")  # a file needs no screen
    axes = schedule.plot(steps if steps is not None else schedule.length or 1_000, base_lr)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    from matplotlib import pyplot

    pyplot.savefig(out, dpi=150, bbox_inches="tight")


def bench(device: str, steps: int, models: tuple[Model, ...]) -> None:
    """Print how long a step takes beside torch.optim's, a line a model."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    print(f"fusedlr {fusedlr.__version__}, torch {torch.__version__}, {where}, median of {steps} steps")
    for line in table(compare(models, where, steps)):
        print(line, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; errors in what was typed go to stderr and give exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m fusedlr", description=fusedlr.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, devices and public names")
    drawing = commands.add_parser(
        "plot", help="draw a schedule", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    drawing.add_argument("expression", help="such as 'Warmup(100).then(Cosine(900))'")
    drawing.add_argument("--steps", type=int, help="steps to draw; the schedule's length, or 1000 where it has none")
    drawing.add_argument("--out", type=Path, default=Path("lr.png"), help="the picture; its suffix is the format")
    drawing.add_argument("--base-lr", type=float, default=1.0, help="the base of the schedule")
    drawing.add_argument("--log", action="store_true", help="logarithmic values")
    timing = commands.add_parser(
        "bench",
        help="time a step beside torch.optim's",
        description="Times AdamW with clipping and a schedule beside torch.optim's, after a check that both agree.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    timing.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where; auto: a GPU if any")
    timing.add_argument("--steps", type=_positive, default=30, help="timed steps")
    timing.add_argument("--model", type=_positive, nargs=2, metavar=("TENSORS", "NUMEL"), help="one model, not several")
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    if args.command == "bench":
        try:
            bench(args.device, args.steps, (Model(*args.model),) if args.model else MODELS)
        except (RuntimeError, ValueError) as error:
            print(f"python -m fusedlr bench: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        plot(args.expression, args.steps, args.out, args.base_lr, args.log)
    except (TypeError, ValueError, OSError, ImportError) as error:
        print(f"python -m fusedlr plot: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
