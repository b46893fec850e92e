"""What a report is made from: an ablation, its methods in order, and how each of them looks."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion.analysis.ablate import Outcome
from mmfusion.analysis.ablation.plan import REFERENCE, Cell, Plan
from mmfusion.analysis.claims.selection import Row
from mmfusion.analysis.report.tables import FUSED, Line
from mmfusion.analysis.report.theme import Look, looks

MOST = 8  # methods in a figure of curves, besides the reference


@dataclasses.dataclass(frozen=True)
class Study:
    """What the sections are made from: an ablation in its directory, and the lines of its main table."""

    outcome: Outcome
    plan: Plan
    directory: Path
    groups: Mapping[str, Sequence[Line]]

    @property
    def cells(self) -> dict[str, Cell]:
        """The plan's cells by name."""
        return {cell.name: cell for cell in self.plan.cells}

    @property
    def fused(self) -> list[Row]:
        """Fusion strategies that ended, the best test score first."""
        return [line.row for line in self.groups.get(FUSED, ()) if line.row.test]

    @property
    def ranked(self) -> list[Row]:
        """The same, first the best method, which lost the fewest seeds, then by mean validation score."""
        sign, best = -1 if self.outcome.higher else 1, self.outcome.claims.best
        return sorted(self.fused, key=lambda row: (row.method != best, sign * statistics.fmean(row.valid)))

    @property
    def look(self) -> dict[str, Look]:
        """Colours and marks of the methods that are drawn as curves."""
        return looks([row.method for row in self.ranked if row.method != REFERENCE][:MOST])

    @property
    def drawn(self) -> list[Row]:
        """Those methods, the best test score first."""
        return [row for row in self.fused if row.method in self.look]

    @property
    def only(self) -> str:
        """Says which methods are drawn as curves, where it is not all of them."""
        if len(self.drawn) == len(self.fused):
            return ""
        also = f" and {REFERENCE}" if any(row.method == REFERENCE for row in self.drawn) else ""
        return f" Of {len(self.fused)} strategies the {MOST} best on validation{also} are drawn."

    @property
    def modalities(self) -> Mapping[str, Any]:
        """Options of each modality that the fusion strategies see, by name."""
        return max((cell.config["data"]["modalities"] for cell in self.plan.cells), key=len)
