"""The benchmark runner: its records have the documented form, and none is written of sides that disagree."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from torch.nn import Parameter

from bench import run
from bench.cases import CASES, Case, gpt2, gpt_95m, lr_factor, resnet50, same
from bench.measure import Comparison, DisagreementError, Times
from bench.peers import PEERS, Contender, build_torch, build_torch_fused, peers_of
from bench.records import bandwidth_fraction, git_state, ratio, record

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
        assert line["copy_gbps"] > 0
    assert lines[1]["time"] == lines[2]["time"]
    printed = capsys.readouterr().out
    assert f"{ratio(lines[0]):.2f}x" in printed and f"{bandwidth_fraction(lines[0]):.0%}" in printed


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


@pytest.mark.parametrize("peer", peers_of(TINY))
def test_gradients_are_the_same_on_both_sides_and_their_norm_varies(peer):
    comparison = Comparison(TINY, peer)
    norms = []
    for steps in range(3):
        comparison.steps = steps
        comparison.prepare()
        (ours, _), (theirs, _) = comparison.sides
        assert all(torch.equal(a.grad, b.grad) and a.grad is not b.grad for a, b in zip(ours, theirs, strict=True))
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in ours]).item())
    assert norms == pytest.approx([0.5, 4.0, 1.7], rel=1e-5)  # float32 sums of a hundred squares


def test_cases_are_named_once_and_have_the_real_models_sizes():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.name.startswith(case.device) for case in CASES)
    sizes = {name: (case.n_params, case.n_tensors) for name, case in ((case.name, case) for case in CASES)}
    assert sizes["cuda-gpt2"] == (124_439_808, 148)
    assert sizes["cuda-resnet50"] == (25_557_032, 161)
    assert sizes["cpu-gpt-95m"] == (95_278_080, 146)
    assert sizes["cuda-1g"] == (1_000_243_200, 300)
    assert len(gpt2()) - len(gpt_95m()) == 2 and resnet50()[-2:] == [(1_000, 2_048), (1_000,)]


@pytest.mark.parametrize(
    ("case", "floor"),
    [
        (Case("", "cpu", same(1, 1)), 32),
        (Case("", "cpu", same(1, 1), clip=None), 28),
        (Case("", "cpu", same(1, 1), dtype=torch.bfloat16), 16),
        (Case("", "cpu", same(1, 1), optimizer="SGD", arguments={"lr": 0.1, "momentum": 0.9}), 24),
        (Case("", "cpu", same(1, 1), optimizer="SGD", arguments={"lr": 0.1}, clip=None), 12),
    ],
)
def test_least_traffic(case, floor):
    assert case.bytes_per_param_floor == floor


def test_derived_numbers():
    shared = {"device": "a"}
    line = record(shared, TINY, "torch-fused", Times([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]), copy_gbps=100.0)
    assert ratio(line) == 2.0
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
