"""The benchmark runner: its records have the documented form, and none is written of sides that disagree."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn import Parameter

from bench import measure, report, run
from bench.cases import CASES, SGD, Case, gpt2, gpt_95m, lr_factor, resnet50, same
from bench.measure import Comparison, DisagreementError, Times
from bench.peers import OTHER_LIBRARIES, PEERS, Contender, build_torch, build_torch_fused, is_installed, peers_of
from bench.records import ROOT, bandwidth_fraction, git_state, ratio, record

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPTIONAL_STRING = (str, type(None))
FIELDS = {
    "time": str,
    "device": str,
    "commit": str,
    "dirty": bool,
    "torch": str,
    "triton": OPTIONAL_STRING,
    "cuda": OPTIONAL_STRING,
    "driver": OPTIONAL_STRING,
    "threads": (int, type(None)),
    "case": str,
    "optimizer": str,
    "clip": (float, int, type(None)),
    "schedule": OPTIONAL_STRING,
    "n_params": int,
    "n_tensors": int,
    "n_groups": int,
    "dtype": str,
    "state_dtype": str,
    "graph": bool,
    "peer": str,
    "fusedlr_ms_p20": float,
    "fusedlr_ms_p50": float,
    "fusedlr_ms_p80": float,
    "peer_ms_p20": float,
    "peer_ms_p50": float,
    "peer_ms_p80": float,
    "fusedlr_backward_ms_p50": (float, type(None)),
    "peer_backward_ms_p50": (float, type(None)),
    "rounds": int,
    "bytes_per_param_floor": (float, int),
    "copy_gbps": float,
    "checked": bool,
}
TINY = Case("tiny", "cpu", same(5, 7, 3), n_groups=1)


def test_run_appends_one_record_for_each_peer(tmp_path, capsys):
    out = tmp_path / "results" / "cpu.jsonl"
    arguments = ["--device", "cpu", "--quick", "--case", "cpu-150x512", "--out", str(out), "--commit", COMMIT]
    assert run.main([*arguments, "--peer", "torch-fused"]) == 0
    assert run.main([*arguments, "--peer", "torch-foreach", "--peer", "torch-fused-grad-scale"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["peer"] for line in lines] == ["torch-fused", "torch-foreach", "torch-fused-grad-scale"]
    for line in lines:
        assert list(line) == list(FIELDS)
        for field, types in FIELDS.items():
            assert isinstance(line[field], types), field
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
        assert (line["commit"], line["dirty"], line["checked"], line["graph"]) == (COMMIT, False, True, False)
        assert (line["case"], line["n_params"], line["n_tensors"], line["n_groups"]) == ("cpu-150x512", 76_800, 150, 1)
        assert (line["dtype"], line["clip"], line["schedule"], line["rounds"]) == ("float32", 1.0, "cosine", 20)
        for side in ("fusedlr", "peer"):
            assert 0 < line[f"{side}_ms_p20"] <= line[f"{side}_ms_p50"] <= line[f"{side}_ms_p80"]
            assert line[f"{side}_backward_ms_p50"] > 0
        assert line["copy_gbps"] > 0 and line["threads"] == torch.get_num_threads()
    assert lines[1]["time"] == lines[2]["time"]
    printed = capsys.readouterr().out
    assert f"{ratio(lines[0]):.2f}x" in printed and f"{bandwidth_fraction(lines[0]):.0%}" in printed


def test_threads_are_set_and_recorded(tmp_path):
    before = torch.get_num_threads()
    out = tmp_path / "cpu.jsonl"
    try:
        arguments = ["--device", "cpu", "--case", "cpu-150x512", "--peer", "torch-fused", "--rounds", "20"]
        assert run.main([*arguments, "--threads", str(before + 1), "--out", str(out), "--commit", COMMIT]) == 0
    finally:
        torch.set_num_threads(before)
    assert json.loads(out.read_text())["threads"] == before + 1


def test_records_in_the_tree_have_the_documented_form():
    for line in report.read(ROOT / "bench" / "results"):
        # Older records lack what came later.
        missing = FIELDS.keys() - line.keys()
        assert missing <= {"threads", "fusedlr_backward_ms_p50", "peer_backward_ms_p50"}
        for field in FIELDS.keys() - missing:
            assert isinstance(line[field], FIELDS[field]), (line, field)


def without_clipping(case: Case, params: list[Parameter]) -> Contender:
    contender = build_torch_fused(case, params)
    contender.update = contender.optimizer.step
    return contender


def with_a_late_schedule(case: Case, params: list[Parameter]) -> Contender:
    contender = build_torch_fused(case, params)
    steps = iter(range(1_000_000))
    on_time = contender.advance
    assert on_time is not None
    contender.advance = lambda: next(steps) > 0 and on_time()
    return contender


def without_decay(case: Case, params: list[Parameter]) -> Contender:
    case = Case("no decay", case.device, case.shapes, arguments={**case.arguments, "weight_decay": 0.0})
    return build_torch(case, params, fused=True)


def without_an_update(case: Case, params: list[Parameter]) -> Contender:
    return Contender(build_torch_fused(case, params).optimizer, lambda: None)


def with_a_nan(case: Case, params: list[Parameter]) -> Contender:
    contender = build_torch_fused(case, params)

    def advance() -> None:
        with torch.no_grad():
            params[-1].view(-1)[-1] = math.nan

    contender.advance = advance
    return contender


WRONG = (without_clipping, with_a_late_schedule, without_decay, without_an_update, with_a_nan)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda build: build.__name__)
def test_the_gate_refuses_a_peer_that_computes_something_else(wrong):
    with pytest.raises(DisagreementError, match="case tiny, tensor"):
        Comparison(TINY, "wrong", build_peer=wrong).check()


def test_the_gate_looks_again_after_the_timed_steps():
    def wrong_from_the_tenth_step(case: Case, params: list[Parameter]) -> Contender:
        contender = build_torch_fused(case, params)
        steps = itertools.count(1)
        right = contender.advance
        assert right is not None

        def advance() -> None:
            right()
            if next(steps) == 10:
                params[2].data.add_(1e-4)

        contender.advance = advance
        return contender

    comparison = Comparison(TINY, "late", build_peer=wrong_from_the_tenth_step)
    with pytest.raises(DisagreementError, match=r"tensor 2 of shape \(7, 3\): fusedlr and late .* after 23 steps"):
        comparison.check_then_time(20)


def test_nothing_is_recorded_of_sides_that_disagree(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PEERS, "torch-fused", without_clipping)
    out = tmp_path / "cpu.jsonl"
    arguments = ["--device", "cpu", "--quick", "--case", "cpu-150x512", "--peer", "torch-fused", "--commit", COMMIT]
    assert run.main([*arguments, "--out", str(out)]) == 1
    assert not out.exists()
    assert "NOT RECORDED: case cpu-150x512" in capsys.readouterr().err


def test_a_comparison_that_breaks_costs_no_other(tmp_path, capsys, monkeypatch):
    def broken(case: Case, params: list[Parameter]) -> Contender:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PEERS, "torch-fused", broken)
    out = tmp_path / "cpu.jsonl"
    arguments = ["--device", "cpu", "--quick", "--case", "cpu-150x512", "--commit", COMMIT, "--out", str(out)]
    assert run.main([*arguments, "--peer", "torch-fused", "--peer", "torch-foreach"]) == 1
    assert [json.loads(line)["peer"] for line in out.read_text().splitlines()] == ["torch-foreach"]
    said = capsys.readouterr().err
    assert "NOT RECORDED: case cpu-150x512, torch-fused" in said and "no such kernel" in said


@pytest.mark.parametrize("peer", peers_of(TINY))
def test_gradients_are_the_same_on_both_sides_and_their_norm_varies(peer):
    comparison = Comparison(TINY, peer)
    norms = []
    for steps in range(3):
        comparison.steps = steps
        comparison.prepare(0)
        comparison.prepare(1)
        (ours, _), (theirs, _) = comparison.sides
        assert all(torch.equal(a.grad, b.grad) and a.grad is not b.grad for a, b in zip(ours, theirs, strict=True))
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in ours]).item())
    assert norms == pytest.approx([0.5, 4.0, 1.7], rel=1e-5)  # float32 sums of a hundred squares


def gradient_addresses(comparison: Comparison, side: int) -> list[int]:
    comparison.write_gradients(side)
    return [p.grad.data_ptr() for p in comparison.sides[side][0]]


# Small tensors come from a heap that hands out again what it got back; large ones are mapped one by one.
@pytest.mark.parametrize("shape", [(7,), (64,), (1_000,), (300, 400), (1_500, 1_000)], ids=str)
def test_every_step_has_its_gradients_at_other_addresses(shape):
    comparison = Comparison(replace(TINY, shapes=same(4, *shape)), "torch-fused")
    for side in (0, 1):
        seen = [gradient_addresses(comparison, side) for _ in range(4)]
        for before, after in itertools.pairwise(seen):
            assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_replayed_graph_finds_its_gradients_where_they_were():
    comparison = Comparison(TINY, "torch-fused-graph", build_peer=build_torch_fused)
    assert gradient_addresses(comparison, 0) == gradient_addresses(comparison, 0)


@pytest.mark.parametrize(("device", "order"), [("cpu", ["backward"]), ("cuda", ["write", "flush"])])
def test_gradients_come_from_a_backward_pass_on_a_cpu_and_caches_are_flushed_on_a_gpu(device, order, monkeypatch):
    comparison = Comparison(TINY, "torch-fused")
    comparison.case = replace(TINY, device=device)
    done = []
    monkeypatch.setattr(comparison, "flush_caches", lambda: done.append("flush"))
    monkeypatch.setattr(comparison, "write_gradients", lambda side: done.append("write"))
    monkeypatch.setattr(comparison, "backward", lambda side: done.append("backward"))
    comparison.prepare(1)
    assert done == order


def test_a_backward_pass_leaves_the_gradients_that_the_check_writes():
    comparison = Comparison(TINY, "torch-fused")
    comparison.steps = 1
    comparison.write_gradients(0)
    comparison.backward(1)
    (ours, _), (theirs, _) = comparison.sides
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_both_sides_are_built_anew_and_take_turns_in_who_allocates_first(monkeypatch):
    built = []

    class Seen(Comparison):
        def __init__(self, case, peer, peer_first):
            super().__init__(case, peer, peer_first=peer_first)
            (ours, mine), (theirs, other) = self.sides
            assert type(mine.optimizer).__module__.startswith("fusedlr") and type(other.optimizer) is torch.optim.AdamW
            assert all(map(torch.equal, ours, theirs))
            built.append(self.order)

    monkeypatch.setattr(measure, "Comparison", Seen)
    times = measure.time_builds(TINY, "torch-fused", 22)
    assert built == [(0, 1), (1, 0), (0, 1), (1, 0)]
    assert len(times.fusedlr) == len(times.peer) == 22 and min(times.fusedlr + times.peer) > 0
    backward = times.fusedlr_backward, times.peer_backward
    assert [len(ms) for ms in backward] == [22, 22] and min(map(min, backward)) > 0


def test_percentiles_are_those_of_a_build_averaged():
    """Two heaps, 40 and 66: a side with one step more in the slow heap must not look half as fast."""
    slow, fast = [66.0] * 5, [40.0] * 4 + [90.0]
    times = Times([*slow, *fast, *slow, *fast], [1.0] * 20, builds=4)
    assert times.percentiles(times.fusedlr)[1] == 53.0 and times.percentiles(times.peer) == (1.0, 1.0, 1.0)
    assert Times(slow + fast, slow).percentiles(slow + fast)[1] == 66.0


def test_peers_compute_what_the_case_asks_for():
    assert peers_of(TINY) == ["torch-fused", "torch-foreach", "torch-fused-grad-scale"]
    assert peers_of(TINY, ["torch-compile", "torch-fused"]) == ["torch-fused", "torch-compile"]
    assert peers_of(replace(TINY, clip=None)) == ["torch-fused", "torch-foreach"]
    gpu = replace(TINY, device="cuda")
    assert set(peers_of(gpu)) == set(PEERS)
    assert not set(OTHER_LIBRARIES) & set(peers_of(replace(gpu, optimizer="SGD", arguments=SGD)))
    assert peers_of(replace(TINY, optimizer="NAdam")) == ["torch-foreach"]
    bf16 = peers_of(replace(gpu, dtype=torch.bfloat16))
    assert bf16 == ["torch-fused", "torch-fused-grad-scale", "torch-fused-graph"]


def test_a_library_that_is_not_installed_is_named_and_skipped(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [peer for peer in PEERS if not is_installed(peer)] == list(OTHER_LIBRARIES)
    pairs = [(TINY, "optimi"), (TINY, "torch-fused"), (TINY, "optimi")]
    assert run.installed(pairs) == [(TINY, "torch-fused")]
    assert capsys.readouterr().out == "skipped the peer optimi: it is not installed here\n"


class DecaysAfterTheUpdate(torch.optim.AdamW):
    """AdamW as the CUDA kernel of bitsandbytes has it: (p + update) * (1 - lr * weight_decay)."""

    def step(self, closure=None):
        before = [(group, p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        super().step(closure)
        with torch.no_grad():
            for group, p, old in before:
                kept = 1 - group["lr"] * group["weight_decay"]
                p.copy_((old + (p - old * kept)) * kept)


@pytest.fixture
def libraries(monkeypatch):
    """Modules in the place of the other libraries, with their class names and arguments, around torch's AdamW."""

    def put(name: str, cls: str, base: type[torch.optim.AdamW], settings: dict[str, object]) -> None:
        def make(params, lr, betas, weight_decay, eps, **given):
            assert given == settings
            return base(params, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)

        module = ModuleType(name)
        setattr(module, cls, make)
        monkeypatch.setitem(sys.modules, name, module)

    put("optimi", "AdamW", torch.optim.AdamW, {})
    put("flashoptim", "FlashAdamW", torch.optim.AdamW, {"quantize": False, "master_weight_bits": None})
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    put("bitsandbytes.optim", "AdamW", DecaysAfterTheUpdate, {"optim_bits": 32})


@pytest.mark.parametrize("peer", OTHER_LIBRARIES)
def test_other_libraries_are_asked_for_what_the_case_says(peer, libraries):
    times = Comparison(replace(TINY, n_groups=2), peer).check_then_time(20)
    assert len(times.peer) == 20


def test_what_bitsandbytes_is_allowed_is_what_it_needs(libraries, monkeypatch):
    monkeypatch.setattr(measure, "difference_of", lambda peer, case: 0.0)
    with pytest.raises(DisagreementError, match="fusedlr and bitsandbytes are"):
        Comparison(TINY, "bitsandbytes").check_then_time(20)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for a CPU")
# What the compiler of this or that version of torch warns of is not ours.
@pytest.mark.filterwarnings("default")
def test_the_compiled_optimizer_is_not_compiled_again_while_it_is_timed():
    from torch._dynamo.utils import counters

    comparison = Comparison(TINY, "torch-compile")
    comparison.check()
    assert counters["stats"]["unique_graphs"] > 0
    counters.clear()
    comparison.check_then_time(20)
    assert counters["stats"]["unique_graphs"] == 0


def test_cases_are_named_once_and_have_the_real_models_sizes():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.name.startswith(case.device) for case in CASES)
    sizes = {name: (case.n_params, case.n_tensors) for name, case in ((case.name, case) for case in CASES)}
    assert sizes["cuda-gpt2"] == (124_439_808, 148)
    assert sizes["cuda-resnet50"] == (25_557_032, 161)
    assert sizes["cpu-gpt-95m"] == (95_278_080, 146)
    assert sizes["cuda-1g"] == (1_000_243_200, 300)
    for name, (n_params, n_tensors) in sizes.items():
        if "-sweep-" in name:
            # The width of the smallest is 28: multiples of 4 are coarse there.
            assert n_params == pytest.approx(float(name.rpartition("-")[2]), rel=0.1) and n_tensors == 100
    assert "cpu-sweep-1e8" in sizes and "cuda-sweep-1e9" in sizes
    assert len(gpt2()) - len(gpt_95m()) == 2 and resnet50()[-2:] == [(1_000, 2_048), (1_000,)]


@pytest.mark.parametrize(
    ("case", "floor"),
    [
        (Case("", "cpu", same(1, 1)), 32),
        (Case("", "cpu", same(1, 1), clip=None), 28),
        (Case("", "cpu", same(1, 1), dtype=torch.bfloat16), 16),
        (Case("", "cpu", same(1, 1), dtype=torch.bfloat16, precision={"state": "fp32"}), 24),
        (Case("", "cpu", same(1, 1), dtype=torch.bfloat16, precision={"state": "fp32"}, clip=None), 22),
        (Case("", "cpu", same(1, 1), optimizer="SGD", arguments={"lr": 0.1, "momentum": 0.9}), 24),
        (Case("", "cpu", same(1, 1), optimizer="SGD", arguments={"lr": 0.1}, clip=None), 12),
        (Case("", "cpu", same(1, 1), optimizer="RMSprop", arguments={"lr": 0.1, "momentum": 0.9}), 32),
        (Case("", "cpu", same(1, 1), optimizer="Adamax", arguments={"lr": 0.1}, clip=None), 28),
    ],
)
def test_least_traffic(case, floor):
    assert case.bytes_per_param_floor == floor


def test_derived_numbers():
    shared = {"device": "a"}
    times = Times([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], 1, [7.0, 9.0, 8.0], [9.0, 9.0, 6.0])
    line = record(shared, TINY, "torch-fused", times, copy_gbps=100.0)
    assert ratio(line) == 2.0
    assert (line["fusedlr_backward_ms_p50"], line["peer_backward_ms_p50"]) == (8.0, 9.0)
    assert (line["dtype"], line["state_dtype"]) == ("float32", "float32")
    mixed = replace(TINY, dtype=torch.bfloat16, precision={"state": "fp32"})
    line16 = record(shared, mixed, "torch-fused", Times([1.0], [3.0]), copy_gbps=100.0)
    assert (line16["dtype"], line16["state_dtype"]) == ("bfloat16", "float32")
    assert line16["fusedlr_backward_ms_p50"] is None  # as on a GPU, where gradients are written by a kernel
    assert bandwidth_fraction(line) == pytest.approx(105 * 32 / (2.0e-3 * 100e9))


def test_the_lr_of_the_peers_moves_at_every_step():
    factors = [lr_factor("cosine", t) for t in range(40)]
    assert factors[9] == factors[10] == 1.0 and factors[0] == 0.1
    assert all(b > a for a, b in itertools.pairwise(factors[:10]))
    assert all(b < a for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "5"], "expected --rounds of at least 20, got 5"),
        (["--commit", "main"], "expected --commit as 40 hex digits, got 'main'"),
        (["--threads", "0"], "expected --threads of at least 1, with --device cpu, got 0 with cpu"),
        (["--case", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run.main(["--device", "cpu", "--out", str(tmp_path / "x"), *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_case_of_another_device_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="none of the cases"):
        run.main(["--device", "cpu", "--case", "cuda-gpt2", "--out", str(tmp_path / "x")])


def test_a_gpu_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda", "--out", str(tmp_path / "x")])
    assert "needs a GPU that PyTorch sees" in capsys.readouterr().err


def test_git_state_outside_of_a_checkout_asks_for_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.records.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match="give its commit: --commit"):
        git_state()
