"""Every optimizer in every storage: against float64, against float32, and what must not depend on how it is run."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from cases import (
    BACKENDS,
    CASES,
    FEW,
    LAYOUTS,
    STATEFUL,
    TINY,
    Case,
    in_storages,
    make_gradient,
    make_params,
    twin_of,
)
from executors import step_by_the_executor_of_devices
from torch import Tensor, nn

import fusedlr
from fusedlr import Precision, clipping, codecs
from fusedlr.conversion import full_slot

BF16, FP32 = torch.bfloat16, torch.float32
PRECISIONS = {
    "fp32": Precision(state="fp32"),
    "noisy": Precision(state="fp32", rounding="stochastic"),
    "master": Precision(state="fp32", weights="fp32"),
    "exact": Precision.exact(),
    "bf16": Precision(state="bf16", weights="split"),
    "int8": Precision(state="int8", weights="fp32"),
    "compact": Precision.compact(),
    "nearest-24": Precision(state="param", weights="split", bits=8),
}
STEPS = 3


def possible(case: Case, precision: Precision) -> bool:
    return precision.state in ("param", "fp32") or not case.kwargs.get("centered")


def state_numbers(optimizer: fusedlr.FusedOptimizer, p: Tensor, case: Case) -> dict[str, Tensor]:
    entry = optimizer.state.get(p, {})
    return {key: full_slot(entry, key).double() for key in case.state if key in entry}


def allowed_of_weight(w: Tensor, precision: Precision) -> Tensor:
    """What storing a weight may move it by: nothing beside a float32, half a spacing, or all of one if stochastic."""
    bits = {"param": 8, "fp32": 24, "split": 24 if precision.bits == 16 else 16}[precision.weights]
    half = 2.0**-bits if bits < 24 else 0.0
    return w.abs() * half * (2 if precision.rounding == "stochastic" else 1)


def allowed_of_slot(x: Tensor, precision: Precision) -> Tensor:
    """Half a spacing of bfloat16, a whole one where it is stochastic; a sixteenth for 8-bit codes, and of where those
    become linear, 2**-16 of the largest of a group (here of all)."""
    if precision.state == "fp32":
        return torch.zeros_like(x)
    if precision.state == "int8":
        largest = x.abs().amax() if x.numel() else 0.0
        return (x.abs() + 2.0**-15 * largest) * 2.0**-4 * (1 + 1e-5)
    return x.abs() * 2.0 ** (-8 if precision.state == "param" else -7)


def step_by_step(case: Case, precision: Precision, backend: str, device: Any, dtype: torch.dtype, clip: Any) -> None:
    """Before each step the stored numbers go to the oracle in float64; afterwards they are its, rounded once."""
    params = make_params(FEW, dtype, device)
    optimizer = case.make(list(params.values()), precision=precision, backend=backend, clip=clip)
    unit = torch.finfo(FP32).eps
    for _ in range(STEPS):
        full = optimizer.full_precision_parameters()
        twins = {name: nn.Parameter(full[p].double()) for name, p in params.items()}
        oracle = case.make_oracle(list(twins.values()))
        for i, (name, p) in enumerate(params.items()):
            p.grad = make_gradient(p, case, i % 3)
            twins[name].grad = p.grad.double()
            state = optimizer.state.get(p)
            if state:
                held = {key: x.clone() for key, x in state_numbers(optimizer, p, case).items()}
                oracle.state[twins[name]] = held | {key: state[key].double() for key in case.numbers}
                if case.oracle is not torch.optim.SGD:
                    oracle.state[twins[name]]["step"] = state["step"].clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([t for t in twins.values() if t.numel()], clip.max_norm, foreach=False)
        oracle.step()
        optimizer.step()
        full = optimizer.full_precision_parameters()
        for name, p in params.items():
            expected = twins[name].detach()
            # Ten float32 operations on numbers of the size of the weight and of the update, as in test_parity.
            bound = 4 * unit * expected.abs() + 16 * unit * case.lr * case.reach
            bound += allowed_of_weight(expected, precision)
            assert ((full[p].double() - expected).abs() <= bound).all(), name
            for key, got in state_numbers(optimizer, p, case).items():
                wanted = oracle.state[twins[name]][key]
                bound = 4 * unit * wanted.abs() + 64 * unit + allowed_of_slot(wanted, precision)
                assert ((got - wanted).abs() <= bound).all(), (name, key)


# Centered RMSprop takes no coarse state: see test_precisions_that_cannot_be.
@pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c, n in in_storages(CASES, PRECISIONS) if possible(c, PRECISIONS[n])], ids=str
)
def test_every_optimizer_in_every_storage_goes_where_float64_goes(case: Case, name: str, seed: int) -> None:
    clip = clipping.GlobalNorm(20.0) if CASES.index(case) % 2 else None
    step_by_step(case, PRECISIONS[name], "torch", "cpu", BF16, clip)


@pytest.mark.parametrize(
    ("case", "name"), in_storages([c for c in STATEFUL if "centered" not in c.name], PRECISIONS), ids=str
)
def test_the_kernels_go_there_too(case: Case, name: str, seed: int, triton_device: torch.device) -> None:
    step_by_step(case, PRECISIONS[name], "triton", triton_device, BF16, clipping.GlobalNorm(20.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, FP32])
@pytest.mark.parametrize(
    "precision", [Precision(state="int8", weights="fp32"), Precision(state="bf16", weights="fp32"),
                  Precision(state="fp32", weights="fp32")], ids=lambda p: p.state
)  # fmt: skip
def test_other_dtypes(
    precision: Precision, dtype: torch.dtype, backend: str, seed: int, triton_device: torch.device
) -> None:
    """A float32 parameter is its own master copy."""
    device = triton_device if backend == "triton" else "cpu"
    for case in STATEFUL[1:3]:
        step_by_step(case, precision, backend, device, dtype, None)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def exact_arithmetic(params: list[nn.Parameter], precision: Precision, **own: Any) -> fusedlr.SGD:
    """SGD whose factors are powers of two: no compiler and no vector unit rounds it otherwise."""
    return fusedlr.SGD(params, lr=2.0**-6, momentum=0.5, precision=precision, **own)


def run_bits(
    layouts: dict[str, Any], precision: Precision, device: Any = "cpu", **own: Any
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    torch.manual_seed(5)
    params = list(make_params(layouts, BF16).values())
    params = [nn.Parameter(p.detach().to(device)) for p in params]
    optimizer = exact_arithmetic(params, precision, **own)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape).to(p)
        optimizer.step()
    return [p.detach().cpu() for p in params], [{k: v.cpu() for k, v in optimizer.state[p].items()} for p in params]


def assert_same_bits(a: Any, b: Any) -> None:
    for i, (p, q) in enumerate(zip(a[0], b[0], strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
    for i, (s, t) in enumerate(zip(a[1], b[1], strict=True)):
        assert s.keys() == t.keys()
        for key in s:
            assert s[key].dtype == t[key].dtype and torch.equal(s[key], t[key]), f"{key} of parameter {i}"


WEIGHTS: list[dict[str, Any]] = [
    {}, {"rounding": "stochastic"}, {"weights": "fp32"}, {"weights": "split"}, {"weights": "split", "bits": 8},
    {"weights": "split", "bits": 8, "rounding": "stochastic"},
]  # fmt: skip
STORAGES = [Precision(state=s, seed=9, **w) for s, w in itertools.product(("param", "fp32", "bf16", "int8"), WEIGHTS)]
# State that is rounded at random shares its random bits with the weights, and the scales of codes lie in one table with
# what completes these: both go with all weights. State that is stored as it is meets each of them once.
BITS = [p for p in STORAGES if p.state in ("bf16", "int8") or (p.state == "param") == (p.rounding == "stochastic")]
MIXED = {**FEW, **dict(list(TINY.items())[:7])}


def short(precision: Precision) -> str:
    return f"{precision.state}-{precision.weights}{precision.bits}-{precision.rounding}"


@pytest.mark.parametrize("precision", BITS, ids=short)
def test_the_bits_do_not_depend_on_backend_batching_or_grid(
    precision: Precision, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("fusedlr.kernels.launch")
    if precision.state == "int8" and not launch.INTERPRETED:
        pytest.skip("compiled, the product and the sum of a code are rounded as one: a tie may go the other way")
    together = run_bits(MIXED, precision)
    assert_same_bits(together, run_bits(MIXED, precision, flatten=False))
    assert_same_bits(together, run_bits(MIXED, precision, triton_device, backend="triton"))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "chunk_size_for", lambda numel: 4 * launch.BLOCK)
        assert_same_bits(together, run_bits(MIXED, precision, triton_device, backend="triton", flatten=False))
    with monkeypatch.context() as patch:
        step_by_the_executor_of_devices(patch)
        assert_same_bits(together, run_bits(MIXED, precision))


def test_large_tensors_are_stepped_in_pieces_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlr.backends import torch as host

    layouts = {"large": lambda device, dtype: torch.randn(70_001).to(device, dtype), "small": LAYOUTS["seven"]}
    for precision in (Precision.compact(), Precision(state="bf16", rounding="stochastic")):
        whole = run_bits(layouts, precision)
        with monkeypatch.context() as patch:
            patch.setattr(host, "RULE_CHUNK", 64 * 7)
            assert_same_bits(whole, run_bits(layouts, precision))


def test_another_seed_gives_other_bits_and_the_same_seed_the_same() -> None:
    def run(seed: int) -> Any:
        return run_bits({"x": LAYOUTS["4097"]}, Precision(state="bf16", rounding="stochastic", seed=seed))

    assert_same_bits(run(1), run(1))
    (p,), _ = run(1)
    (q,), _ = run(2)
    differs = float((p != q).double().mean())
    assert 0.05 < differs < 0.95


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["fp32", "split"])
def test_exact_has_the_bits_of_float32_training(weights: str, backend: str, triton_device: torch.device) -> None:
    """The parameters' own bits start equal; Adamax has no operator of PyTorch's, whose roundings would differ."""
    device = triton_device if backend == "triton" else torch.device("cpu")
    torch.manual_seed(1)
    narrow = [nn.Parameter(torch.randn(s, device=device).bfloat16()) for s in ((33, 5), (1025,), (3,))]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer = fusedlr.Adamax(narrow, lr=1e-3, precision=Precision(state="fp32", weights=weights), backend=backend)
    oracle = fusedlr.Adamax(wide, lr=1e-3, backend=backend)
    for _ in range(5):
        for p, q in zip(narrow, wide, strict=True):
            p.grad = torch.randn(p.shape, device=device).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        oracle.step()
    full = optimizer.full_precision_parameters()
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(full[p], q)
        rounded = q.bfloat16() if weights == "fp32" else codecs.nearest_away(q.detach())
        assert torch.equal(p, rounded)
        assert torch.equal(optimizer.state[p]["exp_avg"], oracle.state[q]["exp_avg"])


# ---- what low precision loses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_bfloat16_stagnates_and_the_others_do_not(backend: str, triton_device: torch.device) -> None:
    """Steps of 1e-4 from weights of 1, whose spacing in bfloat16 is 2**-8 below."""
    device = triton_device if backend == "triton" else torch.device("cpu")
    # The interpreter takes its time.
    steps, n = (100, 4096) if backend == "torch" or device.type != "cpu" else (20, 1024)

    def run(precision: Precision | None) -> float:
        p = nn.Parameter(torch.ones(n, dtype=BF16, device=device))
        optimizer = fusedlr.Lion([p], lr=1e-4, precision=precision, backend=backend)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return float(optimizer.full_precision_parameters()[p].double().mean())

    expected, rounded = 1.0 - 1e-4 * steps, 2.0**-25 * steps
    assert run(None) == 1.0
    assert run(Precision(state="fp32")) == 1.0
    for name in ("master", "exact"):
        assert run(PRECISIONS[name]) == pytest.approx(expected, abs=rounded)
    # The mean of n random walks within 6 deviations: steps of 2**-8 with probability 2.6 %, of 2**-16 for 24 bits.
    deviation = 2.0**-8 * (0.026 * steps / n) ** 0.5
    assert run(Precision(rounding="stochastic")) == pytest.approx(expected, abs=6 * deviation)
    deviation = 2.0**-16 * (steps / 4 / n) ** 0.5
    assert run(Precision.compact()) == pytest.approx(expected, abs=rounded + 6 * deviation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["master", "exact", "compact"])
def test_a_parameter_that_somebody_else_writes_is_not_reverted(
    name: str, backend: str, seed: int, triton_device: torch.device
) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    p = nn.Parameter(torch.randn(500, device=device).bfloat16())
    optimizer = fusedlr.AdamW([p], lr=1e-3, precision=PRECISIONS[name], backend=backend, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    # Another checkpoint, pruning, a re-initialisation: one half written, the other as it was.
    before = optimizer.full_precision_parameters()[p].clone()
    new = torch.cat([torch.randn(200, device=device), torch.zeros(30, device=device), -torch.zeros(20, device=device)])
    p.data[:250].copy_(new)
    full = optimizer.full_precision_parameters()[p]
    assert torch.equal(full[250:], before[250:])
    spacing = p.detach().float().abs().clamp_min(2.0**-126) * 2.0**-7
    assert ((full - p.detach().float()).abs() <= spacing / 2)[:250].all() and full.isfinite().all()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = (optimizer.full_precision_parameters()[p] - full).abs()
    assert moved.max() <= 4e-3, "a step of Adam is about its lr"


# ---- skipped steps, presets, bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torch", "triton", "device"])
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
def test_a_skipped_step_changes_no_array(
    how: str, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "device":
        step_by_the_executor_of_devices(monkeypatch)
    backend = "triton" if how == "triton" else "torch"
    p = nn.Parameter(torch.randn(300).bfloat16().to(triton_device if how == "triton" else "cpu"))
    optimizer = fusedlr.AdamW([p], precision=Precision.compact(), nonfinite="skip", backend=backend)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items()} | {"p": p.detach().clone()}
    p.grad[7] = float("nan")
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    for key, value in (optimizer.state[p] | {"p": p.detach()}).items():
        assert torch.equal(value, before[key]), key


def test_bytes_per_parameter_are_those_in_memory() -> None:
    """A million bfloat16 parameters of Adam: what the arrays hold is what the representation says."""
    for precision, size in ((Precision(), 8), (Precision.exact(), 14), (Precision.compact(), 7.125),
                            (Precision(state="fp32", weights="fp32"), 16), (Precision(state="bf16"), 8)):  # fmt: skip
        p = nn.Parameter(torch.zeros(1024, 1024, dtype=BF16))
        p.grad = torch.zeros_like(p)
        optimizer = fusedlr.Adam([p], precision=precision)
        optimizer.step()
        arrays = [p, p.grad, *(v for v in optimizer.state[p].values() if v.ndim)]
        assert sum(a.numel() * a.element_size() for a in arrays) == size * p.numel()
        assert precision.bytes_per_parameter() == size
        assert f"# {size:g} bytes a bfloat16 parameter of Adam" in repr(precision)
    assert Precision().bytes_per_parameter(FP32) == 16
    assert Precision(state="int8", weights="fp32").bytes_per_parameter(FP32, slots=1) == 8 + 1.0625


def test_a_precision_prints_as_the_code_that_makes_it() -> None:
    for precision in STORAGES:
        assert eval(repr(precision), {"Precision": Precision}) == precision
    optimizer = fusedlr.Adam([nn.Parameter(torch.zeros(2, dtype=BF16))], precision=Precision.compact())
    assert repr(Precision.compact()) in repr(optimizer)
    assert "precision" not in repr(fusedlr.Adam([nn.Parameter(torch.zeros(2))])).replace("precision: None", "")


def test_without_a_precision_pytorchs_own_operators_are_used() -> None:
    """The fast paths of float32 are those that no precision disturbs; state='fp32' is what they have anyway."""
    kept = Precision(state="fp32", weights="fp32", rounding="stochastic")
    for precision, fast in ((None, True), (kept, True), (Precision(state="int8"), False)):
        p = nn.Parameter(torch.zeros(100))
        p.grad = torch.ones_like(p)
        optimizer = fusedlr.AdamW([p], precision=precision, backend="torch")
        optimizer.step()
        assert optimizer._plan is not None
        executor: Any = optimizer._plan.executors[0]
        assert [call.has_operator for call in executor._calls] == [fast]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": "fp16"}, "state must be one of ('param', 'fp32', 'bf16', 'int8'), but got 'fp16'"),
        ({"weights": "int8"}, "weights must be one of ('param', 'fp32', 'split'), but got 'int8'"),
        ({"rounding": "up"}, "rounding must be one of ('nearest', 'stochastic'), but got 'up'"),
        ({"weights": "split", "bits": 4}, "bits must be one of (16, 8), but got 4"),
        ({"bits": 8}, "bits=8 belongs to weights='split', but weights is 'param'"),
        ({"seed": -1}, "seed must be an integer of at least 0, but got -1"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Precision(**arguments)


IMPOSSIBLE = [
    (fusedlr.AdamW, {}, Precision(state="int8"), torch.float64, "not possible for a float64 parameter"),
    (fusedlr.AdamW, {}, Precision(weights="fp32"), torch.float64, "not possible for a float64 parameter"),
    (fusedlr.AdamW, {}, Precision.exact(), torch.float16, "bits that bfloat16 lacks, but a parameter is torch.float16"),
    (fusedlr.SGD, {}, Precision.compact(), torch.float16, "keeps the bits that bfloat16 lacks"),
    (fusedlr.RMSprop, {"centered": True}, Precision(state="int8"), BF16, "not possible for rmsprop_centered"),
    (fusedlr.RMSprop, {"centered": True, "momentum": 0.9}, Precision(state="bf16"), BF16, "difference of two state"),
]


@pytest.mark.parametrize(("cls", "kwargs", "precision", "dtype", "message"), IMPOSSIBLE)
def test_precisions_that_cannot_be(cls: Any, kwargs: Any, precision: Any, dtype: Any, message: str) -> None:
    p = nn.Parameter(torch.randn(40).to(dtype))
    where = p.data_ptr()
    with pytest.raises(ValueError, match=message):
        cls([p], precision=precision, **kwargs)
    fine = nn.Parameter(torch.randn(3).bfloat16())
    if cls is not fusedlr.RMSprop:
        optimizer = cls([fine], precision=precision, **kwargs)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [p]})
        assert len(optimizer.param_groups) == 1
    assert p.data_ptr() == where, "the parameter was moved by what failed"


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_parameters_have_nothing_to_split(backend: str, triton_device: torch.device) -> None:
    """A model in bfloat16 often keeps its normalisations in float32: they are stepped as in float32 training."""
    device = triton_device if backend == "triton" else "cpu"
    narrow = nn.Parameter(torch.randn(100, device=device).bfloat16())
    full, alone = (nn.Parameter(torch.linspace(-1, 1, 40, device=device)) for _ in range(2))
    both = fusedlr.AdamW([narrow, full], precision=Precision.exact(), backend=backend)
    only = fusedlr.AdamW([alone], backend=backend)
    for _ in range(3):
        narrow.grad = torch.randn_like(narrow)
        full.grad = torch.randn_like(full)
        alone.grad = full.grad.clone()
        both.step()
        only.step()
    assert set(both.state[full]) == {"step", "exp_avg", "exp_avg_sq"} == set(both.state[narrow]) - {"param_low"}
    assert torch.equal(full, alone) and torch.equal(both.full_precision_parameters()[full], alone)
    assert Precision.exact().bytes_per_parameter(FP32) == 16


def test_stateless_sgd_has_nothing_to_store() -> None:
    p = nn.Parameter(torch.ones(5).bfloat16())
    p.grad = torch.ones_like(p)
    optimizer = fusedlr.SGD([p], lr=0.1, precision=Precision(state="int8"))
    optimizer.step()
    assert set(optimizer.state[p]) == {"step"}


def test_two_optimizers_with_state_and_a_copy_share_nothing(seed: int) -> None:
    p = nn.Parameter(torch.randn(70).bfloat16())
    other = twin_of(p)
    a, b = (fusedlr.AdamW([x], precision=Precision.compact()) for x in (p, other))
    for x, optimizer in ((p, a), (other, b)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    b.state[other]["exp_avg"].zero_()
    assert a.state[p]["exp_avg"].any()
