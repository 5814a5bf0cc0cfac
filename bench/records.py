"""What a run writes down: one JSON object a line for a case and a peer, with what is needed to run it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.measure import Times
from bench.peers import replays_graph

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """The fields that all records of a run share. `commit` is for a clean copy of the tree that has no git history."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    commit, dirty = (commit, False) if commit else git_state()
    cuda = device == "cuda"
    return {
        "time": now,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "commit": commit,
        "dirty": dirty,
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda if cuda else None,
        "driver": driver_version() if cuda else None,
        "threads": None if cuda else torch.get_num_threads(),
    }


def record(
    shared: dict[str, Any], case: Case, peer: str, times: Times, copy_gbps: float
) -> dict[str, float | int | str | bool | None]:
    """One line of a results file. It is written of steps that were compared before and after, hence `checked`."""
    ours, theirs = times.percentiles(times.fusedlr), times.percentiles(times.peer)
    backward = {"fusedlr": times.fusedlr_backward, "peer": times.peer_backward}
    return {
        **shared,
        "case": case.name,
        "optimizer": case.optimizer,
        "clip": case.clip,
        "schedule": case.schedule,
        "n_params": case.n_params,
        "n_tensors": case.n_tensors,
        "n_groups": case.n_groups,
        "dtype": str(case.dtype).removeprefix("torch."),
        "state_dtype": str(case.state_dtype).removeprefix("torch."),
        "graph": replays_graph(peer),
        "peer": peer,
        **{f"fusedlr_ms_p{p}": ms for p, ms in zip((20, 50, 80), ours, strict=True)},
        **{f"peer_ms_p{p}": ms for p, ms in zip((20, 50, 80), theirs, strict=True)},
        **{f"{side}_backward_ms_p50": times.percentiles(ms)[1] if ms else None for side, ms in backward.items()},
        "rounds": len(times.fusedlr),
        "bytes_per_param_floor": case.bytes_per_param_floor,
        "copy_gbps": copy_gbps,
        "checked": True,
    }


def append(out: Path, line: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def ratio(line: dict[str, Any]) -> float:
    """How many times as long the peer takes."""
    return float(line["peer_ms_p50"] / line["fusedlr_ms_p50"])


def bandwidth_fraction(line: dict[str, Any]) -> float:
    """The bytes that fusedlr's step must move, per second, as a part of what a plain copy moves."""
    return float(line["n_params"] * line["bytes_per_param_floor"] / (line["fusedlr_ms_p50"] * 1e6 * line["copy_gbps"]))


def git_state() -> tuple[str, bool]:
    """The commit that is checked out, and whether anything differs from it but the records themselves."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit, git("status", "--porcelain", "--", ".", ":(exclude)bench/results") != ""
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise SystemExit(
            f"expected a git checkout in {ROOT}, to record the commit that ran; git said: {detail.strip()}\n"
            "For a copy of a clean checkout, give its commit: --commit <40 hex digits>"
        ) from error


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match.group(1)
    return platform.processor() or platform.machine()


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None  # a container may have the driver without the tool that tells its version
