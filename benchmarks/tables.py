"""The tables that are printed of rows."""

from collections.abc import Iterable, Sequence

from ratios import compared, fastest_rival, over
from rows import OURS, MemoryRow, Row, topic

PASSES = {"forward": "forward", "backward": "backward", "forward_backward": "fwd+bwd"}
CASE = ("op", "pass", "shape", "dtype", "ours")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(text.rstrip() for text in texts)


def case(row: Row) -> tuple[str, ...]:
    """The cells of CASE."""
    timing = {"graph": " in a graph", "host": " on the host" if row.on_gpu else ""}
    pass_ = PASSES.get(row.pass_, row.pass_) + timing.get(row.timing, "")
    return f"{row.op} {row.case}".strip(), pass_, row.shape, row.dtype, row.contestant


def speed(rows: Iterable[Row]) -> str:
    """A table for each topic: our best time of every case, and how many times as long each rival takes."""
    rows = list(rows)
    noisy = {compared(row) for row in rows if row.noisy}
    tables = []
    for name in ("speed", "convolutions", "sampling", "dropins"):
        found = over(row for row in rows if topic(row) == name)
        rivals = list(dict.fromkeys(rival for _, ratios in found for rival in ratios))
        lines = [(*CASE, "us", *rivals, "best", "")]
        for row, ratios in found:
            marks = ["NOISY"] * (compared(row) in noisy) + ["UNVERIFIED"] * (row.verified != "yes")
            cells = (f"{ratios[rival]:.2f}x" if rival in ratios else "" for rival in (*rivals, fastest_rival(ratios)))
            lines.append((*case(row), f"{row.typical_us:.4g}", *cells, "; ".join(marks)))
        tables += [aligned(lines)] if found else []
    return "\n\n".join(tables)


def slower(rows: Iterable[Row]) -> str:
    """The cases in which a rival is faster than the fastest of ours."""
    fastest: dict[tuple, tuple[Row, dict[str, float]]] = {}
    for row, ratios in over(rows):
        if fastest_rival(ratios) and row.typical_us <= fastest.get(compared(row), (row,))[0].typical_us:
            fastest[compared(row)] = row, ratios
    lines = [(*CASE, "us", "faster", "")]
    for row, ratios in fastest.values():
        name = fastest_rival(ratios)
        if ratios[name] < 1:
            lines.append((*case(row), f"{row.typical_us:.4g}", name, f"{ratios[name]:.2f}x"))
    found = f"a rival is faster in {len(lines) - 1} of {len(fastest)} cases"
    return f"{found}\n{aligned(lines)}" if lines[1:] else found


def memory(rows: Iterable[MemoryRow]) -> str:
    """Bytes per element of every case: kept for the backward by each contestant, and the peak of both passes."""
    cases: dict[tuple, dict[str, MemoryRow]] = {}
    for row in rows:
        cases.setdefault(row.timed, {})[row.contestant] = row
    order = (*OURS, "eager", "distributions", "compile", "compile_checkpoint")
    names = [name for name in order if any(name in found for found in cases.values())]
    lines = [("op", "shape", "dtype", "bytes per element", *names, "results")]
    for (op, case, shape, dtype), found in cases.items():
        results = per_element(next(iter(found.values())), "result_bytes")
        for title, column in (("saved", "saved_bytes"), ("peak", "peak_bytes")):
            cells = [per_element(found.get(name), column) for name in names]
            if any(cells):
                lines.append((f"{op} {case}".strip(), shape, dtype, title, *cells, results))
    return aligned(lines)


def per_element(row: MemoryRow | None, column: str) -> str:
    count = None if row is None else getattr(row, column)
    if count is None:
        return ""
    return f"{count} in all" if 0 < count < row.elements / 100 else f"{count / row.elements:.4g}"
