"""How many times as long rivals take: as rows hold it, and as it is read off rows."""

import math
from collections.abc import Iterable

import numpy
from rows import OURS, Row

QUANTILES = {"min_us": 0.0, "p20_us": 0.2, "median_us": 0.5, "p80_us": 0.8}  # columns, and their shares of samples


def form_of(contestant: str) -> str:
    """A contestant, in whatever memory format and way of cropping, and however its plan was found."""
    return contestant.removesuffix("_channels_last").removesuffix("_benchmark").removesuffix("_sliced")


def measured(common: dict, samples: dict[str, list[float]], typical: str = "min_us") -> list[dict]:
    """The fields of every contestant's Row that do not say where it was timed: what all have in common, and of each its
    quantiles and its ratios, to rivals in their fastest form.

    Args:
        common: fields.
        samples: seconds of each contestant.
        typical: which quantile ratios are of, as Row.typical_us.
    """
    found = {}
    for name, seconds in samples.items():
        quantiles = 1e6 * numpy.quantile(seconds, list(QUANTILES.values()))
        found[name] = common | {"contestant": name, "rounds": len(seconds)}
        found[name] |= zip(QUANTILES, quantiles.tolist(), strict=True)
    times = {name: row[typical] for name, row in found.items()}
    fastest = {form: min(time for name, time in times.items() if form_of(name) == form) for form in map(form_of, times)}
    for name, row in found.items():
        if "copy" in times:
            row["fraction_of_copy"] = times["copy"] / times[name]
        if form_of(name) in OURS:
            ratios = {f"over_{form}": time / times[name] for form, time in fastest.items()}
            row |= {column: ratio for column, ratio in ratios.items() if column in Row.__dataclass_fields__}
    return list(found.values())


def compared(row: Row) -> tuple:
    """What rows have in common that are held against each other; a time that is extrapolated is one of the same."""
    return row.run, row.op, row.case, row.pass_.removesuffix("_extrapolated"), row.shape, row.dtype, row.timing


def over(rows: Iterable[Row]) -> list[tuple[Row, dict[str, float]]]:
    """Ours of every case, on the fastest backend in each memory format, and how many times as long its rivals take, in
    the fastest form of each."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(compared(row), []).append(row)
    found = []
    for of_case in cases.values():
        ours: dict[bool, Row] = {}
        rivals: dict[str, float] = {}
        for row in of_case:
            form, channels_last = form_of(row.contestant), row.contestant.endswith("_channels_last")
            if form not in OURS:
                rivals[form] = min(row.typical_us, rivals.get(form, math.inf))
            elif channels_last not in ours or row.typical_us < ours[channels_last].typical_us:
                ours[channels_last] = row
        found += [(row, {name: time / row.typical_us for name, time in rivals.items()}) for row in ours.values()]
    return found


def fastest_rival(ratios: dict[str, float]) -> str | None:
    """Of those that `over` gives; a copy is none."""
    rivals = {name: ratio for name, ratio in ratios.items() if name != "copy"}
    return min(rivals, key=rivals.__getitem__, default=None)
