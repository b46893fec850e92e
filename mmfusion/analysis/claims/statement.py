"""A claim as a sentence with its evidence, and phrases that several sentences share."""

import dataclasses
from collections.abc import Sequence

from mmfusion.analysis.claims.significance import FOLDS, Comparison, min_pairs

NEGLIGIBLE, NO_RESULT = "negligible", "no result"  # verdicts in addition to better, worse and inconclusive
MIN_SEEDS = min_pairs(1)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence of the report.

    Attributes:
      about: the topic.
      verdict: `better`, `worse`, `inconclusive`, `negligible`, `no result`, or "" for a measurement without a test.
      text: the sentence.
      evidence: the comparison that supports it, if any.
    """

    about: str
    verdict: str
    text: str
    evidence: Comparison | None = None


def enumerate_names(names: Sequence[str]) -> str:
    """Returns `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def describe_difference(comparison: Comparison, p: float, higher: bool = True) -> str:
    """Returns a difference with its interval and its corrected p."""
    low, high = comparison.interval
    sign = "" if higher else " (lower is better; the sign is reversed)"
    by = ", corrected resampled t" if comparison.over == FOLDS else ""
    return (
        f"{comparison.difference:+.4f}{sign} over {comparison.n} {comparison.over} (95 % CI {low:+.4f} to {high:+.4f}, "
        f"p = {p:.3g}{by})"
    )


def needed_after_holm(comparisons: int, seeds: int, what: str) -> str:
    """Returns the reason why no comparison can be significant, or "" if the seeds suffice for Holm's correction."""
    if seeds >= (needed := min_pairs(comparisons)):
        return ""
    return f"with {comparisons} {what} at least {needed} seeds are needed ({seeds} were run)"
