"""What was measured and what it says: figures, ratios to peers, targets met or missed.

Everything here is a value; nothing is measured, shown or read from a file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

OURS = "aiojob"

Judged = Literal["best", "median"]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """What a value has to be."""

    bound: Literal["at most", "at least"]
    limit: float

    def is_met_by(self, value: float) -> bool:
        return value <= self.limit if self.bound == "at most" else value >= self.limit


def at_most(limit: float) -> Target:
    return Target("at most", limit)


def at_least(limit: float) -> Target:
    return Target("at least", limit)


@dataclass(frozen=True)
class Unit:
    """What samples are counted in, and how people read them."""

    name: str
    scales: Sequence[tuple[float, str]]
    """The largest first: so many units are one of these."""
    more_is_better: bool = False

    def scale(self, value: float) -> tuple[float, str]:
        fitting = (scale for scale in self.scales if abs(value) >= scale[0])
        return next(fitting, self.scales[-1])

    def shown(self, value: float) -> str:
        size, name = self.scale(value)
        return f"{three_figures(value / size)} {name}"


def three_figures(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


UNITS = {
    unit.name: unit
    for unit in (
        Unit("s", ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))),
        Unit("B", ((1024.0, "KiB"),)),
        Unit("1/s", ((1.0, "/s"),), more_is_better=True),
    )
}


@dataclass(frozen=True)
class Figure:
    """One contender's samples, one from each round."""

    best: float
    lower_quartile: float
    median: float
    upper_quartile: float
    worst: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float], unit: Unit) -> Figure:
        ordered = sorted(samples, reverse=unit.more_is_better)
        spread = [*samples, *samples] if len(samples) == 1 else samples
        lower, median, upper = statistics.quantiles(spread, n=4, method="inclusive")
        return cls(ordered[0], lower, median, upper, ordered[-1], len(samples))


@dataclass(frozen=True)
class Comparison:
    """aiojob's figure as a multiple of a peer's, or by itself where `peer` is aiojob."""

    peer: str
    value: float
    target: Target | None

    @property
    def is_missed(self) -> bool:
        return self.target is not None and not self.target.is_met_by(self.value)


@dataclass(frozen=True)
class Result:
    """The figures of one row on one loop."""

    loop: str
    group: str
    name: str
    at_a_time: int | None
    unit: str
    judged: Judged
    figures: Mapping[str, Figure]
    targets: Mapping[str, Target]
    traces: Mapping[str, Points] = field(default_factory=dict)
    """For some rows, one round's course: seconds since it began, and what was seen then."""

    @property
    def title(self) -> str:
        return self.name if self.at_a_time is None else f"{self.name}, {self.at_a_time} at a time"

    def judged_figure(self, who: str) -> float:
        figure: float = getattr(self.figures[who], self.judged)
        return figure

    @property
    def comparisons(self) -> list[Comparison]:
        ours = self.judged_figure(OURS)
        ratios = {who: ours / self.judged_figure(who) for who in self.figures if who != OURS}
        absolute = {OURS: ours} if OURS in self.targets else {}
        return [
            Comparison(peer, value, self.targets.get(peer))
            for peer, value in (absolute | ratios).items()
        ]

    def as_json(self) -> dict[str, Any]:
        compared = [
            {"peer": some.peer, "value": some.value, "missed": some.is_missed}
            for some in self.comparisons
        ]
        return asdict(self) | {"comparisons": compared}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Result:
        fields = dict(document)
        del fields["comparisons"]
        fields["figures"] = {who: Figure(**some) for who, some in document["figures"].items()}
        fields["targets"] = {who: Target(**some) for who, some in document["targets"].items()}
        return cls(**fields)


@dataclass
class Report:
    """What a whole run came to."""

    environment: Mapping[str, Any]
    effort: str
    results: list[Result] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """The tracebacks of the rows that could not be measured."""

    @property
    def missed(self) -> list[str]:
        return [
            f"{result.loop}: {result.title}"
            + ("" if comparison.peer == OURS else f", against {comparison.peer}")
            for result in self.results
            for comparison in result.comparisons
            if comparison.is_missed
        ]

    @property
    def exit_status(self) -> int:
        return 2 if self.errors else 1 if self.missed else 0

    @property
    def summary(self) -> str:
        targets = sum(len(result.targets) for result in self.results)
        lines = [f"{targets - len(self.missed)} of {targets} targets met"]
        lines += [f"missed: {missed}" for missed in self.missed]
        lines += [f"failed: {error.splitlines()[-1]}" for error in self.errors]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return all of it as JSON, with a line for each result."""
        head = {
            "environment": dict(self.environment),
            "effort": self.effort,
            "missed": self.missed,
            "errors": self.errors,
        }
        results = ",\n".join(json.dumps(result.as_json()) for result in self.results)
        return f'{json.dumps(head)[:-1]},\n"results": [\n{results}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Report:
        document = json.loads(text)
        results = [Result.from_json(result) for result in document["results"]]
        return cls(document["environment"], document["effort"], results, document["errors"])
