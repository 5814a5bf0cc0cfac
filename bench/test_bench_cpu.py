"""The CPU cases under pytest-benchmark: one benchmark for a case and a contender, after the two were compared."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES, Case
from bench.measure import MINIMUM_ROUNDS, Comparison
from bench.peers import peers_of
from bench.run import QUICK_LIMIT

# The large ones take minutes, and bench/run.py covers them.
SMALL = [case for case in CASES if case.device == "cpu" and case.n_params <= QUICK_LIMIT["cpu"]]
PAIRS = [pytest.param(case, peer, id=f"{case.name}-{peer}") for case in SMALL for peer in peers_of(case)]


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
    benchmark.pedantic(
        comparison.sides[side][1].step, setup=comparison.prepare, rounds=MINIMUM_ROUNDS, iterations=1, warmup_rounds=2
    )
