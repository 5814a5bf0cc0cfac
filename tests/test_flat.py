"""Flat buffers: what moves, where to, and what it costs; what is left where it is."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusedlr
from fusedlr import flat
from fusedlr.flat import aligned

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MiB = 1 << 20


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape).to(dtype))


def optimizer_of(params: list[torch.nn.Parameter], **options: object) -> fusedlr.AdamW:
    return fusedlr.AdamW(params, backend="torch", **options)  # type: ignore[arg-type]


def stepped(params: list[torch.nn.Parameter], **options: object) -> fusedlr.AdamW:
    optimizer = optimizer_of(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def pointers(params: list[torch.nn.Parameter]) -> list[int]:
    return [p.data_ptr() for p in params]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000])
def test_aligned_is_a_multiple_of_16_elements_and_128_bytes(numel: int, dtype: torch.dtype) -> None:
    size = aligned(numel, dtype)
    assert size >= numel and size - numel < max(16, 128 // dtype.itemsize)
    assert size % 16 == 0 and size * dtype.itemsize % 128 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_lie_in_one_piece_one_after_the_other(dtype: torch.dtype) -> None:
    params = [parameter(n, dtype=dtype) for n in (1, 17, 300, 64, 5)]
    values = [p.detach().clone() for p in params]
    homes = flat.rehome(params)
    assert [id(p) in homes for p in params] == [True] * 5
    piece, start = homes[id(params[0])].piece, 0
    for p, value in zip(params, values, strict=True):
        home = homes[id(p)]
        assert home.piece is piece and home.start == start
        assert p.data_ptr() == piece.data_ptr() + start * p.element_size()
        assert torch.equal(p.detach(), value)
        start += aligned(p.numel(), dtype)
    assert piece.numel() == start


def test_state_is_flat_and_aligned_wherever_the_parameters_are() -> None:
    for flatten in (True, False):
        params = [parameter(n) for n in (1, 17, 300, 64, 5)]
        optimizer = stepped(params, flatten=flatten)
        for key in ("exp_avg", "exp_avg_sq"):
            places = [optimizer.state[p][key].data_ptr() for p in params]
            sizes = [aligned(p.numel(), p.dtype) * 4 for p in params]
            assert [place - places[0] for place in places] == [sum(sizes[:i]) for i in range(5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_and_state_begin_at_multiples_of_128_bytes(dtype: torch.dtype) -> None:
    """Whatever lies before them: a CPU allocates by 64 bytes."""
    kept = []
    for n in range(1, 40):
        params = [parameter(n, dtype=dtype), parameter(3, dtype=dtype)]
        optimizer = stepped(params)
        kept += [optimizer, torch.empty(16 * n)]
        arrays = [x for p in params for x in (p, *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")))]
        assert [x.data_ptr() % 128 for x in arrays] == [0] * 6


def test_the_padding_between_state_stays_zero() -> None:
    params = [parameter(n) for n in (1, 17, 300)]
    optimizer = stepped(params)
    for slot in optimizer._leaves[0].bank.slots:  # type: ignore[union-attr]
        inside = torch.zeros_like(slot, dtype=torch.bool)
        for leaf in optimizer._leaves:
            inside[leaf.bank_start : leaf.bank_start + leaf.numel] = True
        assert slot[inside].all() and not slot[~inside].any()


def test_every_dtype_has_its_own_piece() -> None:
    params = [parameter(20, dtype=d) for d in DTYPES for _ in range(2)]
    homes = flat.rehome(params)
    assert len({id(homes[id(p)].piece) for p in params}) == len(DTYPES)


@pytest.mark.parametrize("megabytes", [1, 4, 40])
def test_pieces_are_an_eighth_of_the_model_and_at_least_a_mebibyte(megabytes: int) -> None:
    params = [parameter(100, 256) for _ in range(megabytes * 10)]  # 100 KiB each
    total = sum(p.numel() for p in params) * 4
    pieces = {id(h.piece): h.piece for h in flat.rehome(params).values()}.values()
    limit = max(MiB, total // 8)
    assert all(piece.numel() * 4 <= limit for piece in pieces)
    assert sum(piece.numel() for piece in pieces) * 4 == total
    assert len(pieces) <= -(-total // (limit - 100 * 1024))


def test_a_piece_is_never_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "_PIECE_BYTES", 2 * MiB)
    params = [parameter(100, 256) for _ in range(400)]
    assert max(h.piece.numel() * 4 for h in flat.rehome(params).values()) <= 2 * MiB


def test_a_tensor_as_large_as_a_piece_stays() -> None:
    large, small = parameter(512, 1024), parameter(3)
    before = large.data_ptr()
    optimizer = stepped([large, small])
    assert large.data_ptr() == before
    assert [leaf.home is None for leaf in optimizer._leaves] == [True, False]


def test_strides_are_kept() -> None:
    model = torch.nn.Conv2d(3, 8, 5).to(memory_format=torch.channels_last)
    turned = torch.nn.Parameter(torch.randn(4, 6).t())
    params = [model.weight, model.bias, turned]
    strides, values = [p.stride() for p in params], [p.detach().clone() for p in params]
    before = pointers(params)
    optimizer_of(params)
    assert [p.stride() for p in params] == strides
    assert model.weight.is_contiguous(memory_format=torch.channels_last) and not turned.is_contiguous()
    assert all(torch.equal(p.detach(), v) for p, v in zip(params, values, strict=True))
    assert all(a != b for a, b in zip(pointers(params), before, strict=True))


def test_every_parameter_and_state_has_a_storage_of_its_own() -> None:
    params = [parameter(n) for n in (1, 17, 300)]
    optimizer = stepped(params)
    for p in params:
        for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"], optimizer.state[p]["step"]):
            assert t.untyped_storage().nbytes() == t.numel() * 4
            assert t.storage_offset() == 0
    assert len({p.untyped_storage().data_ptr() for p in params}) == 3


def test_a_piece_lives_as_long_as_any_of_its_tensors() -> None:
    params = [torch.nn.Parameter(torch.full((50,), float(i))) for i in range(3)]
    optimizer = optimizer_of(params)
    kept = params[1]
    del optimizer, params
    gc.collect()
    junk = [torch.full((200,), -1.0) for _ in range(50)]
    assert (kept.detach() == 1.0).all() and len(junk) == 50


def tied() -> tuple[list[torch.nn.Parameter], object]:
    p = parameter(6)
    return [p, torch.nn.Parameter(p.data)], p


def alias() -> tuple[list[torch.nn.Parameter], object]:
    p = parameter(6)
    return [p], p.data[2:4]


def numpy_alias() -> tuple[list[torch.nn.Parameter], object]:
    p = parameter(6)
    return [p], p.detach().numpy()


def part_of_a_buffer() -> tuple[list[torch.nn.Parameter], object]:
    buffer = torch.randn(20)
    return [torch.nn.Parameter(buffer[:6]), torch.nn.Parameter(buffer[8:14])], buffer


def with_gaps() -> tuple[list[torch.nn.Parameter], object]:
    return [torch.nn.Parameter(torch.randn(4, 6)[:, ::2])], None


def expanded() -> tuple[list[torch.nn.Parameter], object]:
    return [torch.nn.Parameter(torch.randn(1, 3).expand(4, 3))], None


def in_shared_memory() -> tuple[list[torch.nn.Parameter], object]:
    p = parameter(6)
    p.share_memory_()
    return [p], None


def from_numpy() -> tuple[list[torch.nn.Parameter], object]:
    array = torch.randn(6).numpy()
    return [torch.nn.Parameter(torch.from_numpy(array))], array


def without_elements() -> tuple[list[torch.nn.Parameter], object]:
    return [parameter(0, 3)], None


def frozen() -> tuple[list[torch.nn.Parameter], object]:
    return [torch.nn.Parameter(torch.randn(6), requires_grad=False)], None


def subclass() -> tuple[list[torch.nn.Parameter], object]:
    class Marked(Tensor):
        pass

    return [torch.nn.Parameter(torch.randn(6).as_subclass(Marked))], None


def buffer_of_a_state_dict() -> tuple[list[torch.nn.Parameter], object]:
    model = torch.nn.Linear(3, 2)
    return list(model.parameters()), model.state_dict()


def storage_in_other_hands() -> tuple[list[torch.nn.Parameter], object]:
    p = parameter(6)
    return [p], p.untyped_storage()


Maker = Callable[[], tuple[list[torch.nn.Parameter], object]]

STAYING: list[Maker] = [
    tied, alias, numpy_alias, part_of_a_buffer, with_gaps, expanded, in_shared_memory, from_numpy, without_elements,
    frozen, subclass, buffer_of_a_state_dict, storage_in_other_hands,
]  # fmt: skip


@pytest.mark.parametrize("make", STAYING, ids=lambda make: make.__name__)
def test_what_others_can_see_is_not_moved(make: Maker) -> None:
    params, watcher = make()
    before = pointers(params)
    optimizer_of([*params, parameter(5)])
    assert pointers(params) == before
    del watcher


@pytest.mark.parametrize("make", [tied, alias, part_of_a_buffer, with_gaps, from_numpy], ids=lambda make: make.__name__)
def test_what_is_not_moved_is_stepped_where_it_lies(make: Maker) -> None:
    params, watcher = make()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    if make is tied:
        twins[1] = torch.nn.Parameter(twins[0].data)
    before = pointers(params)
    optimizer = stepped(params, lr=0.1)
    reference = torch.optim.AdamW(twins, lr=0.1, foreach=False)
    for p in twins:
        p.grad = torch.ones_like(p)
    reference.step()
    for p, twin in zip(params, twins, strict=True):
        # One step of a few roundings, on numbers around one.
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-6, atol=1e-6)
    assert pointers(params) == before
    assert optimizer.steps_taken == 1
    del watcher


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_memory_is_not_moved() -> None:
    p = torch.nn.Parameter(torch.randn(50).pin_memory())
    before = p.data_ptr()
    optimizer_of([p])
    assert p.data_ptr() == before and p.data.is_pinned()


def test_flatten_false_moves_nothing() -> None:
    params = [parameter(n) for n in (1, 17, 300)]
    before = pointers(params)
    optimizer = stepped(params, flatten=False)
    assert pointers(params) == before
    assert all(leaf.home is None for leaf in optimizer._leaves)


def test_a_parameter_is_never_moved_twice() -> None:
    params = [parameter(50), parameter(60)]
    optimizer = stepped(params)
    for p in params:
        p.data = p.data.clone()
    moved = pointers(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.add_param_group({"params": [parameter(3)]})
    optimizer.step()
    assert pointers(params) == moved


def test_another_optimizer_takes_the_parameters_over_when_the_first_is_gone() -> None:
    params = [parameter(50), parameter(60)]
    first = stepped(params)
    before = pointers(params)
    second = optimizer_of(params)
    assert pointers(params) == before  # the first one still sees them
    del first, second
    gc.collect()
    values = [p.detach().clone() for p in params]
    third = optimizer_of(params)
    assert all(leaf.home is not None for leaf in third._leaves)
    assert all(torch.equal(p.detach(), v) for p, v in zip(params, values, strict=True))


def test_a_group_added_later_gets_its_own_piece() -> None:
    first, second = parameter(50), parameter(60)
    optimizer = stepped([first])
    before = first.data_ptr()
    optimizer.add_param_group({"params": [second]})
    homes = [leaf.home for leaf in optimizer._leaves]
    assert first.data_ptr() == before
    assert homes[0] is not None and homes[1] is not None and homes[0].piece is not homes[1].piece
