"""Clipping in other libraries, name by name, as the argument ``clip`` of fusedlr; tests/test_clip_peers.py holds each.

M is a threshold of a norm, v of an element, r of a ratio.
"""

from __future__ import annotations

from schedule_peers import Peer

__all__ = ["CLIP_PEERS"]

CLIP_PEERS: dict[str, list[Peer]] = {
    "torch": [
        Peer("clip_grad_norm_(params, M)", "GlobalNorm(M)", "or `clip=M`"),
        Peer("clip_grad_norm_(params, M, norm_type=p)", "GlobalNorm(M, p)"),
        Peer(
            "clip_grad_norm_(params, M, error_if_nonfinite=True)",
            "GlobalNorm(M)",
            'with `nonfinite="raise"`, which raises a FloatingPointError, torch a RuntimeError',
        ),
        Peer("clip_grad_value_(params, v)", "Value(v)"),
    ],
    "Keras": [
        Peer("clipnorm=M", "TensorNorm(M, eps=0)"),
        Peer("global_clipnorm=M", "GlobalNorm(M, eps=0)", "there an inf makes every gradient NaN"),
        Peer("clipvalue=v", "Value(v)"),
    ],
    "optax": [
        Peer("clip(v)", "Value(v)"),
        Peer("clip_by_global_norm(M)", "GlobalNorm(M, eps=0)"),
        Peer("normalize_by_update_norm(eps=e)", 'Normalize("global", e)', "its `scale_factor` goes into the lr"),
        Peer(
            "adaptive_grad_clip(r)",
            "AGC(r)",
            "the units of JAX's layouts: columns of a matrix, where torch's are rows",
        ),
    ],
    "timm": [
        Peer('clip_mode="norm", clip_grad=M', "GlobalNorm(M)"),
        Peer('clip_mode="value", clip_grad=v', "Value(v)"),
        Peer('clip_mode="agc", clip_grad=r', "AGC(r)", "there a gradient's norm counts as at least 1e-6"),
    ],
}
