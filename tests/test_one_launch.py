"""The whole step in one launch (FUSEDLR_ONE_LAUNCH=1): the same bits as three launches, in the interpreter.

The interpreter runs one program after the other, so a barrier of several would never open: the kernel runs whole as a
grid of one, and for larger grids in two passes, up to the barrier and behind it.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
from cases import BY_NAME, CASES, CLIPS, dtype_name
from fusedlr.kernels import launch

import fusedlr
from fusedlr import clipping, schedules

# Its functions are replaced below; the name `step` in the package would be the kernel.
step_module: Any = importlib.import_module("fusedlr.kernels.step")

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETED, reason="tests/test_gpu.py holds the compiled kernel"),
    # Triton's interpreter computes with numpy, which warns of what non-finite gradients do on purpose.
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]
SIZES = (2500, 7, 1, 0, 1024)


def params_of(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in SIZES]
    strided = torch.randn(6, 8, generator=generator).to(dtype)[:, ::2]
    return [*params, torch.nn.Parameter(strided)]


class Outcome:
    """Some steps, and everything that they wrote."""

    def __init__(self, case: Any, dtype: torch.dtype = torch.float32, bad: int | None = None, **options: Any) -> None:
        self.params = params_of(dtype)
        schedule = {"lr": schedules.Warmup(2).then(schedules.Cosine(6, min_lr=0.0))}
        self.optimizer = case.make(self.params, backend="triton", schedule=schedule, **options)
        for i in range(3):
            generator = torch.Generator().manual_seed(40 + i)
            for p in self.params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if i == bad:
                self.params[0].grad[-1] = math.nan  # type: ignore[index]
            self.optimizer.step()

    @property
    def bucket(self) -> Any:
        (bucket,) = self.optimizer._plan.executors[0]._buckets  # type: ignore[union-attr, attr-defined]
        return bucket

    def tensors(self) -> list[Tensor]:
        held = [t for p in self.params for t in (p.detach(), *self.optimizer.state[p].values())]
        norm = self.optimizer.last_grad_norm
        clock = list(self.optimizer._clocks.values())
        return [*held, *clock, self.bucket.rows, self.bucket.skip, *([] if norm is None else [norm])]


def assert_same_bits(one: Outcome, three: Outcome) -> None:
    for a, b in zip(one.tensors(), three.tensors(), strict=True):
        assert torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
    assert one.optimizer.last_lr == three.optimizer.last_lr
    assert one.optimizer.steps_taken == three.optimizer.steps_taken


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the same steps by three launches and by one; no launch of the other kind may happen."""

    def forbid(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a launch of the other kind")

    def compare(case: Any, *args: Any, **options: Any) -> tuple[Outcome, Outcome]:
        outcomes = []
        for asked, others in (("1", ["launch_measure", "launch_decide", "launch_apply"]), ("0", ["launch_step"])):
            with monkeypatch.context() as patch:
                patch.setenv("FUSEDLR_ONE_LAUNCH", asked)
                for name in others:
                    patch.setattr(launch, name, forbid)
                outcomes.append(Outcome(case, *args, **options))
        assert_same_bits(*outcomes)
        return outcomes[0], outcomes[1]

    return compare


@pytest.mark.parametrize("case", [case for case in CASES if not case.trust], ids=str)
def test_every_rule(both: Any, case: Any) -> None:
    both(case, clip=1.0)


@pytest.mark.parametrize("name", ["lamb-default", "lars-default"])
def test_a_rule_with_a_trust_ratio_takes_its_own_launches(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", "1")
    monkeypatch.setattr(launch, "launch_step", None)
    Outcome(BY_NAME[name], clip=1.0)


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_every_clip(both: Any, clip: Any) -> None:
    both(BY_NAME["adamw-default"], clip=clip)


@pytest.mark.parametrize("clip", [clipping.AGC(0.05), clipping.ZClip(), clipping.AutoClip()], ids=repr)
def test_clips_with_a_record_take_the_separate_launches(monkeypatch: pytest.MonkeyPatch, clip: Any) -> None:
    monkeypatch.setattr(launch, "launch_step", None)
    outcomes = []
    for asked in "10":
        monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", asked)
        outcomes.append(Outcome(BY_NAME["adamw-default"], clip=clip))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-default"])
def test_narrow_dtypes(both: Any, name: str, dtype: torch.dtype) -> None:
    both(BY_NAME[name], dtype, clip=1.0)


@pytest.mark.parametrize("clip", [None, 1.0, fusedlr.clipping.TensorNorm(1.0)], ids=repr)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_non_finite_gradients(both: Any, nonfinite: str, clip: Any) -> None:
    one, _ = both(BY_NAME["adam-amsgrad"], bad=1, clip=clip, nonfinite=nonfinite)
    assert int(one.optimizer.skipped_steps) == (nonfinite == "skip")
    assert bool(one.params[0].isnan().any()) == (nonfinite == "propagate")


def test_a_step_that_may_raise_takes_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", "1")
    monkeypatch.setattr(launch, "launch_step", None)
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        Outcome(BY_NAME["adamw-default"], bad=0, nonfinite="raise")


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float32, torch.bfloat16)], ids=str)
def test_float64_and_several_buckets_take_three_launches(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", "1")
    monkeypatch.setattr(launch, "launch_step", None)
    params = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in dtypes]
    for p in params:
        p.grad = torch.ones_like(p)
    fusedlr.SGD(params, lr=0.5, clip=1e9, backend="triton").step()
    assert all(p.tolist() == [0.5] * 5 for p in params)


def test_nothing_to_apply_takes_no_step_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", "1")
    monkeypatch.setattr(launch, "launch_step", None)
    empty = torch.nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    optimizer = fusedlr.AdamW([empty], clip=1.0, backend="triton")
    optimizer.step()
    assert int(optimizer.state[empty]["step"]) == 1


def test_the_environment_is_read_when_the_steps_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_ONE_LAUNCH", "1")
    one = Outcome(BY_NAME["adamw-default"])
    monkeypatch.delenv("FUSEDLR_ONE_LAUNCH")
    monkeypatch.setattr(launch, "launch_apply", None)
    one.optimizer.step()
    # Three steps and one more; each adds an arrival and a release.
    assert one.optimizer._plan.executors[0]._barrier.tolist() == [8]  # type: ignore[union-attr, attr-defined]


@pytest.mark.parametrize("clip", [None, 1.0, fusedlr.clipping.TensorNorm(1.0)], ids=repr)
@pytest.mark.parametrize("n_programs", [2, 3, 4, 5])
def test_any_grid_up_to_the_barrier_and_behind_it(
    monkeypatch: pytest.MonkeyPatch, both: Any, n_programs: int, clip: Any
) -> None:
    """The kernel itself, its waiting left out: all programs before the barrier, then all programs behind it."""
    run = launch.launch_step
    parts = {name: getattr(step_module, name) for name in ("measure_share", "apply_share", "arrive", "decide", "wait")}
    before: list[int] = []

    def in_two_passes(barrier: Tensor, *args: Any, **kwargs: Any) -> None:
        before.append(int(barrier))
        decided: list[bool] = []

        def note(*args: Any) -> None:
            decided.append(True)
            parts["decide"](*args)

        def nothing(*args: Any) -> None:
            return None

        with monkeypatch.context() as patch:
            patch.setattr(launch, "_programs_at_once", lambda device: n_programs)
            patch.setattr(step_module, "wait", nothing)
            patch.setattr(step_module, "decide", note)
            patch.setattr(step_module, "apply_share", nothing)
            run(barrier, *args, **kwargs)
            assert decided == [True]
            assert int(barrier) == before[-1] + n_programs + 1
            patch.setattr(step_module, "measure_share", nothing)
            patch.setattr(step_module, "arrive", lambda barrier_ptr, n: (0, False))
            patch.setattr(step_module, "apply_share", parts["apply_share"])
            run(barrier, *args, **kwargs)

    monkeypatch.setattr(launch, "launch_step", in_two_passes)
    # `both` forbids launch_step while it runs three launches, and finds the one above otherwise.
    one, _ = both(BY_NAME["adamw-default"], clip=clip)
    assert one.bucket.n_chunks == 7  # more than any grid here, and a multiple of none
    assert before == [0, n_programs + 1, 2 * (n_programs + 1)]


def test_gradients_are_measured_in_the_blocks_of_measure_whatever_apply_takes() -> None:
    """Blocks of another size would add up in another order, to other bits than those of three launches."""
    narrow, state = torch.bfloat16, (torch.float32, torch.float32)
    measure = launch.measure_constants(narrow, 0, 5)
    apply = launch.apply_constants(
        "adamw", "AdamHyper", clamp=False, dtype=narrow, grad_dtype=narrow, state_dtypes=state
    )
    constants = launch.step_constants(measure, {}, apply)
    assert (constants["MEASURE_BLOCK"], constants["BLOCK"]) == (launch.BLOCK, launch.HALF_BLOCK)


@triton.jit
def meet(barrier_ptr, released_ptr, last_ptr):
    released, is_last = step_module.arrive(barrier_ptr, tl.num_programs(0))
    tl.store(released_ptr + tl.program_id(0), released)
    tl.store(last_ptr + tl.program_id(0), is_last.to(tl.int32))
    if is_last:
        step_module.release(barrier_ptr)
        step_module.wait(barrier_ptr, released)


@pytest.mark.parametrize("n_programs", [1, 2, 7, 660])
def test_the_last_of_each_launch_releases_the_others_and_nothing_is_reset(n_programs: int) -> None:
    start = 2**40 // (n_programs + 1) * (n_programs + 1)  # beyond 32 bits
    barrier = torch.tensor([start])
    for _ in range(3):
        released, last = torch.zeros(n_programs, dtype=torch.int64), torch.zeros(n_programs, dtype=torch.int32)
        meet[(n_programs,)](barrier, released, last)
        start += n_programs + 1
        assert barrier.tolist() == [start]
        assert released.tolist() == [start] * n_programs
        assert last.tolist() == [0] * (n_programs - 1) + [1]


def test_every_chunk_belongs_to_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of the two shares, run as the Python that they also are."""
    seen: list[int] = []
    monkeypatch.setattr(step_module, "measure_chunk", lambda s, c, p, o, f, chunk, *rest: seen.append(chunk))
    monkeypatch.setattr(step_module, "apply_chunk", lambda s, c, r, skip, chunk, *rest: seen.append(chunk))
    for n_chunks in [*range(1, 30), 1000, 4096]:
        for n_programs in [n for n in (1, 2, 3, 5, 16, 29, 660) if n <= n_chunks]:
            measured, applied = [], []
            for program in range(n_programs):
                seen.clear()
                step_module.measure_share.fn(program, n_programs, *[None] * 5, n_chunks, *[None] * 6)
                mine = list(seen)
                seen.clear()
                step_module.apply_share.fn(program, n_programs, *[None] * 4, n_chunks, *[None] * 15)
                assert seen == mine[::-1]
                measured += mine
                applied += seen
            assert sorted(measured) == sorted(applied) == list(range(n_chunks))
