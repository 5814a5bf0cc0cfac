"""On a GPU: the kernels against the PyTorch backend and torch.optim, graphs, streams, and never a wait."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from executors import never_waiting
from torch import Tensor

import fusedlr
from fusedlr import schedules
from fusedlr.clipping import GlobalNorm, Normalize, TensorNorm, Value

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
pytest.importorskip("triton")

MAKERS: dict[str, Any] = {
    "sgd": lambda cls, params, **kw: cls.SGD(params, lr=0.1, weight_decay=0.1, **kw),
    "sgd-nesterov": lambda cls, params, **kw: cls.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "sgd-dampening": lambda cls, params, **kw: cls.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "adam": lambda cls, params, **kw: cls.Adam(params, lr=0.1, weight_decay=0.1, **kw),
    "adam-amsgrad": lambda cls, params, **kw: cls.Adam(params, lr=0.1, amsgrad=True, maximize=True, **kw),
    "adamw": lambda cls, params, **kw: cls.AdamW(params, lr=0.1, **kw),
    "adamw-amsgrad": lambda cls, params, **kw: cls.AdamW(params, lr=0.1, amsgrad=True, **kw),
    # An eps above the root of the smallest float16: squares of small gradients have few digits there.
    "rmsprop": lambda cls, params, **kw: cls.RMSprop(params, lr=0.01, eps=0.1, momentum=0.9, **kw),
    "adagrad": lambda cls, params, **kw: cls.Adagrad(params, lr=0.1, lr_decay=0.1, **kw),
    "adadelta": lambda cls, params, **kw: cls.Adadelta(params, lr=1.0, **kw),
    "adamax": lambda cls, params, **kw: cls.Adamax(params, lr=0.1, **kw),
    "nadam": lambda cls, params, **kw: cls.NAdam(params, lr=0.1, **kw),
    "radam": lambda cls, params, **kw: cls.RAdam(params, lr=0.1, betas=(0.5, 0.9), **kw),
    "lamb": lambda cls, params, **kw: cls.LAMB(params, lr=0.1, eps=0.1, **kw),
    "lars": lambda cls, params, **kw: cls.LARS(params, lr=0.1, momentum=0.9, trust_coefficient=0.5, **kw),
}
CLIPS = [None, GlobalNorm(1.0), GlobalNorm(1.0, 3.5), GlobalNorm(1.0, math.inf), TensorNorm(0.5), Value(0.3)]
CLIPS += [Normalize("tensor"), Normalize("global")]
# Numbers around one after four steps of some ten float32 roundings, of which a GPU fuses some and divides to two ulps;
# narrow dtypes round each stored value once more a step, and a tie may fall either way.
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def values(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = [(300, 70), (1025,), (), (2, 3, 4), (1,), (4096,), (0,)]
    made = [torch.randn(s, generator=generator).to(dtype).cuda() for s in shapes]
    made.append(torch.randn(60, 8, generator=generator).to(dtype).cuda()[:, ::2])  # strides with gaps
    made.append(torch.randn(40, 50, generator=generator).to(dtype).cuda().t())
    made.append(torch.randn(8, 3, 5, 5, generator=generator).to(dtype).cuda().to(memory_format=torch.channels_last))
    return made


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v) for v in values(dtype)]


def give(params: list[torch.nn.Parameter], i: int, bad: float | None = None) -> None:
    generator = torch.Generator().manual_seed(70 + i)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype).cuda()
    if bad is not None:
        params[1].grad.view(-1)[-1] = bad  # type: ignore[union-attr]


def run(name: str, backend: str, dtype: torch.dtype = torch.float32, steps: int = 4, **options: Any) -> tuple[Any, Any]:
    params = make_params(dtype)
    optimizer = MAKERS[name](fusedlr, params, backend=backend, **options)
    for i in range(steps):
        give(params, i)
        optimizer.step()
    return optimizer, params


def everything(optimizer: Any, params: list[torch.nn.Parameter]) -> list[Tensor]:
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def assert_close(a: tuple[Any, Any], b: tuple[Any, Any], dtype: torch.dtype) -> None:
    for x, y in zip(everything(*a), everything(*b), strict=True):
        torch.testing.assert_close(x, y, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("name", MAKERS)
def test_the_kernels_are_the_reference(name: str, clip: Any) -> None:
    schedule = schedules.Warmup(2).then(schedules.Cosine(6, min_lr=0.0))
    ours = run(name, "triton", clip=clip, schedule=schedule)
    reference = run(name, "torch", clip=clip, schedule=schedule)
    assert_close(ours, reference, torch.float32)
    assert ours[0].last_lr == reference[0].last_lr
    if clip is not None and clip.scope is not None:
        torch.testing.assert_close(ours[0].last_grad_norm, reference[0].last_grad_norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "in-place"])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_all_dtypes(name: str, dtype: torch.dtype, flatten: bool) -> None:
    options: dict[str, Any] = {"clip": 1.0, "flatten": flatten}
    if dtype == torch.float16 and name.startswith(("adam", "nadam", "radam")) and name != "adamax":
        options["eps"] = 0.1  # as for RMSprop
    ours, reference = (run(name, b, dtype, **options) for b in ("triton", "torch"))
    assert_close(ours, reference, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("lamb", "lars")])  # torch has neither
def test_torch_optim(name: str, dtype: torch.dtype) -> None:
    ours = run(name, "triton", dtype, clip=1.0)
    params = [torch.nn.Parameter(v) for v in values(dtype)]
    oracle = MAKERS[name](torch.optim, params, foreach=False)
    for i in range(4):
        give(params, i)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        oracle.step()
    # torch rounds NAdam's mu_product to float32 before it uses it.
    rtol = RTOL[torch.float32 if name == "nadam" else dtype]
    for p, q in zip(ours[1], params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)


def test_auto_is_triton_and_says_so() -> None:
    assert "triton for cuda tensors" in repr(fusedlr.AdamW(make_params()))


def test_several_dtypes_rules_and_groups_at_once() -> None:
    outcomes = []
    for backend in ("triton", "torch"):
        params = [p for dtype in RTOL for p in make_params(dtype)]
        groups = [{"params": params[i::3], "lr": 0.02 * (i + 1), "amsgrad": i == 1} for i in range(3)]
        optimizer = fusedlr.AdamW(groups, clip=1.0, backend=backend)
        for i in range(3):
            give(params, i)
            optimizer.step()
        outcomes.append((optimizer, params))
    (ours, mine), (reference, theirs) = outcomes
    for p, q in zip(mine, theirs, strict=True):
        # One norm for all: what float32 sums in it are off by reaches the float64 parameters too.
        rtol = max(RTOL[p.dtype], 1e-6)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(ours.last_grad_norm, reference.last_grad_norm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("numel", [5_000_001, 40_000_003])
def test_tensors_of_many_large_chunks(numel: int) -> None:
    outcomes = []
    for backend in ("triton", "torch"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, numel, device="cuda"))
        p.grad = torch.linspace(2, -3, numel, device="cuda")
        optimizer = fusedlr.AdamW([p], lr=0.1, clip=1.0, backend=backend)
        optimizer.step()
        outcomes.append((optimizer, [p]))
    assert_close(*outcomes, torch.float32)
    torch.testing.assert_close(outcomes[0][0].last_grad_norm, outcomes[1][0].last_grad_norm, rtol=2e-6, atol=0)


def test_two_thousand_tensors() -> None:
    outcomes = []
    for backend in ("triton", "torch"):
        params = [torch.nn.Parameter(torch.full((n % 97 + 1,), 0.5, device="cuda")) for n in range(2000)]
        for n, p in enumerate(params):
            p.grad = torch.full_like(p, 0.001 * n)
        optimizer = fusedlr.AdamW(params, lr=0.1, clip=TensorNorm(1.0), backend=backend)
        optimizer.step()
        outcomes.append((optimizer, params))
    assert_close(*outcomes, torch.float32)


def test_the_same_bits_on_every_run() -> None:
    runs = [everything(*run("adamw", "triton", clip=1.0)) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("offset", [1, 2, 5])
def test_gradients_and_parameters_at_odd_addresses(offset: int) -> None:
    outcomes = []
    for backend in ("triton", "torch"):
        buffer, grads = (torch.linspace(-1, k, 3000, device="cuda") for k in (1, 2))
        p = torch.nn.Parameter(buffer[offset:2500])
        p.grad = grads[offset:2500]
        optimizer = fusedlr.AdamW([p], lr=0.1, clip=0.5, backend=backend)
        optimizer.step()
        outcomes.append((optimizer, [p, buffer]))
    assert_close((outcomes[0][0], outcomes[0][1][:1]), (outcomes[1][0], outcomes[1][1][:1]), torch.float32)
    torch.testing.assert_close(outcomes[0][1][1], outcomes[1][1][1], rtol=1e-5, atol=1e-5)


def test_the_watch_sees_waits() -> None:
    x = torch.ones((), device="cuda")
    with never_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_no_step_waits(clip: Any, backend: str, nonfinite: str) -> None:
    params = make_params()
    lr = torch.tensor(0.1, device="cuda") if backend == "triton" else 0.1
    schedule = None if nonfinite == "skip" and backend == "torch" else {"weight_decay": schedules.Linear(9, 1.0, 0.0)}
    optimizer = fusedlr.AdamW(params, lr=lr, clip=clip, backend=backend, nonfinite=nonfinite, schedule=schedule)
    for i in range(4):  # the first one too, which makes plan and state
        give(params, i)
        with never_waiting():
            optimizer.step()
            optimizer.zero_grad()
    assert int(optimizer.state[params[0]]["step"]) == 4


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw"])
def test_a_captured_step_replays_with_a_moving_schedule(name: str, nonfinite: str) -> None:
    warm, replays = 2, 5
    scheduled = {
        "lr": schedules.Warmup(3).then(schedules.Cosine(6, min_lr=0.0)),
        "weight_decay": schedules.Linear(8, 1.0, 0.1),
        "max_norm": schedules.Linear(8, 1.0, 0.2),
    }
    eager, theirs = run(name, "triton", steps=warm + replays, clip=1.0, schedule=scheduled, nonfinite=nonfinite)

    optimizer, params = run(name, "triton", steps=0, clip=1.0, schedule=scheduled, nonfinite=nonfinite)
    give(params, 0)
    fixed = [p.grad for p in params]

    def fill(i: int) -> None:
        give(params, i)
        for p, g in zip(params, fixed, strict=True):
            g.copy_(p.grad)  # type: ignore[union-attr, arg-type]
            p.grad = g

    for i in range(warm):
        fill(i)
        optimizer.step()
    torch.cuda.synchronize()
    before = [t.clone() for t in everything(optimizer, params)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(optimizer, params), before, strict=True))
    for i in range(warm, warm + replays):
        fill(i)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(everything(optimizer, params), everything(eager, theirs), strict=True):
        assert torch.equal(a, b)  # the same kernels on the same numbers
    assert torch.equal(optimizer.last_grad_norm, eager.last_grad_norm)


@pytest.mark.parametrize("clip", [None, GlobalNorm(1.0), TensorNorm(0.5), Value(0.3)], ids=repr)
def test_skipped_steps_leave_no_trace_and_do_not_advance_the_schedule(clip: Any) -> None:
    schedule = schedules.Warmup(2).then(schedules.Cosine(6, min_lr=0.0))
    straight, theirs = run("adamw", "triton", steps=3, clip=clip, schedule=schedule, nonfinite="skip")
    optimizer, params = run("adamw", "triton", steps=0, clip=clip, schedule=schedule, nonfinite="skip")
    for i, bad in ((0, None), (1, math.nan), (1, None), (2, math.inf), (2, -math.inf), (2, None)):
        give(params, i, bad)
        optimizer.step()
    for a, b in zip(everything(optimizer, params), everything(straight, theirs), strict=True):
        assert torch.equal(a, b)
    assert optimizer.skipped_steps.device.type == "cuda" and int(optimizer.skipped_steps) == 3
    marks = optimizer.state_dict()["param_groups"][0]["fusedlr"]
    assert marks["t"] == 3 and marks["skipped_steps"] == 3
    # The host has learnt of the skipped steps by now, and its schedule is where the device's is.
    assert optimizer.next_lr() == straight.next_lr()


def test_news_of_skipped_steps_arrive_by_themselves() -> None:
    optimizer, params = run("adamw", "triton", steps=0, schedule=schedules.Cosine(50, min_lr=0.0), nonfinite="skip")
    for i in range(6):
        give(params, i, math.nan if i < 3 else None)
        optimizer.step()
        torch.cuda.synchronize()
    give(params, 6)
    optimizer.step()
    assert optimizer.steps_taken == 4
    assert optimizer.last_lr == [schedules.Cosine(50, min_lr=0.0)(3, 0.1)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_raise_changes_nothing(backend: str) -> None:
    params = make_params()
    optimizer = fusedlr.AdamW(params, clip=1.0, nonfinite="raise", backend=backend)
    before = [p.detach().clone() for p in params]
    give(params, 0, math.nan)
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        optimizer.step()
    assert all(torch.equal(p.detach(), v) for p, v in zip(params, before, strict=True))
    assert optimizer.state_dict()["state"] == {}


def test_norms_keep_their_range() -> None:
    for value in (1e20, 1e-30, 1e-45):
        p = torch.nn.Parameter(torch.zeros(3000, device="cuda"))
        p.grad = torch.full_like(p, value)
        for norm_type in (1.0, 2.0, 3.5, math.inf):
            optimizer = fusedlr.SGD([p], lr=0.0, clip=GlobalNorm(1.0, norm_type), backend="triton")
            optimizer.step()
            wanted = float(p.grad[0]) * 3000 ** (1 / norm_type)
            smallest = 1.5e-45  # of float32: the least numbers have few digits
            norm = float(optimizer.last_grad_norm)  # type: ignore[arg-type]
            assert norm == pytest.approx(wanted, rel=2e-6, abs=smallest)


def test_a_model_that_moves_to_the_gpu_after_the_optimizer_was_made() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    twin = copy.deepcopy(model).cuda()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.1)
    model.cuda()
    reference = torch.optim.AdamW(twin.parameters(), lr=0.1, foreach=False)
    for m, o in ((model, optimizer), (twin, reference)):
        for _ in range(3):
            m(torch.ones(4, 8, device="cuda")).square().sum().backward()
            o.step()
            o.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # three steps of a model amplify what rounds


def test_another_stream() -> None:
    expected = everything(*run("adamw", "triton", clip=1.0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = everything(*run("adamw", "triton", clip=1.0))
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_cpu_and_gpu_parameters_share_an_optimizer_but_no_norm() -> None:
    here, there = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5, device="cuda"))
    here.grad, there.grad = torch.ones(5), torch.ones(5, device="cuda")
    fusedlr.SGD([here, there], lr=0.25).step()
    assert here.tolist() == there.tolist() == [0.75] * 5
    with pytest.raises(ValueError, match="one kind of device"):
        fusedlr.SGD([here, there], lr=0.25, clip=1.0).step()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")
def test_one_norm_over_two_gpus() -> None:
    params = [torch.nn.Parameter(torch.zeros(50, device=f"cuda:{i}")) for i in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedlr.SGD(params, lr=1.0, clip=1.0, backend="triton")
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(10.0)  # type: ignore[arg-type]
    for p in params:
        assert p.tolist() == pytest.approx([-0.1] * 50, rel=2e-6)


def one_launch(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", str(int(asked)))


# Each row is two compilations of many seconds: every clip, rule and dtype once, not each with each.
@pytest.mark.parametrize(
    "name, clip, dtype, nonfinite",
    [("adamw", clip, torch.float32, ("propagate", "skip")[i % 2]) for i, clip in enumerate(CLIPS)]
    + [
        ("sgd-nesterov", GlobalNorm(1.0), torch.float32, "skip"),
        ("sgd-nesterov", None, torch.bfloat16, "propagate"),
        ("adam-amsgrad", TensorNorm(0.5), torch.float16, "skip"),
        ("adamw", GlobalNorm(1.0), torch.bfloat16, "propagate"),
    ],
    ids=str,
)
def test_one_launch_is_three(
    monkeypatch: pytest.MonkeyPatch, name: str, clip: Any, dtype: torch.dtype, nonfinite: str
) -> None:
    outcomes = []
    for asked in (True, False):
        one_launch(monkeypatch, asked)
        scheduled = schedules.Warmup(2).then(schedules.Cosine(6, min_lr=0.0))
        outcomes.append(run(name, "triton", dtype, clip=clip, schedule=scheduled, nonfinite=nonfinite))
        assert (outcomes[-1][0]._plan.executors[0]._barrier is not None) == asked
    (one, mine), (three, theirs) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(everything(one, mine), everything(three, theirs), strict=True))
    assert clip is None or clip.scope is None or torch.equal(one.last_grad_norm, three.last_grad_norm)


@pytest.mark.parametrize("sizes", [(100,), (1000, 7, 2000), (300_000,) * 3, (40_000_003,)], ids=str)
def test_one_launch_many_times(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    """A barrier that lets somebody through too early shows in one step of many, if at all: so there are many."""
    outcomes = []
    for asked in (True, False):
        one_launch(monkeypatch, asked)
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n, device="cuda")) for n in sizes]
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer = fusedlr.AdamW(params, lr=0.01, clip=1.0, schedule=schedules.Cosine(3000), backend="triton")
        norms = []
        for i in range(2000 if sum(sizes) < 10**6 else 100):
            for p in params:
                # Every step has another norm, and a stale row or partial another result.
                torch.sin(p.detach() * (1.0 + i), out=p.grad)
            optimizer.step()
            norms.append(optimizer.last_grad_norm.clone())  # type: ignore[union-attr]
        outcomes.append((everything(optimizer, params), torch.stack(norms)))
    (mine, my_norms), (theirs, their_norms) = outcomes
    assert torch.equal(my_norms, their_norms)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_one_launch_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for asked in (True, False):
        one_launch(monkeypatch, asked)
        optimizer, params = run("adamw", "triton", steps=2, clip=1.0, schedule=schedules.Cosine(500, min_lr=0.0))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(300):
            graph.replay()
        for i in range(2):  # and eagerly again, from where the barrier stands
            give(params, i)
            optimizer.step()
        outcomes.append(everything(optimizer, params))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_one_launch_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one_launch(monkeypatch, True)
    optimizer, params = run("adamw", "triton", steps=0, clip=1.0)
    for i in range(3):
        give(params, i)
        with never_waiting():
            optimizer.step()
