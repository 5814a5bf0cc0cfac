"""The GPU cases under pytest-benchmark: one benchmark for a case and a contender, after the two were compared."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES, Case
from bench.measure import MINIMUM_ROUNDS, Comparison
from bench.peers import is_installed, peers_of, replays_graph
from bench.run import QUICK_LIMIT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"),
    pytest.mark.filterwarnings("default"),  # torch's compiler imports what torch deprecates
]

# The billion-parameter cases need tens of GB, and bench/run.py covers them.
TABLE = [case for case in CASES if case.device == "cuda" and not case.sweep]
SMALL = [case for case in TABLE if case.n_params <= QUICK_LIMIT["cuda"]]
HERE = [(case, peer) for case in SMALL for peer in peers_of(case) if is_installed(peer)]
PAIRS = [pytest.param(case, peer, id=f"{case.name}-{peer}") for case, peer in HERE]
GRAPH_PAIRS = [pytest.param(case, "torch-fused-graph", id=f"{case.name}-graph") for case in SMALL]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SMALL])
def test_fusedlr(benchmark: BenchmarkFixture, case: Case) -> None:
    time_side(benchmark, case, "torch-fused", 0)


@pytest.mark.parametrize(("case", "peer"), GRAPH_PAIRS)
def test_fusedlr_graph(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    time_side(benchmark, case, peer, 0)


@pytest.mark.parametrize(("case", "peer"), PAIRS)
def test_peer(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    time_side(benchmark, case, peer, 1)


def time_side(benchmark: BenchmarkFixture, case: Case, peer: str, side: int) -> None:
    comparison = Comparison(case, peer)
    comparison.check()
    contender = comparison.sides[side][1]
    if replays_graph(peer):
        contender.capture()

    def step() -> None:
        contender.step()
        torch.cuda.synchronize()

    def prepare() -> None:
        comparison.prepare(side)
        torch.cuda.synchronize()

    benchmark.group = f"{case.name}, graphs" if replays_graph(peer) else case.name
    benchmark.pedantic(step, setup=prepare, rounds=MINIMUM_ROUNDS, iterations=1, warmup_rounds=2)
