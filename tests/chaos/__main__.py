"""``python -m chaos``, which ``make chaos`` runs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from textwrap import fill

from chaos.plan import FaultKind, make_plan
from chaos.program import Program
from chaos.report import report
from lab.rabbit import RabbitNode

_GAP_S = 6.0

_EPILOG = f"""\
{fill("faults: " + ", ".join(FaultKind), 90, break_on_hyphens=False)}

examples:
  make chaos
  make chaos ARGS="--seed 7 --calls 2000 --minutes 4 --longest 20"
  make chaos ARGS="--faults kill-worker cut-client --seed 7"

The same seed gives the same calls and faults at the same times; what processes make of them differs
a little from run to run. Ends with 1 if a rule does not hold, and says the seed.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; the return value is the exit code."""
    given = _parser().parse_args(argv)
    duration_s = 60 * given.minutes
    plan = make_plan(
        given.seed,
        calls=given.calls,
        duration_s=duration_s,
        longest_s=given.longest,
        faults=round(duration_s / given.gap) if given.faults else 0,
        kinds=[FaultKind(kind) for kind in given.faults],
    )
    folder = Path(tempfile.mkdtemp(prefix="flame-chaos-"))
    os.environ["FLAME_HOME"] = str(folder / "client")
    print(f"seed {plan.seed}: {len(plan.calls)} calls, {len(plan.faults)} faults", flush=True)
    with RabbitNode() as node:
        outcome = Program(plan, folder, say=lambda line: print(line, flush=True)).run(node)
    print(f"\n{report(outcome)}", flush=True)
    if outcome.verdict.breaches:
        print(f"\nseed {plan.seed} fails; to repeat it: {_again(given)}", flush=True)
        print(f"its traces and its history are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    return 0


def _again(given: argparse.Namespace) -> str:
    options = [f"--seed {given.seed} --calls {given.calls} --minutes {given.minutes:g}"]
    options += [f"--longest {given.longest:g} --gap {given.gap:g}"]
    if given.faults != [*FaultKind]:
        options += ["--faults", *given.faults]
    return f'make chaos ARGS="{" ".join(options)}"'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Make calls while a schedule kills, stops and cuts everything, and judge what\n"
        "comes of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="of the plan (%(default)s)")
    parser.add_argument("--calls", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="how long calls are made and things broken (%(default)g); the last calls then take "
        "their time, mostly less than ten minutes",
    )
    parser.add_argument(
        "--longest", type=float, default=90.0, help="seconds of the longest call (%(default)g)"
    )
    parser.add_argument(
        "--gap", type=float, default=_GAP_S, help="seconds between two faults (%(default)g)"
    )
    parser.add_argument(
        "--faults",
        nargs="*",
        default=[*FaultKind],
        choices=[*FaultKind],
        metavar="FAULT",
        help="which; none for a calm run (all of them)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
