"""The state shared by the parts of a report: the ablation, its methods in order, and their styles."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion.analysis.ablation.plan import REFERENCE, Plan, Trial, fold_of
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import FOLDS, SEEDS
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.report.tables import FUSED, Line
from mmfusion.analysis.report.theme import Style, method_styles

MAX_PLOTTED = 8  # curves in a figure, in addition to the reference


@dataclasses.dataclass(frozen=True)
class ReportContext:
    """An ablation in its directory, and the lines of its main table."""

    outcome: Outcome
    plan: Plan
    directory: Path
    groups: Mapping[str, Sequence[Line]]

    @property
    def trials(self) -> dict[str, Trial]:
        """The plan's trials by name."""
        return {trial.name: trial for trial in self.plan.trials}

    @property
    def over(self) -> str:
        """What statistics are over: `seeds` or `folds`."""
        return FOLDS if any(fold_of(trial) is not None for trial in self.plan.trials) else SEEDS

    @property
    def interval(self) -> str:
        """What the intervals of means are."""
        return "95 % interval of the corrected resampled t" if self.over == FOLDS else "95 % Student's t interval"

    @property
    def fused(self) -> list[MethodResult]:
        """Fusion strategies with a score, best test score first."""
        return [line.result for line in self.groups.get(FUSED, ()) if line.result.test]

    @property
    def ranked(self) -> list[MethodResult]:
        """Fusion strategies with a score, the selected best method first, then by mean validation score."""
        sign, best = -1 if self.outcome.higher else 1, self.outcome.claims.best
        return sorted(self.fused, key=lambda result: (result.method != best, sign * statistics.fmean(result.valid)))

    @property
    def styles(self) -> dict[str, Style]:
        """Colours and markers of the methods plotted as curves."""
        return method_styles([result.method for result in self.ranked if result.method != REFERENCE][:MAX_PLOTTED])

    @property
    def plotted(self) -> list[MethodResult]:
        """The methods plotted as curves, best test score first."""
        return [result for result in self.fused if result.method in self.styles]

    @property
    def plotted_note(self) -> str:
        """A sentence about the methods plotted as curves; "" if all are."""
        if len(self.plotted) == len(self.fused):
            return ""
        reference = f" and {REFERENCE}" if any(result.method == REFERENCE for result in self.plotted) else ""
        return f" Of {len(self.fused)} strategies, the {MAX_PLOTTED} best on validation{reference} are drawn."

    @property
    def modalities(self) -> Mapping[str, Any]:
        """Options of each modality of the fusion strategies, by name."""
        return max((trial.config["data"]["modalities"] for trial in self.plan.trials), key=len)
