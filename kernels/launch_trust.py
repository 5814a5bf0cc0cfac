"""The two launches that find the trust ratios of tensors, beside those of ``launch``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import formats, rules, trust_rules
from .launch import NUM_WARPS, PLAIN, THREADS, apply_constants, mode_for
from .launcher import Launcher
from .trust import trust_norms, trust_ratios

__all__ = ["launch_trust", "trust_constants", "trust_partials"]

_norms = Launcher(trust_norms, num_warps=NUM_WARPS, enable_fp_fusion=True)
_ratios = Launcher(trust_ratios, num_warps=NUM_WARPS, enable_fp_fusion=False)


@functools.cache
def trust_constants(
    rule_name: str,
    hyper_name: str,
    *,
    clamp: bool,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtypes: tuple[torch.dtype, ...],
    storage: tuple[str, str, tuple[bool, ...]] = PLAIN,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of trust_norms and of trust_ratios, beside the apply of the same arguments."""
    direction, ratio = (getattr(rules, name) for name in trust_rules.TRUSTS[rule_name])
    read = state_dtypes[: len(direction.arg_names) - 3]  # all but p, g and h
    apply = apply_constants(
        rule_name,
        hyper_name,
        clamp=clamp,
        dtype=dtype,
        grad_dtype=grad_dtype,
        state_dtypes=read,
        storage=storage,
    )
    slots = len(state_dtypes)
    shared = {name: apply[name] for name in ("HYPER", "FIELDS")}
    shared["MODE"] = mode_for(2.0, [dtype])
    norms = {name: apply[name] for name in ("CLIP", "ROUND", "P", "G", "S", "SLOTS", "WIDE", "FORMAT", "BLOCK", "TAIL")}
    norms |= {
        "DIRECTION": direction,
        "WIDTH": 3 + slots + formats.columns(*storage[:2], slots),
        "OF_RULE": slots,
        "ROWS": THREADS,
    }
    return norms | shared, {"RATIO": ratio} | shared


def trust_partials(n_chunks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where trust_norms leaves its sums, the parameters' and the directions', and for float64 their scales."""
    return torch.empty((2 if dtype == torch.float64 else 1, 2, n_chunks), dtype=torch.float64, device=device)


def launch_trust(
    n_chunks: int,
    segments: Tensor,
    chunks: Tensor,
    rows: Tensor,
    skip: Tensor,
    chunk_size: int,
    partials: Tensor,
    tensors: Tensor,
    first_partial: int,
    **choices: Any,
) -> None:
    """The trust ratio of each tensor into the last field of its row, in two launches: norms, then ratios.

    ``choices`` are the arguments of ``trust_constants``.
    """
    norms, ratios = trust_constants(**choices)
    width = rows.shape[1]
    _norms(n_chunks, (segments, chunks, rows, width, skip, partials, n_chunks, chunk_size), norms)
    where = (partials, n_chunks, tensors, tensors.shape[1], first_partial, rows, width, skip)
    _ratios(rows.shape[0], where, ratios)
