"""Claims about how the best method uses its modalities, from the probes of its runs."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.analysis import incomplete
from mmfusion.analysis.claims.folds import MIN_FOLDS, compare_folds, fold_means
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import (
    BETTER,
    CANNOT_TELL,
    EQUIVALENT,
    FOLDS,
    WORSE,
    Comparison,
    compare,
    holm,
    max_t,
    verdict,
)
from mmfusion.analysis.claims.statement import NO_RESULT, Statement, describe_difference, enumerate_names

Probes = Sequence[Mapping[str, Any]]  # one per run of a method, with its `fold`; None without folds


def probe_claims(best: MethodResult, probes: Probes, equivalence: float) -> list[Statement]:
    """Returns the claims that the probes of the best method's runs support, and a statement per undefined probe.

    Args:
      best: the method.
      probes: of its runs.
      equivalence: the share of the score below which an effect counts as none.
    """
    statements = []
    if len(probes) < len(best.trials):
        text = f"{len(probes)} of {len(best.trials)} runs of {best.method} were probed; the others failed."
        statements.append(Statement("probes", NO_RESULT, text))
    multimodal = any(len(modalities_of(probe)) > 1 for probe in probes)
    for key, quantity, make in (
        ("interaction", "The score of the additive projection", _interaction),
        ("perceptual", "The cost of permuting a modality", _modalities),
        ("subsets", "The score without a modality", _missing),
        ("subsets", "", _additions),
    ):
        defined = [probe for probe in probes if probe[key] and None not in _leaves(probe[key])]
        enough = len({probe["fold"] for probe in defined}) >= MIN_FOLDS if best.folds else len(defined) > 1
        if enough:
            statements += make(best, defined, equivalence)
        undefined = len(probes) - len(defined)
        if undefined and multimodal and quantity:
            text = f"{quantity} is undefined for {undefined} of {len(probes)} runs of {best.method}."
            statements.append(Statement(key, NO_RESULT, text))
    return statements


def modalities_of(probe: Mapping[str, Any]) -> list[str]:
    """Returns the names of the modalities that a probed run has."""
    return max(probe["subsets"], key=len).split("+")


def information_claim(information: Mapping[str, Any]) -> Statement:
    """Returns the partial information decomposition, with that of permuted labels in brackets."""
    train, chance = information["train"], information["chance"]
    values = ", ".join(f"{part} {train[part]:.2f} ({chance[part]:.2f})" for part in train)
    text = (
        f"Partial information decomposition of the training labels (bits; {information['estimator']}, permutation "
        f"baseline in brackets): {values}."
    )
    return Statement("information", "", text)


def _interaction(best: MethodResult, probes: Probes, equivalence: float) -> list[Statement]:
    """Returns whether the best method's score drops when its logits are projected to additive ones."""
    names, sign, metric = list(probes[0]["interaction"]), probes[0]["sign"], probes[0]["metric"]
    scores = [_means(probes, m, "whole", "additive") for m in names]
    statements = []
    for m, (comparison, p), (whole, additive) in zip(names, _family(best, probes, scores), scores, strict=True):
        found = verdict(comparison, p, equivalence * abs(statistics.fmean(whole)))
        claim = {
            BETTER: "relies on cross-modal interaction",
            EQUIVALENT: "does not rely on cross-modal interaction",
            WORSE: "scores better without cross-modal interaction",
        }.get(found, "is not shown to rely on cross-modal interaction")
        projection = "its additive projection (EMAP)"
        if len(names) > 1:
            projection = f"its additive projection over {m} and the rest (EMAP)"
        as_well = "as well, " if found == EQUIVALENT else ""
        text = (
            f"{best.method} {claim}: {projection} scores {as_well}{sign * statistics.fmean(additive):.4f}, against "
            f"{sign * statistics.fmean(whole):.4f} of the model itself ({metric} on {probes[0]['paired']} test "
            f"examples, drawn for each run); {describe_difference(comparison, p)}."
        )
        statements.append(Statement("interaction", found, text, comparison))
    return statements


def _means(probes: Probes, modality: str, first: str, second: str) -> tuple[list[float], list[float]]:
    """Returns two mean scores of each run's samples, of the interaction of a modality with the others."""
    found = [probe["interaction"][modality] for probe in probes]
    return [statistics.fmean(each[first]) for each in found], [statistics.fmean(each[second]) for each in found]


def _modalities(best: MethodResult, probes: Probes, equivalence: float) -> list[Statement]:
    """Returns for each modality the share of the best method's score that permuting it costs."""
    names, metric = sorted(probes[0]["perceptual"]), probes[0]["metric"]
    costs = [([probe["perceptual"][m] for probe in probes], [0.0] * len(probes)) for m in names]
    statements = []
    for m, (comparison, p) in zip(names, _family(best, probes, costs), strict=True):
        found = verdict(comparison, p, equivalence)
        low, high = (100 * end for end in comparison.interval)
        text = (
            f"Permuting {m} costs {best.method} {100 * comparison.difference:.1f} % of its {metric} (95 % CI {low:.1f} "
            f"to {high:.1f} %, p = {p:.3g}, {_sample(probes, comparison)}). "
        )
        text += {
            BETTER: f"{best.method} uses {m}.",
            EQUIVALENT: f"{m} contributes nothing: the 90 % interval lies within ±{100 * equivalence:g} %.",
            WORSE: f"{best.method} scores better with {m} permuted.",
        }.get(found, f"The runs cannot tell whether {best.method} uses {m}.")
        statements.append(Statement("modality", found, text, comparison))
    return statements


def _family(
    best: MethodResult, probes: Probes, values: Sequence[tuple[list[float], list[float]]]
) -> list[tuple[Comparison, float]]:
    """Compares pairs of values of each probed run, and corrects their p for the family of pairs.

    Pairs are those of seeds, or of the means of each fold.
    """
    if not best.folds:
        corrected = max_t(np.array([np.subtract(*pair) for pair in values]))
        return [(compare(*pair), float(p)) for pair, p in zip(values, corrected, strict=True)]
    folds = [probe["fold"] for probe in probes]
    comparisons = [
        compare_folds(fold_means(first, folds), fold_means(second, folds), best.test_over_train)
        for first, second in values
    ]
    return list(zip(comparisons, holm([comparison.p for comparison in comparisons]), strict=True))


def _sample(probes: Probes, comparison: Comparison) -> str:
    folds = f" in each of {comparison.n} folds, corrected resampled t" if comparison.over == FOLDS else ""
    return f"{probes[0]['rows']} test examples{folds}"


def _missing(best: MethodResult, probes: Probes, equivalence: float) -> list[Statement]:
    """Returns the best method's score without each modality."""
    del equivalence  # no claim is made
    scores = {kept: statistics.fmean(probe["subsets"][kept] for probe in probes) for kept in probes[0]["subsets"]}
    names, sign, metric = modalities_of(probes[0]), probes[0]["sign"], probes[0]["metric"]
    if len(names) < 2:
        return []
    without = [f"{sign * scores['+'.join(n for n in names if n != m)]:.4f} without {m}" for m in names]
    text = (
        f"Trained with all modalities, {best.method} scores {enumerate_names(without)} ({metric}; with all "
        f"{sign * scores['+'.join(names)]:.4f}, with none {sign * scores['']:.4f})."
    )
    return [Statement("missing", "", text)]


def _additions(best: MethodResult, probes: Probes, equivalence: float) -> list[Statement]:
    """Returns whether adding a modality ever lowers the best method's score, the most harmful addition by name."""
    del equivalence  # a fall of any size counts
    names, metric = modalities_of(probes[0]), probes[0]["metric"]
    if len(names) < 2:
        return []
    cases = list(incomplete.additions(probes[0]["subsets"]))
    gains = [[incomplete.additions(probe["subsets"])[case] for probe in probes] for case in cases]
    tested = _family(best, probes, [(values, [0.0] * len(values)) for values in gains])
    falls = sum(comparison.difference < 0 for comparison, _ in tested)
    worst = min(range(len(cases)), key=lambda i: tested[i][0].difference)
    (comparison, p), (kept, m) = tested[worst], cases[worst]
    added = f"adding {m} to {kept or 'nothing'}"
    if not falls:
        text = (
            f"No addition of a modality lowers {best.method}'s score on average ({len(cases)} additions); the least "
            f"gain is {comparison.difference:.4f} {metric}, from {added}."
        )
        return [Statement("monotonicity", "", text, comparison)]
    found = verdict(comparison, p, 0.0)
    shown = "is shown" if found == WORSE else "may be chance"
    text = (
        f"{falls} of {len(cases)} additions of a modality lower {best.method}'s score on average, most {added}, by "
        f"{-comparison.difference:.4f} {metric}, which {shown} ({describe_difference(comparison, p)})."
    )
    return [Statement("monotonicity", found if found == WORSE else CANNOT_TELL, text, comparison)]


def _leaves(tree: Any) -> Iterator[Any]:
    """Yields the leaves of nested lists and mappings; undefined values are None."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for child in tree:
        yield from _leaves(child)
