"""Between storages: what a state entry of any precision holds, checked and brought into the arrays of a leaf.

State entries have torch's keys. Beside them: ``<slot>_scale``, the scales of a slot whose codes are int8 or uint8 (one
for each group of elements in the order of the codes' memory); ``master``, the float32 weight; ``param_low``, the 16 or
8 bits that a bfloat16 weight lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import codecs
from .flat import is_dense, memory_view
from .precision import GROUP
from .rule import Rule

if TYPE_CHECKING:
    from .state import Leaf

__all__ = ["check_stored", "full_slot", "full_weight", "put_slot", "put_weight"]

_CODES = (torch.int8, torch.uint8)
_LOWS = (torch.int16, torch.int8)


def full_slot(entry: Mapping[str, Any], name: str) -> Tensor:
    """A slot as numbers: 8-bit codes decoded to float32, anything else as it is."""
    value: Tensor = entry[name]
    if value.dtype not in _CODES:
        return value
    value = value if is_dense(value) else value.contiguous()
    scales = entry[f"{name}_scale"].to(value.device, torch.float32)
    return codecs.decode(memory_view(value), scales).as_strided(value.shape, value.stride())


def full_weight(p: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The float32 weight of a parameter with this state entry, in the parameter's shape."""
    p = p.detach()
    master, low = entry.get("master"), entry.get("param_low")
    if master is not None:
        return codecs.load_weight(p, master.to(p.device, torch.float32), "master")
    if low is not None and p.dtype == torch.bfloat16:
        return codecs.merge(p, low.to(p.device))
    return p.to(torch.float32, copy=True)


def put_slot(leaf: Leaf, number: int, name: str, entry: Mapping[str, Any]) -> None:
    """Bring one slot of an entry into the leaf's bank; where it is missing, what it is before the first step."""
    assert leaf.bank is not None
    slot, value = leaf.slots[number], entry.get(name)
    if value is not None and value.dtype == slot.dtype and _same_groups(value, leaf):
        if value.data_ptr() != slot.data_ptr():
            slot.as_strided(leaf.shape, leaf.strides).copy_(value)
        if leaf.scales:
            leaf.scales[number].copy_(entry[f"{name}_scale"])
        return
    if value is None:
        if not leaf.scales:
            slot.fill_(leaf.bank.start[number])
            return
        x = torch.full((leaf.numel,), leaf.bank.start[number], dtype=torch.float32, device=leaf.device)
    elif not leaf.scales:
        slot.as_strided(leaf.shape, leaf.strides).copy_(full_slot(entry, name))
        return
    else:
        x = memory_view(
            torch.empty_strided(leaf.shape, leaf.strides, dtype=torch.float32, device=leaf.device)
            .copy_(full_slot(entry, name))
        )  # fmt: skip
    codes, scales = codecs.encode(x, leaf.bank.unsigned[number])
    slot.copy_(codes)
    leaf.scales[number].copy_(scales)


def _same_groups(value: Tensor, leaf: Leaf) -> bool:
    """Whether the groups of 8-bit codes hold the elements that they hold in the leaf; other dtypes have no groups."""
    return value.dtype not in _CODES or value.stride() == leaf.strides


def put_weight(leaf: Leaf, entry: Mapping[str, Any]) -> None:
    """Bring what completes the weight into the leaf's bank, from whatever an entry has of it.

    A master copy becomes missing bits of itself where the parameter is another: the user may load the model later.
    Missing bits become a master copy beside the parameter as it is now; more or fewer of them are as good beside any.
    """
    assert leaf.bank is not None and leaf.extra is not None
    name, dtype = leaf.bank.storage.extra or ("", torch.float32)
    extra, value = leaf.extra.as_strided(leaf.shape, leaf.strides), entry.get(name)
    if value is not None and value.dtype == dtype:
        if value.data_ptr() != extra.data_ptr():
            extra.copy_(value)
    elif name == "master":
        extra.copy_(full_weight(leaf.param, entry) if value is None else value)
    elif value is not None:
        extra.copy_(codecs.other_bits(value, 8 * dtype.itemsize))
    else:
        master = entry.get("master")
        w = master.to(torch.float32) if master is not None else full_weight(leaf.param, entry)
        p = leaf.param.detach()
        extra.copy_(codecs.missing(w.to(p.device), p, 8 * dtype.itemsize))


def check_stored(leaf: Leaf, entry: Mapping[str, Any], rule: Rule, where: str) -> None:
    """Raise a ValueError for codes, scales or bits of weights that no optimizer has written."""
    groups = -(-leaf.numel // GROUP)
    for name, unsigned in zip(rule.slots, rule.unsigned, strict=True):
        value = entry.get(name)
        if value is None or value.dtype.is_floating_point:
            continue
        wanted = torch.uint8 if unsigned else torch.int8
        if value.dtype != wanted:
            raise ValueError(f"{where} has {name!r} of dtype {value.dtype}, but its 8-bit codes are {wanted}")
        if not unsigned and bool((value == -128).any()):
            raise ValueError(f"{where} is corrupted: {name!r} holds the code -128, which is never written")
        scale = entry.get(f"{name}_scale")
        shape = tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
        if not isinstance(scale, Tensor) or shape != (groups,) or not scale.dtype.is_floating_point:
            raise ValueError(
                f"{where} has 8-bit codes as {name!r} and needs a floating-point tensor of shape {(groups,)} as "
                f"'{name}_scale', but got {shape}; the checkpoint is truncated, or of another parameter"
            )
        if bool((scale < 0).any()):
            raise ValueError(f"{where} is corrupted: '{name}_scale' holds a negative number")
    master, low = entry.get("master"), entry.get("param_low")
    for name, value, allowed in (("master", master, (torch.float32, torch.float64)), ("param_low", low, _LOWS)):
        if value is None:
            continue
        got = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.shape != leaf.shape or value.dtype not in allowed:
            raise ValueError(
                f"{where} needs as {name!r} a tensor of shape {tuple(leaf.shape)} and of one of the dtypes {allowed}, "
                f"but got {got}; load a state_dict that was saved for the same parameters"
            )
