"""Thresholds that follow the training: twins of the references in ``fusedlr/clipping/adaptive.py``.

A record is float64: the strategy's settings, then what it remembers of the norms, which one program reads and writes.
"""

import triton
import triton.language as tl

__all__ = ["autoclip_threshold", "unit_factor", "zclip_threshold"]

LARGEST = tl.constexpr(1e150)
WINDOW = tl.constexpr(1024)  # norms of AutoClip's history that are looked at together


@triton.jit
def unit_factor(norm, weight_norm, factor, eps):
    """min(1, factor*max(weight_norm, eps)/norm), where a NaN gives NaN and a norm of 0 gives 1."""
    ratio = factor * tl.where(weight_norm < eps, eps, weight_norm) / tl.where(norm == 0.0, 1.0, norm)
    return tl.where((ratio >= 1.0) | (norm == 0.0), 1.0, ratio)


@triton.jit
def zclip_threshold(record_ptr, norm, eps, keep):
    """The threshold for a norm, inf where it is no spike. If ``keep``, the smaller of the two enters the record."""
    z = tl.load(record_ptr)
    alpha = tl.load(record_ptr + 1)
    warmup_steps = tl.load(record_ptr + 2)
    count = tl.load(record_ptr + 3)
    mean = tl.load(record_ptr + 4)
    var = tl.load(record_ptr + 5)
    warm = count < warmup_steps
    limit = z * (tl.sqrt(var) + eps)
    excess = norm - mean
    spike = (warm == 0) & (excess > limit)
    reduced = mean + z * tl.sqrt(var) * limit / tl.where(spike, excess, 1.0)
    threshold = tl.where(spike, reduced, float("inf"))
    entering = tl.where(spike, threshold, norm)
    change = entering - mean
    new_mean = tl.where(warm, mean + change / (count + 1), alpha * mean + (1 - alpha) * entering)
    rest = entering - new_mean
    new_var = tl.where(warm, var + (change * rest - var) / (count + 1), alpha * var + (1 - alpha) * (rest * rest))
    kept = (norm < float("inf")) & (entering < LARGEST) & keep
    tl.debug_barrier()  # every thread has read the old numbers
    tl.store(record_ptr + 3, count + 1, mask=kept)
    tl.store(record_ptr + 4, new_mean, mask=kept)
    tl.store(record_ptr + 5, new_var, mask=kept)
    return threshold


@triton.jit
def norms_at(norms_ptr, offset, place, norm, number):
    """Some of the norms with the new one in its place, inf behind the last."""
    at = offset + tl.arange(0, WINDOW)
    x = tl.load(norms_ptr + at, mask=at < number, other=float("inf"))
    return tl.where(at == place, norm, x)


@triton.jit
def count_up_to(norms_ptr, place, norm, number, bound):
    """How many of the norms are not above a bound, given by its bits: those of numbers >= 0 are ordered as they are."""
    found = tl.zeros([WINDOW], tl.int32)
    for offset in range(0, number, WINDOW):
        bits = norms_at(norms_ptr, offset, place, norm, number).to(tl.int64, bitcast=True)
        found += ((bits <= bound) & (offset + tl.arange(0, WINDOW) < number)).to(tl.int32)
    return tl.sum(found)


@triton.jit
def autoclip_threshold(record_ptr, norm, eps, keep):
    """The percentile of the last norms, this one included if it is finite; inf of none. If ``keep``, it is recorded."""
    fraction = tl.load(record_ptr)
    history = tl.load(record_ptr + 1).to(tl.int64)
    count = tl.load(record_ptr + 2).to(tl.int64)
    norms_ptr = record_ptr + 3
    finite = norm < float("inf")
    # No place for a norm that is not finite.
    place = tl.where(finite, count % history, -1)
    number = tl.minimum(count + finite.to(tl.int64), history).to(tl.int32)
    at = tl.maximum(number - 1, 0).to(tl.float64) * fraction
    low = tl.floor(at)
    wanted = low.to(tl.int32)
    # The least number that enough of the norms are not above, found bit by bit from the highest one on.
    a_bits = norm.to(tl.int64, bitcast=True) * 0
    bit = a_bits + (1 << 62)
    for _ in range(63):
        below = count_up_to(norms_ptr, place, norm, number, a_bits + bit - 1)
        a_bits += tl.where(below <= wanted, bit, 0)
        bit = bit >> 1
    a = a_bits.to(tl.float64, bitcast=True)
    a = tl.where(number > 0, a, float("inf"))
    # The next one: the same where several norms are equal, else the least of those above.
    above = tl.full([WINDOW], float("inf"), tl.float64)
    for offset in range(0, number, WINDOW):
        x = norms_at(norms_ptr, offset, place, norm, number)
        above = tl.minimum(above, tl.where(x > a, x, float("inf")))
    b = tl.where(count_up_to(norms_ptr, place, norm, number, a_bits) > wanted + 1, a, tl.min(above))
    rest = at - low
    # As numpy.percentile interpolates; b may be the inf behind the last norm where nothing of it is wanted.
    step = tl.where(rest > 0, b - a, 0.0)
    threshold = tl.where(rest < 0.5, a + step * rest, b - step * (1 - rest))
    kept = finite & keep
    tl.debug_barrier()  # every thread has read the old norms
    tl.store(norms_ptr + place, norm, mask=kept)
    tl.store(record_ptr + 2, (count + 1).to(tl.float64), mask=kept)
    return threshold
