"""What a run came to, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from chaos.plan import CallKind
from chaos.program import Outcome
from chaos.verdict import Record, Rule

__all__ = ["report"]

_SHOWN = 20


def report(outcome: Outcome) -> str:
    """The tables, and each breach up to a few."""
    parts = [
        _heading(outcome),
        _table(("calls", "made", "value", "error", "cancelled", "runs"), _kinds(outcome)),
        _table(("error", "calls"), _errors(outcome)),
        _table(("fault", "times", "longest"), _faults(outcome)),
        _table(("calls that", ""), _runs(outcome)),
        _table(("rule", "checked", "broken"), _rules(outcome)),
        *_breaches(outcome),
    ]
    return "\n\n".join(part for part in parts if part)


def _heading(outcome: Outcome) -> str:
    plan, broken = outcome.plan, len(outcome.verdict.breaches)
    end = f"{broken} BREACHES" if broken else "every rule holds"
    return (
        f"seed {plan.seed}: {len(plan.calls)} calls, {len(outcome.disturbances)} faults, "
        f"{outcome.wall_s:.0f} s: {end}"
    )


def _kinds(outcome: Outcome) -> Iterable[Sequence[object]]:
    for kind in CallKind:
        ours = [record for record in outcome.records if record.call.kind is kind]
        ends = Counter(_column(record) for record in ours)
        runs = sum(len(record.runs) for record in ours)
        yield kind, len(ours), ends["value"], ends["error"], ends["cancelled"], runs


def _column(record: Record) -> str:
    end = record.seen.end
    return end if end in ("value", "cancelled", "") else "error"


def _errors(outcome: Outcome) -> Iterable[Sequence[object]]:
    ends = Counter(r.seen.end for r in outcome.records if _column(r) == "error")
    return ends.most_common()


def _faults(outcome: Outcome) -> Iterable[Sequence[object]]:
    times = Counter(one.kind for one in outcome.disturbances)
    for kind, count in sorted(times.items()):
        longest = max(d.ended - d.began for d in outcome.disturbances if d.kind is kind)
        yield kind, count, f"{longest:.1f} s"


def _runs(outcome: Outcome) -> Iterable[Sequence[object]]:
    counts = Counter(len(record.runs) for record in outcome.records)
    yield "lived while nobody was parted from the broker", outcome.verdict.calm
    yield "never ran", counts[0]
    yield "ran once", counts[1]
    yield "ran more often, retries included", len(outcome.records) - counts[0] - counts[1]
    for reason, count in outcome.verdict.again.most_common():
        yield f"ran again because {reason}", count
    yield "were compared with the stored value", sum(bool(r.told.run) for r in outcome.records)


def _rules(outcome: Outcome) -> Iterable[Sequence[object]]:
    broken = Counter(breach.rule for breach in outcome.verdict.breaches)
    for rule in Rule:
        yield rule, outcome.verdict.checked[rule] or "", broken[rule]


def _breaches(outcome: Outcome) -> list[str]:
    breaches = outcome.verdict.breaches
    if not breaches:
        return []
    lines = [f"call {b.number}: {b.rule}: {b.text}" for b in breaches if b.number is not None]
    lines = [f"{b.rule}: {b.text}" for b in breaches if b.number is None] + lines
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return ["\n".join([*lines[:_SHOWN], *more])]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    lines = [list(head), *cells]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [*zip(cells, widths, strict=True)]
    line = f"{first[0]:<{first[1]}}" + "".join(f"  {cell:>{width}}" for cell, width in others)
    return line.rstrip()
