"""A claim as a sentence with its evidence, and phrases that several sentences share."""

import dataclasses
from collections.abc import Sequence

from mmfusion.analysis.claims.crossed import NewData
from mmfusion.analysis.claims.significance import FOLDS, Comparison

NO_RESULT = "no result"  # a verdict in addition to those of `significance.verdict`


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence of the report.

    Attributes:
      about: the topic.
      verdict: that of `significance.verdict`, `no result`, or "" for a measurement without a test.
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


def describe_new_data(found: NewData | None) -> str:
    """Returns what is known of a difference on new data, as a sentence; "" where it was not judged."""
    if found is None:
        return ""
    (low, high), claim = found.interval, found.verdict
    return (
        f" On new data: {claim} ({found.difference:+.4f}, 95 % CI {low:+.4f} to {high:+.4f}, p = {found.p:.3g}, over "
        f"runs and {found.examples:,} test examples)."
    )
