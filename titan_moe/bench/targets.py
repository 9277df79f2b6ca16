"""What the figures ought to reach."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from titan_moe.bench.report import Table


@dataclass(frozen=True)
class Target:
    """A bound on one figure: at least ``low``, at most ``high``.

    Attributes:
        figure: its name in what the parts' ``figures`` return.
        strict: the bound itself does not do.
        limit: the figure that GEMMs alone would reach in the same run, by its name: no layer gets beyond.
    """

    name: str
    figure: str
    low: float | None = None
    high: float | None = None
    strict: bool = False
    limit: str | None = None

    @property
    def bound(self) -> str:
        """In words."""
        sign = (">" if self.high is None else "<") + "=" * (not self.strict)
        return f"{sign} {self.low if self.high is None else self.high}"

    def holds(self, reached: float) -> bool:
        """Whether ``reached`` is good enough."""
        if self.strict and reached in (self.low, self.high):
            return False
        return (self.low is None or reached >= self.low) and (self.high is None or reached <= self.high)


TARGETS = (
    Target("layer: stock / ours, geometric mean", "layer.mean", low=1.3, limit="layer.mean.limit"),
    Target("layer: stock / ours, worst shape", "layer.worst", low=1.0, limit="layer.worst.limit"),
    Target("floor: ours / GEMMs alone, geometric mean", "floor.mean", high=1.6),
    Target("traffic: ours / stock, worst shape", "traffic.worst_of_stock", high=0.5),
    Target("traffic: ours / least, worst shape", "traffic.worst_of_least", high=1.5),
    Target("saved bytes: ours / stock, worst shape", "saved.worst of ours", high=0.6),
    Target("saved bytes: save inputs / stock, worst shape", "saved.worst of save inputs", high=0.35),
    Target("peak bytes: ours / stock, worst shape", "peak.worst of ours", high=0.75),
    Target("peak bytes: save inputs / stock, worst shape", "peak.worst of save inputs", high=0.75),
    Target("EP 4: stock / our all_to_all, geometric mean", "ep4.mean", low=1.2),
    Target("EP 4: all_to_all / deepep, worst shape with K >= 4", "ep4.deepep", low=1.0, strict=True),
    Target("step: stock / ours, worst mesh", "step.worst", low=1.0),
    Target("growth: time per token, 64k / 4k", "growth.tokens", high=1.1, limit="growth.tokens.limit"),
    Target("growth: 8 to 256 experts, ours / the GEMMs'", "growth.experts", high=1.15),
)


def judged(figures: Mapping[str, float]) -> Iterator[dict[str, str | float | bool | None]]:
    """Every target that was measured."""
    for target in TARGETS:
        if target.figure in figures:
            reached = figures[target.figure]
            yield {
                "name": target.name,
                "target": target.bound,
                "reached": reached,
                "limit": None if target.limit is None else figures[target.limit],
                "pass": target.holds(reached),
            }


def table(figures: Mapping[str, float]) -> Table:
    """The targets beside what was reached."""
    lines = [["target", "bound", "reached", "GEMMs alone", ""]]
    for line in judged(figures):
        verdict = "pass" if line["pass"] else "FAIL"
        limit = "" if line["limit"] is None else f"{line['limit']:.3f}"
        lines.append([str(line["name"]), str(line["target"]), f"{line['reached']:.3f}", limit, verdict])
    return lines
