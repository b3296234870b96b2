"""Two methods compared over seeds: means, spreads, the table and a verdict no stronger than they allow.

Reads the content of `results.json`; metrics there are fractions, here everything is in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

BASELINE, CONTENDER = "cross-entropy", "seesaw"
METRICS = ("AP", "APr", "APc", "APf", "AP50", "AP75")
KINDS = {"segm": "Mask", "bbox": "Box"}
NOTHING = "–"
# Twice the standard deviation of a difference between two single runs: with three seeds each, chance alone
# goes beyond it about once in forty times (t test with four degrees of freedom, two-sided).
CLEAR_SPREADS = 2.0

Outcome = Literal["missing", "single", "unclear", "gain", "loss"]


@dataclass(frozen=True, slots=True)
class Stat:
    """One metric of one method over its runs; runs without a value are left out."""

    values: tuple[float, ...]  # percent

    @property
    def mean(self) -> float | None:
        """Mean in percent, None without values."""
        return mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation in points, None with fewer than two values."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if not self.values:
            return NOTHING
        spread = "" if self.sd is None else f" ± {self.sd:.1f}"
        return f"{mean(self.values):.1f}{spread}"


@dataclass(frozen=True, slots=True)
class Difference:
    """The contender's gain on the baseline in one metric."""

    points: float | None  # percentage points, None where either has no value
    outcome: Outcome

    def __str__(self) -> str:
        if self.points is None:
            return NOTHING
        rounded = round(self.points, 1)
        return f"{'−' if rounded < 0 else '+' if rounded > 0 else '±'}{abs(rounded):.1f}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    kind: str  # "Mask" or "Box"
    metric: str
    stats: tuple[Stat, ...]  # in the order of the methods
    difference: Difference | None  # None unless both baseline and contender were run


def number(value: object) -> float | None:
    """A metric as a number; None where it is missing, null or not finite."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def summary(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Stat]]]:
    """Every metric over the seeds: ``summary(results)["seesaw"]["segm"]["APr"].mean`` in percent."""
    return {
        key: {
            kind: {
                metric: Stat(
                    tuple(
                        100 * value
                        for run in method["runs"]
                        if (value := number(run["metrics"].get(kind, {}).get(metric))) is not None
                    )
                )
                for metric in (*METRICS, "APs", "APm", "APl", "AR300")
            }
            for kind in KINDS
        }
        for key, method in results["methods"].items()
    }


def difference(baseline: Stat, contender: Stat) -> Difference:
    """Contender minus baseline, and whether the seeds allow to call it a gain or a loss."""
    if baseline.mean is None or contender.mean is None:
        return Difference(None, "missing")
    points = contender.mean - baseline.mean
    if baseline.sd is None or contender.sd is None:
        return Difference(points, "single")
    if abs(points) <= CLEAR_SPREADS * math.hypot(baseline.sd, contender.sd):
        return Difference(points, "unclear")
    return Difference(points, "gain" if points > 0 else "loss")


def table(results: Mapping[str, Any]) -> list[Row]:
    """The rows of the metrics table: mask metrics, then box metrics."""
    stats = summary(results)
    both = BASELINE in stats and CONTENDER in stats
    return [
        Row(
            name,
            metric,
            tuple(stats[key][kind][metric] for key in stats),
            difference(stats[BASELINE][kind][metric], stats[CONTENDER][kind][metric]) if both else None,
        )
        for kind, name in KINDS.items()
        for metric in METRICS
    ]


def results_markdown(results: Mapping[str, Any]) -> str:
    """The metrics as a Markdown table: percent, mean ± standard deviation over the seeds."""
    titles = [method["title"] for method in results["methods"].values()]
    rows = table(results)
    columns = ["", *titles, *(["Difference"] if rows[0].difference else [])]
    lines = [
        f"| {' | '.join(columns)} |".replace("|  |", "| |"),
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for row in rows:
        cells = [f"{row.kind} {row.metric}", *map(str, row.stats)]
        cells += [str(row.difference)] if row.difference else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence on mask AP of rare and of all classes, no stronger than the seeds and the budget allow."""
    if results.get("quick"):
        steps = results["budget"]["steps"]
        return f"Everything runs. {steps} steps are too few to compare the methods; `tailseg demo` does that."
    methods = results["methods"]
    if BASELINE not in methods or CONTENDER not in methods:
        titles = ", ".join(method["title"] for method in methods.values())
        return f"Nothing is compared: the results hold {titles} only."
    stats = summary(results)
    pairs = {
        name: (stats[BASELINE]["segm"][metric], stats[CONTENDER]["segm"][metric])
        for name, metric in (("rare classes", "APr"), ("all classes", "AP"))
    }
    differences = {name: difference(*pair) for name, pair in pairs.items()}
    headline = _headline(differences, methods[CONTENDER]["title"], methods[BASELINE]["title"].lower())
    clauses = [_clause(name, *pairs[name], differences[name]) for name in pairs]
    return f"{headline}: mask AP {clauses[0]}, and {clauses[1]}."


def _headline(differences: Mapping[str, Difference], contender: str, baseline: str) -> str:
    outcomes = {name: found.outcome for name, found in differences.items() if found.outcome != "missing"}
    if not outcomes:
        return f"{contender} and {baseline} cannot be compared"
    if "single" in outcomes.values():
        ahead = [name for name in outcomes if (differences[name].points or 0) > 0]
        caution = "one seed cannot tell a difference from chance"
        if len(ahead) == len(outcomes):
            return f"{contender} came out ahead of {baseline} in a single run, but {caution}"
        where = f" except on {ahead[0]}" if ahead else ""
        return f"{contender} did not come out ahead of {baseline}{where} in a single run, and {caution}"
    gains = [name for name, outcome in outcomes.items() if outcome == "gain"]
    losses = [name for name, outcome in outcomes.items() if outcome == "loss"]
    if gains and losses:
        return f"Mixed: {contender} beats {baseline} on {gains[0]} but loses on {losses[0]}"
    if losses:
        return f"{contender} did not win, it is worse than {baseline} on {' and on '.join(losses)}"
    if len(gains) == 2:
        return f"{contender} beats {baseline} on rare classes and overall"
    if gains:
        return f"{contender} beats {baseline} on {gains[0]}, with no clear difference otherwise"
    return f"{contender} did not win clearly: what sets it apart from {baseline} may be chance"


def _clause(name: str, baseline: Stat, contender: Stat, found: Difference) -> str:
    if baseline.mean is None or contender.mean is None:
        return f"on {name} has no value"
    certainty = {"unclear": ", within the spread of the seeds", "single": ""}
    seeds = f", beyond the spread of {min(len(baseline.values), len(contender.values))} seeds"
    points = f"{found} points{certainty.get(found.outcome, seeds)}"
    return f"on {name} went from {baseline.mean:.1f} to {contender.mean:.1f} ({points})"
