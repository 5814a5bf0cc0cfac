"""Time fusedlr against torch.optim and other libraries, and append one JSON record for every case and peer.

    python bench/run.py --device cuda --out bench/results/h200.jsonl
    python bench/run.py --device cpu --quick --out results.jsonl

No record is written of two sides that disagree. See bench/README.md for how to read the numbers.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # run as a file: the folder above holds the package `bench`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cases import CASES, Case
from bench.measure import MINIMUM_ROUNDS, DisagreementError, copy_gbps, time_builds
from bench.peers import PEERS, is_installed, peers_of
from bench.records import append, bandwidth_fraction, environment, ratio, record

# What --quick takes on, in parameters: a second or so for each side of a case.
QUICK_LIMIT = {"cpu": 8_000_000, "cuda": 150_000_000}
ROUNDS = 60


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="small cases only, with the fewest rounds that count")
    parser.add_argument("--out", type=Path, required=True, help="file that the records are appended to")
    parser.add_argument("--case", action="append", choices=names, help="only this case; may be repeated")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only this peer; may be repeated")
    parser.add_argument("--rounds", type=int, help=f"timed steps of each side; {MINIMUM_ROUNDS} or more")
    parser.add_argument("--threads", type=int, help="CPU threads that PyTorch may use, on both sides; on a CPU only")
    parser.add_argument("--commit", help="the commit that this clean copy of the tree is of, where there is no git")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch sees, and torch.cuda.is_available() is False here")
    if args.rounds is None:
        args.rounds = MINIMUM_ROUNDS if args.quick else ROUNDS
    if args.rounds < MINIMUM_ROUNDS:
        parser.error(f"expected --rounds of at least {MINIMUM_ROUNDS}, got {args.rounds}")
    if args.threads is not None and (args.device == "cuda" or args.threads < 1):
        parser.error(f"expected --threads of at least 1, with --device cpu, got {args.threads} with {args.device}")
    if args.commit is not None and not re.fullmatch(r"[0-9a-f]{40}", args.commit):
        parser.error(f"expected --commit as 40 hex digits, got {args.commit!r}")
    return args


def chosen(args: argparse.Namespace) -> list[Case]:
    cases = [case for case in CASES if case.device == args.device and (not args.case or case.name in args.case)]
    if args.quick and not args.case:
        cases = [case for case in cases if not case.sweep]
    if not cases:
        sys.exit(f"none of the cases {args.case} is for --device {args.device}; see bench/cases.py")
    limit = QUICK_LIMIT[args.device]
    for case in cases:
        if args.quick and case.n_params > limit:
            print(f"skipped {case.name}: {case.n_params:,} parameters are more than --quick takes on ({limit:,})")
    return [case for case in cases if not args.quick or case.n_params <= limit]


def installed(pairs: list[tuple[Case, str]]) -> list[tuple[Case, str]]:
    """What can be run here; says once for each library what cannot."""
    for peer in sorted({peer for _, peer in pairs if not is_installed(peer)}):
        print(f"skipped the peer {peer}: it is not installed here")
    return [(case, peer) for case, peer in pairs if is_installed(peer)]


def compare(case: Case, peer: str, rounds: int, shared: dict[str, Any], copy: float) -> dict[str, Any]:
    """The record of one case and peer."""
    return record(shared, case, peer, time_builds(case, peer, rounds), copy)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if every comparison that was wanted is recorded or was skipped for its size, 1 otherwise."""
    args = parse(argv)
    cases = chosen(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    shared = environment(args.device, args.commit)
    print(f"{shared['device']}, torch {shared['torch']}, commit {shared['commit'][:10]}{', dirty' * shared['dirty']}")
    copy = copy_gbps(args.device)
    print(f"a copy of 1 GiB moves {copy:.1f} GB/s\n")
    row = "{:<24}{:<24}{:>12}{:>12}{:>9}{:>12}"
    print(row.format("case", "peer", "fusedlr ms", "peer ms", "ratio", "bandwidth"))
    failures = 0
    for case, peer in installed([(c, p) for c in cases for p in peers_of(c, args.peer or ())]):
        try:
            line = compare(case, peer, args.rounds, shared, copy)
        except torch.OutOfMemoryError:
            print(f"skipped {case.name} against {peer}: it does not fit into the memory of this GPU")
            continue
        except DisagreementError as error:
            failures += 1
            print(f"NOT RECORDED: {error}", file=sys.stderr)
            continue
        except Exception:
            # Compilers and other libraries break in ways of their own; the comparisons that follow are worth having.
            failures += 1
            print(f"NOT RECORDED: case {case.name}, {peer}:\n{traceback.format_exc()}", file=sys.stderr)
            continue
        finally:
            # The next comparison needs the memory of this one, and not to be one recompilation too many.
            if peer == "torch-compile":
                torch.compiler.reset()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        append(args.out, line)
        p50 = (f"{line['fusedlr_ms_p50']:.3f}", f"{line['peer_ms_p50']:.3f}")
        print(row.format(case.name, peer, *p50, f"{ratio(line):.2f}x", f"{bandwidth_fraction(line):.0%}"))
    print(f"\nratio: how many times as long the peer takes. bandwidth: of the copy's. Records: {args.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
