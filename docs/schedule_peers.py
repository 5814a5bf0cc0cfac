"""The schedules of other libraries, name by name, as expressions of fusedlr; tests/test_schedule_peers.py holds each.

b is the base learning rate of the group (the peak, where a library has a warm-up), n the length, w the warm-up.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PEERS", "Peer"]


class Peer(NamedTuple):
    theirs: str
    ours: str
    note: str = ""


PEERS: dict[str, list[Peer]] = {
    "transformers": [
        Peer("constant", "Constant()"),
        Peer("constant_with_warmup (w)", "Warmup(w, offset=0)"),
        Peer("linear (w, n)", "Warmup(w, offset=0).then(Linear(n - w, 1.0, 0.0))"),
        Peer(
            "cosine (w, n)",
            "Warmup(w, offset=0).then(Cosine(n - w, periodic=True))",
            "rises again after n; without `periodic` it stays at 0",
        ),
        Peer(
            "cosine (w, n, num_cycles=c)",
            "Warmup(w, offset=0).then(Cosine((n - w) // (2 * c), periodic=True))",
            "where 2c divides n - w",
        ),
        Peer(
            "cosine_with_restarts (w, n, num_cycles=c)",
            "Warmup(w, offset=0).then(CosineRestarts((n - w) // c).for_steps(n - w)).then(Constant(0.0))",
            "where c divides n - w",
        ),
        Peer("polynomial (w, n, lr_end=m, power=k)", "Warmup(w, offset=0).then(Polynomial(n - w, k, min_lr=m))"),
        Peer(
            "inverse_sqrt (w, timescale=s)",
            "Warmup(w, offset=0).then(SqrtDecay(1 / s))",
            "s is w where it is not given",
        ),
        Peer("inverse_sqrt (0)", "SqrtDecay(1 / 10_000)", "without a warm-up, the timescale is 10,000"),
        Peer(
            "cosine_with_min_lr (w, n, min_lr=m)",
            "Warmup(w, offset=0).then(Cosine(n - w, min_lr=m, periodic=True))",
        ),
        Peer(
            "cosine_with_min_lr (w, n, min_lr_rate=r)",
            "Warmup(w, offset=0).then(Cosine(n - w, min_lr=r * b, periodic=True))",
        ),
        Peer(
            "cosine_warmup_with_min_lr (w, n, min_lr=m)",
            "Warmup(w).for_steps(w - 1).then(Cosine(n - w, min_lr=m, periodic=True))",
            "counts from 1; w of at least 2",
        ),
        Peer(
            "cosine_warmup_with_min_lr (w, n, min_lr=m, warmup_lr_rate=r)",
            "Warmup(w - 1, start_factor=r, offset=0).then(Cosine(n - w, min_lr=m, periodic=True))",
        ),
        Peer(
            "warmup_stable_decay (w, s, d, min_lr_ratio=r)",
            "Warmup(w, start_factor=r, offset=0).then(Constant(steps=s)).then(Cosine(d, min_lr=r * b))",
        ),
        Peer(
            'warmup_stable_decay (w, s, d, warmup_type="cosine", decay_type="linear", min_lr_ratio=r)',
            'Warmup(w, start_factor=r, shape="cosine", offset=0).then(Constant(steps=s)).then(Linear(d, 1.0, r))',
        ),
        Peer(
            'warmup_stable_decay (w, s, d, decay_type="1-sqrt", min_lr_ratio=r)',
            'Warmup(w, start_factor=r, offset=0).then(WSD(1, s - 1, d, "1-sqrt", min_lr=r * b))',
        ),
        Peer(
            'warmup_stable_decay (w, s, d, warmup_type="1-sqrt", min_lr_ratio=r)',
            "Lambda(lambda t: r + (1 - r) * (1 - math.sqrt(1 - t / w)), w).then(Constant(steps=s))"
            ".then(Cosine(d, min_lr=r * b))",
        ),
    ],
    "timm": [
        Peer(
            "CosineLRScheduler (n, lr_min=m, warmup_t=w, warmup_lr_init=f*b, warmup_prefix=True)",
            "Warmup(w, start_factor=f, offset=0).then(Cosine(n, min_lr=m))",
        ),
        Peer(
            "CosineLRScheduler (n, warmup_t=w, warmup_lr_init=f*b)",
            "Lambda(lambda t: f + t * (1 - f) / w if t < w else (1 + math.cos(math.pi * t / n)) / 2, n)"
            ".then(Constant(0.0))",
            "the decay runs on under the warm-up, and the value jumps after it",
        ),
        Peer(
            "CosineLRScheduler (n, cycle_mul=2, cycle_decay=g, cycle_limit=3)",
            "CosineRestarts(n, mult=2, decay=g).for_steps(7 * n).then(Constant(0.0))",
            "timm's decay takes the minimum along, here it is 0",
        ),
        Peer(
            "CosineLRScheduler (n, k_decay=k)",
            "Lambda(lambda t: (1 + math.cos(math.pi * (t / n) ** k)) / 2, n).then(Constant(0.0))",
        ),
        Peer("StepLRScheduler (n, g, warmup_t=w)", "Warmup(w, offset=0).then(StepDecay(n, g))"),
        Peer(
            "MultiStepLRScheduler (milestones, g)",
            "MultiStepDecay([m - 1 for m in milestones], g)",
            "one step earlier",
        ),
        Peer("PolyLRScheduler (n, power=k, lr_min=m)", "Polynomial(n, k, min_lr=m)"),
        Peer(
            "PolyLRScheduler (n, power=2, k_decay=k)",
            "Lambda(lambda t: (1 - (t / n) ** k) ** 2, n).then(Constant(0.0))",
        ),
        Peer(
            "TanhLRScheduler (n, lb=-7, ub=3)",
            "Lambda(lambda t: (1 - math.tanh(-7 * (1 - t / n) + 3 * t / n)) / 2, n).then(Constant(0.0))",
        ),
        Peer("t_in_epochs=True", "per_epoch(Cosine(n), s)", "s steps an epoch; of any schedule"),
    ],
    "optax": [
        Peer("constant_schedule", "Constant()"),
        Peer("linear_schedule (b, r*b, n)", "Linear(n, 1.0, r)"),
        Peer(
            "polynomial_schedule (b, m, k, n, transition_begin=w)",
            "Constant(steps=w).then(Polynomial(n, k, min_lr=m))",
        ),
        Peer("exponential_decay (b, n, g, end_value=m)", "ExponentialDecay(1 - g, every=n, min_lr=m)"),
        Peer("exponential_decay (b, n, g, staircase=True)", "ExponentialDecay(1 - g, every=n, staircase=True)"),
        Peer(
            "exponential_decay (b, n, g, transition_begin=w)",
            "Constant(steps=w).then(ExponentialDecay(1 - g, every=n))",
        ),
        Peer("cosine_decay_schedule (b, n, alpha=r)", "Cosine(n, min_lr=r * b)", "exponent 1"),
        Peer(
            "cosine_decay_schedule (b, n, alpha=r, exponent=k)",
            "Lambda(lambda t: r + (1 - r) * ((1 + math.cos(math.pi * t / n)) / 2) ** k, n).then(Constant(r))",
        ),
        Peer(
            "piecewise_constant_schedule (b, {7: g, 19: r})",
            "product(MultiStepDecay([7], g), MultiStepDecay([19], r))",
            "equal scales are one `MultiStepDecay`",
        ),
        Peer(
            'piecewise_interpolate_schedule ("linear", b, {7: g, 19: r})',
            "Linear(7, 1.0, g).then(Linear(12, g, g * r))",
        ),
        Peer(
            'piecewise_interpolate_schedule ("cosine", b, {7: g, 19: r})',
            "Cosine(7, min_lr=g * b).then(product(Constant(g), Cosine(12, min_lr=r * b)))",
        ),
        Peer("warmup_constant_schedule (f*b, b, w)", "Warmup(w, start_factor=f, offset=0)"),
        Peer(
            "warmup_cosine_decay_schedule (f*b, b, w, n, end_value=m)",
            "Warmup(w, start_factor=f, offset=0).then(Cosine(n - w, min_lr=m))",
        ),
        Peer(
            "warmup_exponential_decay_schedule (f*b, b, w, n, g)",
            "Warmup(w, start_factor=f, offset=0).then(ExponentialDecay(1 - g, every=n))",
        ),
        Peer(
            "cosine_onecycle_schedule (n, b)",
            'Warmup(int(0.3 * n), start_factor=1 / 25, shape="cosine", offset=0)'
            ".then(Cosine(n - int(0.3 * n), min_lr=b / 25e4))",
            "`OneCycle` is torch's, whose phases are one step shorter",
        ),
        Peer(
            "linear_onecycle_schedule (n, b)",
            "Linear(int(0.3 * n), 1 / 25, 1.0).then(Linear(int(0.85 * n) - int(0.3 * n), 1.0, 1 / 25))"
            ".then(Linear(n - int(0.85 * n), 1 / 25, 1 / 25e4))",
        ),
        Peer(
            "sgdr_schedule (of two warmup_cosine_decay)",
            "Warmup(w, offset=0).then(Cosine(n - w)).then(Warmup(w, offset=0)).then(Cosine(2 * n - w))",
        ),
        Peer("join_schedules ([x, y], [w])", "ExponentialDecay(1 - g).for_steps(w).then(Cosine(n))"),
    ],
}
