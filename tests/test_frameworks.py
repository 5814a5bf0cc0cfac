"""What stands around an optimizer in training scripts: mixed precision, averaging, distributed wrappers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from training import CLOSE, COSINE, assert_same_model, gradients, make_model, train

import fusedlr
from fusedlr import clipping

# Gradients computed by two models that differ by roundings differ by roundings as well; a few steps add them up.
LOOSE = {"rtol": 2e-5, "atol": 2e-5}


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def make_pair(**own: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    """The same model twice, with fusedlr and with torch."""
    model = make_model()
    other = copy.deepcopy(model)
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.02, **own)
    return model, optimizer, other, torch.optim.AdamW(other.parameters(), lr=0.02)


# ---- mixed precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [False, True], ids=["disabled", "enabled"])
def test_a_grad_scaler_steps_the_unscaled_gradients(enabled: bool, seed: int) -> None:
    model, optimizer, other, oracle = make_pair()
    scalers = [torch.amp.GradScaler("cpu", enabled=enabled, init_scale=256.0) for _ in range(2)]
    for step in range(4):
        for m, o, scaler in ((model, optimizer, scalers[0]), (other, oracle, scalers[1])):
            o.zero_grad()
            scaler.scale(m(batch(step)).square().mean()).backward()
            scaler.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            scaler.step(o)
            scaler.update()
    assert optimizer.steps_taken == 4
    assert_same_model(model, other, **LOOSE)


def test_a_grad_scaler_leaves_out_a_step_with_an_inf(seed: int) -> None:
    model = make_model()
    optimizer = fusedlr.AdamW(model.parameters(), lr=0.02, schedule=COSINE)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model(batch(0)).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert optimizer.steps_taken == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_autocast_with_float32_parameters(seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    optimizer = fusedlr.SGD(model.parameters(), lr=0.1, momentum=0.9)
    oracle = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        for m, o in ((model, optimizer), (other, oracle)):
            o.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = m(batch(step)).float().square().mean()
            loss.backward()
            o.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.dtype == torch.float32
        # A difference in the last place may turn the rounding of a weight to bfloat16, 1 in 2**8 of it.
        moved = float((q.detach() - start[name]).abs().max())
        assert float((p - q).detach().abs().max()) <= 2**-5 * moved, name


# ---- gradients that others prepare ------------------------------------------------------------------------------


def test_clip_grad_norm_before_a_step(seed: int) -> None:
    model, optimizer, other, oracle = make_pair()
    for step in range(4):
        for m, o in ((model, optimizer), (other, oracle)):
            gradients(m, step)
            nn.utils.clip_grad_norm_(m.parameters(), 0.3)
            o.step()
    assert_same_model(model, other, **CLOSE)


def test_accumulated_gradients(seed: int) -> None:
    model, optimizer, other, oracle = make_pair(clip=clipping.GlobalNorm(0.5))
    for step in range(3):
        for m, o in ((model, optimizer), (other, oracle)):
            o.zero_grad(set_to_none=False)
            for part in range(3):
                m(batch(10 * step + part)).square().mean().backward()
            if o is oracle:
                nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            o.step()
    assert_same_model(model, other, **LOOSE)


# ---- averages of weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_an_averaged_model_follows(kind: str, seed: int) -> None:
    model, optimizer, other, oracle = make_pair()
    multi_avg = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    averages = [AveragedModel(m, multi_avg_fn=multi_avg) for m in (model, other)]
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        averages[0].update_parameters(model)
        averages[1].update_parameters(other)
    assert_same_model(averages[0].module, averages[1].module, **CLOSE)
    assert not any(torch.equal(p, q) for p, q in zip(averages[0].parameters(), model.parameters(), strict=True))
    update_bn([batch(0)], averages[0])


def test_swa_lr_anneals_the_lr(seed: int) -> None:
    model, optimizer, other, oracle = make_pair()
    schedulers = [SWALR(o, swa_lr=0.1, anneal_epochs=3) for o in (optimizer, oracle)]
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        train(other, oracle, range(step, step + 1))
        for scheduler in schedulers:
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == oracle.param_groups[0]["lr"]
    assert_same_model(model, other, **CLOSE)


# ---- one process of torch.distributed ---------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("order", ["optimizer first", "DDP first"])
@pytest.mark.parametrize("bucket_view", [True, False], ids=["bucket views", "own gradients"])
@pytest.mark.usefixtures("one_process")
def test_ddp(bucket_view: bool, order: str, seed: int) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    if order == "optimizer first":
        optimizer = fusedlr.AdamW(model.parameters(), lr=0.02, clip=0.5)
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        optimizer = fusedlr.AdamW(wrapped.parameters(), lr=0.02, clip=0.5)
    oracle = torch.optim.AdamW(other.parameters(), lr=0.02)
    for step in range(4):
        for m, o in ((wrapped, optimizer), (other, oracle)):
            o.zero_grad(set_to_none=step % 2 == 0)
            m(batch(step)).square().mean().backward()
        if bucket_view and step:  # DDP hands out the views from its first reduction on
            storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
            assert len(storages) == 1, "the gradients are not views of one bucket"
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        oracle.step()
    assert_same_model(model, other, **LOOSE)


@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer_hands_our_arguments_on(seed: int) -> None:
    """torch's ZeRO writes the constructor's arguments into the param groups; on one rank it owns everything."""
    model = make_model()
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of torch's own deprecations
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=fusedlr.AdamW, lr=0.02, schedule=COSINE, clip=0.5, backend="torch"
        )
    oracle = torch.optim.AdamW(other.parameters(), lr=0.02)
    for step in range(5):
        gradients(model, step)
        gradients(other, step)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        oracle.param_groups[0]["lr"] = COSINE(step, 0.02)
        optimizer.step()
        oracle.step()
    assert isinstance(optimizer.optim, fusedlr.AdamW)
    assert optimizer.optim.last_lr == [COSINE(4, 0.02)]
    assert_same_model(model, other, **CLOSE)
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()
    again = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=fusedlr.AdamW, lr=0.02, schedule=COSINE, clip=2.0, nonfinite="skip"
    )
    again.load_state_dict(saved)  # puts the state into the optimizer's by hand
    gradients(model, 5)
    gradients(other, 5)
    nn.utils.clip_grad_norm_(other.parameters(), 2.0)  # what the constructor said
    oracle.param_groups[0]["lr"] = COSINE(5, 0.02)
    again.step()
    oracle.step()
    assert again.optim.last_lr == [COSINE(5, 0.02)] and again.optim.steps_taken == 6
    assert_same_model(model, other, **CLOSE)
