"""Train a small byte-level GPT twice, with torch.optim and with fusedlr, and compare the two runs step by step.

Both models start from the same weights and see the same batches of real text, the source files of the Python standard
library. They take turns, step by step and in alternating order, so that whatever slows the machine down slows both.

    python examples/train_char_gpt.py            # the GPU where there is one, the CPU otherwise
    python examples/train_char_gpt.py --quick    # a few seconds, for tests

Exits with status 1 if the two loss curves are further than 1e-4 apart at any step.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Deterministic matrix products on CUDA need this before CUDA starts; see torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedlr
from fusedlr import schedules

try:
    import matplotlib
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"this example draws a progress bar and a picture and needs {error.name}: pip install 'fusedlr[examples]'")

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The two runs compute the same formulas; only the last bit of an intermediate result may differ, and training amplifies
# it, the more the higher the learning rate: over 300 steps the losses were at most 1e-5 apart at 7e-4 (two seeds) and
# 2e-5 at 1e-3. At 3e-3 training is chaotic: two runs of torch.optim itself, with gradients that differ by 1e-7 of
# themselves, end up 5e-2 apart.
LARGEST_DIFFERENCE = 1e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
PROMPT = b"def "


# --- The text -------------------------------------------------------------------------------------------------------


def read_text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: the standard library's source files in sorted order, every 20th one held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if skip.isdisjoint(p.relative_to(root).parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        parts[i % 20 == 19].append(path.read_bytes())
    train, valid = (torch.frombuffer(bytearray(b"\n".join(part) or b"\n"), dtype=torch.uint8) for part in parts)
    if valid.numel() < 100_000:
        sys.exit(
            f"expected the source files of the Python standard library in {root}, found {len(files)} with "
            f"{train.numel() + valid.numel()} bytes; run this with a Python that brings its sources"
        )
    return train, valid


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows of `length` + 1 bytes from anywhere in the text."""
    starts = torch.randint(text.numel() - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)].long()


# --- The model ------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary position embedding: each pair of features is turned by an angle that grows with the position."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a normalisation and around a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_feed = nn.LayerNorm(width, bias=False)
        self.feed_in = nn.Linear(width, 4 * width, bias=False)
        self.feed_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        fed: Tensor = self.feed_out(F.gelu(self.feed_in(self.norm_feed(x))))
        return x + fed


class GPT(nn.Module):
    """A byte-level GPT without biases, whose output layer is the transposed embedding."""

    rotation: Tensor

    def __init__(self, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(256, width)
        angles = torch.outer(torch.arange(context), 1000.0 ** -torch.linspace(0, 1, width // heads // 2))
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # The sum over residual branches keeps its size whatever the depth (GPT-2).
                depth = 2 * layers if name.endswith("_out.weight") else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        # Scaled so that the residual stream starts at the size at which its layers write into it.
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        turn = self.rotation[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def param_groups(self) -> list[dict[str, Any]]:
        """Matrices decay, the gains of the normalisations do not."""
        return [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, generator: torch.Generator, temperature: float = 0.7) -> str:
        tokens = torch.tensor([list(prompt)], device=self.embedding.weight.device)
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[0, -1]
            # The draw is made on the CPU, so that a seed gives the same text on every device up to rounding.
            byte = torch.multinomial(F.softmax(logits.float().cpu() / temperature, dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens, byte.to(tokens.device).view(1, 1)], dim=1)
        return bytes(tokens[0].tolist()).decode("utf-8", errors="replace")


# --- The two optimizers ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model with its way to update it, and what was seen at every step."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    # Clips, updates and advances the schedule; returns how to read (lr, norm of the gradients) of that step.
    update: Callable[[], Callable[[], tuple[float, float]]]
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    model_milliseconds: list[float] = field(default_factory=list)
    validation: float = math.nan

    def learn(self, batch: Tensor) -> Tensor:
        """The loss, after the forward and the backward pass."""
        loss = self.model.loss(batch)
        loss.backward()
        return loss

    def step(self, batch: Tensor) -> None:
        model_elapsed, loss = timed(partial(self.learn, batch), batch.device)
        elapsed, read = timed(self.update, batch.device)
        self.optimizer.zero_grad()
        lr, norm = read()
        self.losses.append(loss.item())
        self.lrs.append(lr)
        self.norms.append(norm)
        self.milliseconds.append(elapsed)
        self.model_milliseconds.append(model_elapsed)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Milliseconds that `work()` took, by the device's clock where it has one, and what it returned."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), result
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e3, result


def torch_run(model: GPT, lr: float, min_lr: float, warmup: int, steps: int) -> Run:
    optimizer = torch.optim.AdamW(model.param_groups(), lr=lr, betas=BETAS, fused=True)
    floor = min_lr / lr

    def factor(t: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        p = min((t - warmup) / (steps - warmup), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * p)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    parameters = list(model.parameters())

    def update() -> Callable[[], tuple[float, float]]:
        used = optimizer.param_groups[0]["lr"]
        norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        scheduler.step()
        return lambda: (used, norm.item())

    return Run("torch.optim", model, optimizer, update)


def fusedlr_run(model: GPT, lr: float, min_lr: float, warmup: int, steps: int) -> Run:
    optimizer = fusedlr.AdamW(
        model.param_groups(),
        lr=lr,
        betas=BETAS,
        schedule=schedules.Warmup(warmup).then(schedules.Cosine(steps - warmup, min_lr=min_lr)),
        clip=MAX_NORM,
    )

    def read() -> tuple[float, float]:
        assert optimizer.last_grad_norm is not None  # clip= measures it
        return optimizer.last_lr[0], optimizer.last_grad_norm.item()

    def update() -> Callable[[], tuple[float, float]]:
        optimizer.step()
        return read

    return Run("fusedlr", model, optimizer, update)


# --- What comes out -------------------------------------------------------------------------------------------------


def largest_difference(a: list[float], b: list[float]) -> float:
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def print_table(theirs: Run, ours: Run, difference: float) -> None:
    medians = [statistics.median(run.milliseconds) for run in (theirs, ours)]
    models = [statistics.median(run.model_milliseconds) for run in (theirs, ours)]
    rows = [
        ("", theirs.name, ours.name),
        ("final training loss", f"{theirs.losses[-1]:.5f}", f"{ours.losses[-1]:.5f}"),
        ("final validation loss", f"{theirs.validation:.5f}", f"{ours.validation:.5f}"),
        ("forward, backward, ms (p50)", f"{models[0]:.1f}", f"{models[1]:.1f}"),
        ("optimizer, ms a step (p50)", f"{medians[0]:.3f}", f"{medians[1]:.3f}"),
        ("speed", "1.00x", f"{medians[0] / medians[1]:.2f}x"),
    ]
    for label, left, right in rows:
        print(f"{label:<28}{left:>14}{right:>14}")
    print(f"\nlargest difference of the two loss curves: {difference:.1e} (allowed: {LARGEST_DIFFERENCE:.0e})")
    # The optimizer says of itself which backend it chose and why.
    print(*(line for line in repr(ours.optimizer).splitlines() if line.startswith("backend:")), sep="\n")


def draw(theirs: Run, ours: Run, title: str, out: Path) -> None:
    """Loss, learning rate, gradient norm and optimizer time of both runs in one picture."""
    styles = ({"color": "#0072b2", "lw": 3.0, "alpha": 0.55}, {"color": "#d55e00", "lw": 1.2, "ls": "--"})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    panels = [
        (axes[0, 0], "losses", "Training loss", "cross-entropy (nats per byte)"),
        (axes[0, 1], "lrs", "Learning rate", "learning rate"),
        (axes[1, 0], "norms", "Gradient norm before clipping", "global 2-norm"),
    ]
    for axis, attribute, name, unit in panels:
        for run, style in zip((theirs, ours), styles, strict=True):
            axis.plot(range(1, len(run.losses) + 1), getattr(run, attribute), label=run.name, **style)
        axis.set(title=name, xlabel="step", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[1, 0].axhline(MAX_NORM, color="0.4", lw=0.8, ls=":", label=f"threshold {MAX_NORM:g}")
    axes[1, 0].set_ylim(bottom=0)

    axis = axes[1, 1]
    # A few steps are slow for reasons of the machine's own: the axis ends where one in twenty lies beyond it.
    pooled = sorted(theirs.milliseconds + ours.milliseconds)
    span = (pooled[0] * 0.95, pooled[int(0.95 * (len(pooled) - 1))] * 1.05)
    for run, style in zip((theirs, ours), styles, strict=True):
        median = statistics.median(run.milliseconds)
        label = f"{run.name}: median {median:.2f} ms"
        axis.hist(run.milliseconds, bins=40, range=span, color=style["color"], alpha=0.55, label=label)
        axis.axvline(median, color=style["color"], lw=1.5)
    axis.set(title="Time of clipping, update and schedule", xlabel="time per step (ms)", ylabel="steps")
    axis.yaxis.get_major_locator().set_params(integer=True)

    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=130)
    plt.close(figure)


# --- The program ----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps of each run")
    parser.add_argument("--warmup", type=int, default=25, help="steps until the learning rate is reached")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of text a step")
    parser.add_argument("--context", type=int, default=128, help="bytes in a window")
    parser.add_argument("--width", type=int, default=256, help="width of the model; a multiple of 32")
    parser.add_argument("--layers", type=int, default=3, help="blocks of the model")
    parser.add_argument("--lr", type=float, default=7e-4, help="highest learning rate; the lowest is a tenth of it")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the sample")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: the GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 20 steps, whatever else is asked for")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.warmup, args.batch_size, args.context, args.width, args.layers = 20, 5, 4, 64, 64, 2
    if not 0 < args.warmup < args.steps:
        parser.error(f"expected 0 < --warmup < --steps, got --warmup {args.warmup} and --steps {args.steps}")
    if args.width < 32 or args.width % 32:
        parser.error(f"expected --width to be a positive multiple of 32, got {args.width}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    torch.use_deterministic_algorithms(True)
    # Of the attention kernels only this one is deterministic on CUDA; on the CPU all are.
    torch.backends.cuda.enable_flash_sdp(device.type == "cpu")
    torch.backends.cuda.enable_mem_efficient_sdp(False)

    began = time.perf_counter()
    train, valid = read_text()
    runs: list[Run] = []
    for make in (torch_run, fusedlr_run):
        torch.manual_seed(args.seed)
        model = GPT(args.context, args.width, args.layers, heads=args.width // 32).to(device)
        runs.append(make(model, args.lr, args.lr / 10, args.warmup, args.steps))
    theirs, ours = runs
    n_params = sum(p.numel() for p in ours.model.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"Byte-level GPT, {n_params / 1e6:.1f} million parameters, {where}"
    print(f"{title}; {train.numel() / 1e6:.1f} MB of Python source to learn from")

    generator = torch.Generator().manual_seed(args.seed)
    progress = tqdm(range(args.steps), desc="training both", unit="step")
    for t in progress:
        batch = windows(train, args.batch_size, args.context, generator).to(device)
        for run in runs if t % 2 == 0 else reversed(runs):
            run.step(batch)
        progress.set_postfix_str(f"loss {theirs.losses[-1]:.4f} (torch.optim) {ours.losses[-1]:.4f} (fusedlr)")

    held_out = windows(valid, 32, args.context, generator).to(device)
    for run in runs:
        with torch.no_grad():
            run.validation = run.model.loss(held_out).item()

    difference = largest_difference(theirs.losses, ours.losses)
    print()
    print_table(theirs, ours, difference)
    draw(theirs, ours, title, args.out)
    print(f"\n{PROMPT.decode()!r}, continued by the model that fusedlr trained:\n")
    print(ours.model.sample(PROMPT, 40 if args.quick else 240, generator))
    print(f"\nwrote {args.out} after {time.perf_counter() - began:.0f} s")
    if not difference <= LARGEST_DIFFERENCE:  # a NaN is a difference, too
        sys.exit(
            f"the two loss curves are {difference:.1e} apart, more than the {LARGEST_DIFFERENCE:.0e} that rounding "
            "explains: torch.optim and fusedlr do not compute the same updates here"
        )


if __name__ == "__main__":
    main()
