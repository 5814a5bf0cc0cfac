"""ZClip and AutoClip on every executor against references written in numpy; what all adaptive strategies share."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from executors import executor, place_of, sgd
from torch import Tensor, nn
from training import through_file

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import AGC, AutoClip, Clip, GlobalNorm, ZClip

# Triton's interpreter computes with numpy, which warns of what these tests do on purpose: 0/0, inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

__all__ = ["executor"]  # the fixture

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# As in test_clipping.py: what the stored parameter rounds to, and the error of a norm summed in float32.
STORED = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NORM_RTOL = 2e-6


# ---- ZClip and AutoClip against loops over floats ------------------------------------------------------------------


def zclip_by_hand(clip: ZClip, norms: Sequence[float]) -> tuple[list[float], list[float]]:
    """The thresholds as the authors' code computes them, from a buffer first; and (count, mean, variance)."""
    buffer: list[float] = []
    thresholds, mean, var = [], 0.0, 0.0
    for i, norm in enumerate(norms):
        threshold = math.inf
        if i < clip.warmup_steps:
            buffer.append(norm)
            mean, var = float(np.mean(buffer)), float(np.var(buffer))
        else:
            std = math.sqrt(var)
            score = (norm - mean) / (std + clip.eps) if norm != mean else 0.0
            if score > clip.z:
                threshold = mean + clip.z * std / (score / clip.z)
            x = min(norm, threshold)
            mean = clip.alpha * mean + (1 - clip.alpha) * x
            var = clip.alpha * var + (1 - clip.alpha) * (x - mean) ** 2
        thresholds.append(min(threshold, clip.max_norm or math.inf))
    return thresholds, [float(len(norms)), mean, var]


def autoclip_by_hand(clip: AutoClip, norms: Sequence[float]) -> tuple[list[float], list[float]]:
    windows = [norms[max(0, i + 1 - clip.history) : i + 1] for i in range(len(norms))]
    return [float(np.percentile(w, clip.percentile)) for w in windows], list(windows[-1])


NORMS = [*np.random.default_rng(7).lognormal(0.0, 0.4, 26).tolist(), 40.0, 1.0, 1.0, 0.3, 9.0, *[0.7] * 5]
REMEMBERING = [
    ZClip(warmup_steps=4), ZClip(2.0, 0.8, 1, max_norm=2.0), ZClip(0.1, 0.5, 6, eps=0.0), ZClip(1.5),
    AutoClip(), AutoClip(50, 4), AutoClip(0, 7), AutoClip(100, 3, eps=0.0), AutoClip(37.5, 2), AutoClip(90, 11),
]  # fmt: skip


def by_hand(clip: Any, norms: Sequence[float]) -> tuple[list[float], list[float]]:
    return zclip_by_hand(clip, norms) if isinstance(clip, ZClip) else autoclip_by_hand(clip, norms)


def give(p: Tensor, norm: float) -> None:
    """A gradient of exactly this norm."""
    p.grad = torch.zeros_like(p)
    p.grad.view(-1)[0] = norm


def remembered(optimizer: Any) -> list[Any]:
    return list(optimizer.state_dict()["param_groups"][0]["fusedlr"]["clip_statistics"])


@pytest.mark.parametrize("clip", REMEMBERING, ids=repr)
def test_thresholds_and_statistics(executor: str, clip: Any) -> None:
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64, device=place_of(executor))) for _ in range(2)]
    optimizer = sgd(params, clip, executor)
    # The interpreter takes half a second for a step of AutoClip, whose longest full history here has 11 norms.
    norms = NORMS[18:] if executor == "triton" and isinstance(clip, AutoClip) else NORMS
    thresholds, statistics = by_hand(clip, norms)
    assert any(m < n for m, n in zip(thresholds, norms, strict=True)) or clip == AutoClip(100, 3, eps=0.0)
    for norm, threshold in zip(norms, thresholds, strict=True):
        before = float(params[0].detach()[0])
        give(params[0], norm)
        give(params[1], 0.0)
        optimizer.step()
        taken = before - float(params[0].detach()[0])
        # A variance of 40 steps has some 1e-15 of its own size, which a spike's small excess magnifies.
        assert taken == pytest.approx(norm * min(1.0, threshold / (norm + clip.eps)), rel=1e-11, abs=1e-13)
    name, *numbers = remembered(optimizer)
    assert name == type(clip).__name__ and numbers == pytest.approx(statistics, rel=1e-12)


def test_autoclip_is_exact_with_a_long_history(executor: str) -> None:
    """More norms than are looked at together, many of them equal: to the bits of numpy's percentile."""
    rng = np.random.default_rng(3)
    norms = np.round(rng.lognormal(0, 2, 2500), 1).tolist()
    clip = AutoClip(31.7, history=2400, eps=0.0)
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=place_of(executor)))
    optimizer = sgd([p], clip, executor)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["fusedlr"]["clip_statistics"] = ["AutoClip", *norms[:-8]]  # the older ones are dropped
    optimizer.load_state_dict(saved)
    for i in range(len(norms) - 8, len(norms)):
        p.data.zero_()
        give(p, 1e6)
        thresholds = np.percentile([*norms[i - 2399 : i], 1e6], 31.7)
        optimizer.step()
        assert float(-p.detach()) == pytest.approx(thresholds, rel=2.0**-51, abs=0)
        norms[i] = 1e6
    assert remembered(optimizer) == ["AutoClip", *norms[-2400:]]


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e-30])
@pytest.mark.parametrize("clip", [ZClip(warmup_steps=3, eps=0.0), AutoClip(50, 5, eps=0.0)], ids=repr)
def test_statistics_keep_the_range_of_norms(executor: str, clip: Any, size: float) -> None:
    p = nn.Parameter(torch.zeros(1, device=place_of(executor)))
    optimizer = sgd([p], clip, executor)
    held = [float(torch.tensor(size * x)) for x in (1.0, 1.25, 0.5, 7.0)]
    thresholds, _ = by_hand(clip, held)
    for norm in held:
        p.data.zero_()
        give(p, norm)
        optimizer.step()
    assert float(-p.detach()) == pytest.approx(thresholds[-1], rel=NORM_RTOL, abs=0) and thresholds[-1] < held[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [ZClip(warmup_steps=3), AutoClip(40, 5)], ids=repr)
def test_all_dtypes(executor: str, clip: Any, dtype: torch.dtype, seed: int) -> None:
    shapes = [(40, 30), (7,), (), (1500,), (0,)]
    params = [nn.Parameter(torch.zeros(s, device=place_of(executor)).to(dtype)) for s in shapes]
    optimizer = sgd(params, clip, executor)
    norms: list[float] = []
    for step in range(6):
        for p in params:
            p.data.zero_()
            p.grad = (torch.randn(p.shape) * (20.0 if step == 4 else 1.0)).to(p)
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in params)))  # type: ignore[union-attr]
        optimizer.step()
        assert float(optimizer.last_grad_norm) == pytest.approx(norms[-1], rel=NORM_RTOL)  # type: ignore[arg-type]
        factor = min(1.0, by_hand(clip, norms)[0][-1] / (norms[-1] + 1e-6))
        # ZClip's deviation of three norms that are a few percent apart magnifies the error of each.
        rtol = STORED[dtype] + (1e-11 if dtype == torch.float64 else 20 * NORM_RTOL)
        for p in params:
            assert p.grad is not None
            floor = float(torch.finfo(dtype).smallest_normal) * STORED[dtype]
            torch.testing.assert_close(-p.double(), p.grad.double() * factor, rtol=rtol, atol=floor)
    assert factor < 1 or norms[-1] < norms[-2]


@pytest.mark.parametrize("clip", [ZClip(warmup_steps=3, max_norm=2.0), AutoClip(40, 5)], ids=repr)
def test_several_buckets_decide_alike(executor: str, clip: Any, seed: int) -> None:
    """Buckets of four dtypes see one statistic, which each step changes once."""
    params = [nn.Parameter(torch.zeros(2, device=place_of(executor)).to(d)) for d in DTYPES]
    optimizer = sgd(params, clip, executor)
    norms = [2.0, 4.0, 1.0, 2.0, 64.0, 2.0, 16.0]
    for i, norm in enumerate(norms):
        for p in params:
            p.data.zero_()
            give(p, norm / 2)
        optimizer.step()
        factor = min(1.0, by_hand(clip, norms[: i + 1])[0][-1] / (norm + 1e-6))
        for p in params:
            assert float(-p[0].detach()) == pytest.approx(norm / 2 * factor, rel=STORED[p.dtype] + NORM_RTOL)
    assert remembered(optimizer)[1:] == pytest.approx(by_hand(clip, norms)[1], rel=1e-12)


def test_max_norm_may_be_scheduled(executor: str) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=place_of(executor)))
    schedule = {"max_norm": schedules.Linear(4, 1.0, 0.5)}
    clip = ZClip(warmup_steps=2, max_norm=2.0, eps=0.0)
    optimizer = sgd([p], clip, executor, schedule=schedule)
    for t in range(5):
        p.data.zero_()
        give(p, 3.0)
        optimizer.step()
        assert float(-p.detach()) == pytest.approx(2.0 * (1 - t / 8), rel=1e-14, abs=0)


@pytest.mark.parametrize("clip", [ZClip(), AutoClip(), AGC()], ids=repr)
def test_without_a_max_norm_none_can_be_scheduled(clip: Clip) -> None:
    with pytest.raises(ValueError, match="needs a clip with a finite max_norm"):
        sgd([nn.Parameter(torch.ones(2))], clip, "host", schedule={"max_norm": schedules.Linear(4, 1.0, 0.5)})


# ---- non-finite gradients ------------------------------------------------------------------------------------------

ADAPTIVE: list[Any] = [AGC(0.05), ZClip(warmup_steps=2, max_norm=3.0), AutoClip(50, 3)]


@pytest.mark.parametrize("mode", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("clip", ADAPTIVE, ids=repr)
def test_a_non_finite_norm_never_enters_the_statistics(executor: str, clip: Any, bad: float, mode: str) -> None:
    """Before any norm, in between and at the end; what follows is as if the bad steps had not been."""
    runs = []
    for plan in ([1.0, 2.0, 1.5, 8.0, 1.0], [bad, 1.0, bad, bad, 2.0, 1.5, 8.0, bad, 1.0, bad]):
        p = nn.Parameter(torch.ones(3, 2, device=place_of(executor)))
        optimizer = sgd([p], clip, executor, momentum=0.5, nonfinite=mode)
        for norm in plan:
            give(p, norm)
            before = p.detach().clone()
            if mode == "raise" and not math.isfinite(norm):
                with pytest.raises(FloatingPointError, match="nothing was changed"):
                    optimizer.step()
                assert torch.equal(p, before)
                continue
            if mode == "propagate" and not math.isfinite(norm):
                optimizer.step()
                assert p[0, 0].isnan()
                with torch.no_grad():
                    p.copy_(before)
                optimizer.state[p]["momentum_buffer"].nan_to_num_(0.0)
                continue
            optimizer.step()
        runs.append((p.detach().clone(), remembered(optimizer), optimizer))
    (straight, kept, _), (through, also, optimizer) = runs
    assert also == kept and (not kept or all(math.isfinite(x) for x in kept[1:]))
    if mode != "propagate":
        assert torch.equal(straight, through)
        assert int(optimizer.skipped_steps) == (5 if mode == "skip" else 0)


@pytest.mark.parametrize("clip", [ZClip(warmup_steps=1), AutoClip(50, 3)], ids=repr)
def test_propagation_is_that_of_the_global_norm(executor: str, clip: Any) -> None:
    """After some norms an inf gives 0 where the gradient is finite and NaN where not; a NaN gives NaN."""
    p = nn.Parameter(torch.zeros(2, device=place_of(executor)))
    optimizer = sgd([p], clip, executor)
    for g in ([1.0, 0.0], [math.inf, 5.0], [math.nan, 5.0]):
        p.data.zero_()
        p.grad = torch.tensor(g, device=p.device)
        optimizer.step()
        if math.isinf(g[0]):
            assert bool(p[0].isnan()) and bool(p[1] == 0.0)
    assert p.isnan().all()


# ---- checkpoints and copies ----------------------------------------------------------------------------------------


def train(p: Tensor, optimizer: Any, norms: Sequence[float]) -> None:
    for norm in norms:
        give(p, norm)
        optimizer.step()


@pytest.mark.parametrize("other", ["host", "triton"])
@pytest.mark.parametrize("clip", [ZClip(1.5, 0.8, warmup_steps=4), AutoClip(50, 4), AGC(0.1)], ids=repr)
def test_a_checkpoint_in_the_middle_of_a_run_continues(executor: str, other: str, clip: Any) -> None:
    """On the same executor and on the other backend; the second half leaves what an uninterrupted run leaves."""
    pytest.importorskip("triton")
    for cut in (0, 3, 7):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64, device=place_of(executor)))
        whole = sgd([p], clip, executor, momentum=0.9)
        train(p, whole, NORMS[:cut])
        q = nn.Parameter(p.detach().to(place_of(other), copy=True))
        loaded = sgd([q], clip, other, momentum=0.9)
        train(q, loaded, [5.0, 6.0])  # a record that exists is written in place
        q.data.copy_(p)
        loaded.load_state_dict(through_file(whole.state_dict()))
        assert remembered(loaded) == remembered(whole)
        train(p, whole, NORMS[cut:12])
        train(q, loaded, NORMS[cut:12])
        torch.testing.assert_close(q.cpu(), p.cpu(), rtol=1e-10, atol=1e-12)
        assert remembered(loaded)[1:] == pytest.approx(remembered(whole)[1:], rel=1e-12)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("clip", [ZClip(warmup_steps=4), AutoClip(50, 4)], ids=repr)
def test_copies_remember_and_are_apart(executor: str, clip: Any, how: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64, device=place_of(executor)))
    optimizer = sgd([p], clip, executor)
    train(p, optimizer, NORMS[:9])
    pair = (p, optimizer)
    q, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    kept = remembered(optimizer)
    assert remembered(copied) == kept
    train(q, copied, NORMS[9:12])
    assert remembered(optimizer) == kept and remembered(copied) != kept
    train(p, optimizer, NORMS[9:12])
    assert remembered(copied) == remembered(optimizer) and torch.equal(p, q)


def test_the_statistics_are_in_the_first_group_alone() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = fusedlr.SGD([{"params": [p]} for p in params], lr=0.1, clip=AutoClip(history=5))
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    found = [group["fusedlr"]["clip_statistics"] for group in optimizer.state_dict()["param_groups"]]
    assert found == [["AutoClip", pytest.approx(math.sqrt(6))], [], []]
    assert "clip_statistics" not in optimizer.param_groups[0]["fusedlr"]


def test_other_strategies_and_torch_start_anew() -> None:
    p = nn.Parameter(torch.ones(2))
    saved = sgd([p], ZClip(), "host")
    train(p, saved, [1.0, 2.0])
    for clip in (AutoClip(), GlobalNorm(1.0), None):
        other = sgd([p], clip, "host")
        other.load_state_dict(saved.state_dict())
        assert remembered(other)[1:] == []
    oracle = torch.optim.SGD([p], lr=1.0)
    train(p, oracle, [1.0])
    saved.load_state_dict(oracle.state_dict())
    assert remembered(saved) == ["ZClip"]


BAD_NUMBERS = [[1.0], [1.0, math.nan, 0.0], [1.0, "a", 0.0], [1.0, -1.0, 0.0]]
BAD_STATISTICS = [*(["ZClip", *numbers] for numbers in BAD_NUMBERS), "x"]


@pytest.mark.parametrize("bad", BAD_STATISTICS, ids=repr)
def test_statistics_that_are_none_change_nothing(bad: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = sgd([p], ZClip(), "host")
    train(p, optimizer, [1.0, 2.0])
    kept, saved = remembered(optimizer), optimizer.state_dict()
    saved["param_groups"][0]["fusedlr"] |= {"clip_statistics": bad, "t": 99}
    with pytest.raises(ValueError, match=r"statistics|ZClip remembers"):
        optimizer.load_state_dict(saved)
    assert remembered(optimizer) == kept and optimizer.steps_taken == 2


# ---- the strategies as values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [*REMEMBERING, AGC(), AGC(0.5, 1e-2)], ids=repr)
def test_strategies_are_values(clip: Any) -> None:
    assert eval(repr(clip), {"AGC": AGC, "ZClip": ZClip, "AutoClip": AutoClip}) == clip
    for twin in (pickle.loads(pickle.dumps(clip)), copy.deepcopy(clip)):
        assert twin == clip and hash(twin) == hash(clip)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: AGC(0.0), ValueError, "factor must be > 0 and finite, but got 0.0"),
        (lambda: AGC(math.inf), ValueError, "factor must be > 0 and finite"),
        (lambda: AGC("1"), TypeError, "factor must be a number"),  # type: ignore[arg-type]
        (lambda: AGC(eps=0.0), ValueError, "eps must be > 0 and finite"),
        (lambda: ZClip(0.0), ValueError, "z must be > 0 and finite, but got 0.0"),
        (lambda: ZClip(math.nan), ValueError, "z must be > 0 and finite"),
        (lambda: ZClip(alpha=1.0), ValueError, "alpha must be >= 0 and < 1, but got 1.0"),
        (lambda: ZClip(alpha=-0.1), ValueError, "alpha must be >= 0"),
        (lambda: ZClip(warmup_steps=0), ValueError, "warmup_steps must be an integer >= 1, but got 0"),
        (lambda: ZClip(warmup_steps=2.0), TypeError, "warmup_steps must be an integer"),  # type: ignore[arg-type]
        (lambda: ZClip(warmup_steps=True), TypeError, "warmup_steps must be an integer"),
        (lambda: ZClip(max_norm=0.0), ValueError, "max_norm must be > 0"),
        (lambda: ZClip(eps=-1.0), ValueError, "eps must be >= 0 and finite"),
        (lambda: AutoClip(-1.0), ValueError, "percentile must be >= 0"),
        (lambda: AutoClip(100.1), ValueError, "percentile must be from 0 to 100, but got 100.1"),
        (lambda: AutoClip("x"), TypeError, "percentile must be a number"),  # type: ignore[arg-type]
        (lambda: AutoClip(history=0), ValueError, "history must be an integer >= 1, but got 0"),
        (lambda: AutoClip(history=1.5), TypeError, "history must be an integer"),  # type: ignore[arg-type]
        (lambda: AutoClip(eps=math.inf), ValueError, "eps must be >= 0 and finite"),
    ],
)
def test_bad_numbers_are_errors_that_name_them(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
