"""The tables of each kind of rows."""

from collections.abc import Iterable

import rows
from rows import Row

LAST = "_channels_last"


def by_case(found: Iterable) -> dict[tuple, dict]:
    """Rows of one case by contestant."""
    cases: dict[tuple, dict] = {}
    for row in found:
        cases.setdefault(row.timed, {})[row.contestant] = row
    return cases


def convolutions(found: Iterable[Row]) -> str:
    """How many times as long each rival takes, in its better memory format."""
    lines = [("layer", "pass", "shape", "dtype", "ours", "ms", "GFLOP/s", "mask-multiply", "crop", "compile", "")]
    for (_, case, pass_, shape, dtype, _), by in by_case(found).items():
        for name, row in by.items():
            if name.removesuffix(LAST) in rows.OURS:
                theirs = [best_of(by, rival) for rival in ("eager", "crop", "compile")]
                ratios = ["" if time is None else f"{time / row.typical_us:.2f}x" for time in theirs]
                cells = case, rows.PASS_NAMES[pass_], shape, dtype, name, f"{1e-3 * row.typical_us:.2f}"
                unverified = "" if row.verified == "yes" else "UNVERIFIED"
                lines.append((*cells, f"{1e-3 * operations(row) / row.typical_us:.0f}", *ratios, unverified))
    return rows.aligned(lines)


def best_of(by: dict[str, Row], rival: str) -> float | None:
    """Microseconds of the fastest contestant whose name starts so."""
    return min((row.typical_us for name, row in by.items() if name.startswith(rival)), default=None)


def operations(row: Row) -> int:
    """Multiplications and additions that the mask leaves, of a case as `64-64 k7 B`."""
    channels, size, mask = row.case.split()
    c_in, c_out, k = *map(int, channels.split("-")), int(size[1:])
    n, _, height, width = map(int, row.shape.split("x"))
    count = 2 * n * height * width * c_in * c_out * ((k**2 - 1) // 2 + (mask == "B"))
    # data wants no gradient
    return count * (1 if row.pass_ == rows.FORWARD else 2 if c_in <= 4 else 3)


def sampling(found: Iterable[Row]) -> str:
    """How many times as long each rival takes for as many images."""
    images: dict[str, dict[str, Row]] = {}
    for row in found:
        images.setdefault(row.shape, {})[row.contestant] = row
    lines = [("images", "ours", "s", "ms a pixel", "naive loop", "eager cache", "in plain torch", "")]
    for shape, by in images.items():
        n, _, height, width = map(int, shape.split("x"))
        for row in (row for name, row in by.items() if name in rows.OURS):
            theirs = [by.get(name) for name in ("naive", "eager_cache", "reference")]
            ratios = ["" if other is None else f"{other.typical_us / row.typical_us:.1f}x" for other in theirs]
            times = f"{1e-6 * row.typical_us:.3f}", f"{1e-3 * row.typical_us / height / width:.3f}"
            lines.append((str(n), row.contestant, *times, *ratios, "" if row.verified == "yes" else "UNVERIFIED"))
    return rows.aligned(lines)


TABLES = {  # by the prefix of a file of rows: what a table shows, and the function that makes it
    "": ("ours, and how many times as long each rival takes", rows.table),
    "memory_": ("bytes per element: kept for the backward, and allocated at most in both passes", rows.memory_table),
    "conv_": ("masked convolutions, and how many times as long each rival takes", convolutions),
    "sampling_": ("drawing images, and how many times as long others take", sampling),
    "dropins_": ("drop-ins, and how many times as long today's lines take", rows.table),
}
