"""The CPU cases under pytest-benchmark: one benchmark for a case and a contender, after the two were compared."""

from __future__ import annotations

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES, Case
from bench.measure import MINIMUM_ROUNDS, Comparison
from bench.peers import is_installed, peers_of
from bench.run import QUICK_LIMIT

# The large ones take minutes, and bench/run.py covers them.
TABLE = [case for case in CASES if case.device == "cpu" and not case.sweep]
SMALL = [case for case in TABLE if case.n_params <= QUICK_LIMIT["cpu"]]
HERE = [(case, peer) for case in SMALL for peer in peers_of(case) if is_installed(peer)]
PAIRS = [pytest.param(case, peer, id=f"{case.name}-{peer}") for case, peer in HERE]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SMALL])
def test_fusedlr(benchmark: BenchmarkFixture, case: Case) -> None:
    time_side(benchmark, case, "torch-fused", 0)


@pytest.mark.parametrize(("case", "peer"), PAIRS)
def test_peer(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    time_side(benchmark, case, peer, 1)


def time_side(benchmark: BenchmarkFixture, case: Case, peer: str, side: int) -> None:
    comparison = Comparison(case, peer)
    comparison.check()
    benchmark.group = case.name
    step = comparison.sides[side][1].step
    prepare = partial(comparison.prepare, side)
    benchmark.pedantic(step, setup=prepare, rounds=MINIMUM_ROUNDS, iterations=1, warmup_rounds=2)
