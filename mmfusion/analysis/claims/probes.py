"""Claims about how the best method uses its modalities, from the probes of its runs."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmfusion.analysis.claims.folds import MIN_FOLDS, compare_folds, fold_means
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import BETTER, FOLDS, LEVEL, WORSE, Comparison, compare, holm, verdict
from mmfusion.analysis.claims.statement import (
    MIN_SEEDS,
    NEGLIGIBLE,
    NO_RESULT,
    Statement,
    describe_difference,
    enumerate_names,
    needed_after_holm,
)

EQUIVALENCE = 0.01  # share of the score below which an effect is negligible

Probes = Sequence[Mapping[str, Any]]  # one per run of a method, with its `fold`; None without folds


def probe_claims(best: MethodResult, probes: Probes) -> list[Statement]:
    """Returns the claims that the probes of the best method's runs support, and a statement per undefined probe."""
    statements = []
    if len(probes) < len(best.trials):
        text = f"{len(probes)} of {len(best.trials)} runs of {best.method} were probed; the others failed."
        statements.append(Statement("probes", NO_RESULT, text))
    multimodal = any(len(modalities_of(probe)) > 1 for probe in probes)
    for key, quantity, make in (
        ("interaction", "The score of the additive projection", _interaction),
        ("perceptual", "The cost of permuting a modality", _modalities),
        ("subsets", "The score without a modality", _missing),
    ):
        defined = [probe for probe in probes if probe[key] and None not in _leaves(probe[key])]
        enough = len({probe["fold"] for probe in defined}) >= MIN_FOLDS if best.folds else len(defined) > 1
        if enough:
            statements += make(best, defined)
        undefined = len(probes) - len(defined)
        if undefined and multimodal:
            text = f"{quantity} is undefined for {undefined} of {len(probes)} runs of {best.method}."
            statements.append(Statement(key, NO_RESULT, text))
    return statements


def modalities_of(probe: Mapping[str, Any]) -> list[str]:
    """Returns the names of the modalities that a probed run has."""
    return max(probe["subsets"], key=len).split("+")


def information_claim(information: Mapping[str, Mapping[str, float]], modalities: Sequence[str]) -> Statement:
    """Returns the partial information decomposition of two modalities, with that of permuted labels in brackets."""
    parts = {
        "redundant": "redundant",
        f"unique {modalities[0]}": "unique_1",
        f"unique {modalities[1]}": "unique_2",
        "synergistic": "synergy",
    }
    train, chance = information["train"], information["chance"]
    values = ", ".join(f"{part} {train[key]:.2f} ({chance[key]:.2f})" for part, key in parts.items())
    text = (
        "Partial information decomposition of the training labels (bits; k-means features, permutation baseline in "
        f"brackets): {values}."
    )
    return Statement("information", "", text)


def _interaction(best: MethodResult, probes: Probes) -> list[Statement]:
    """Returns whether the best method's score drops when its logits are projected to additive ones."""
    names, sign, metric = list(probes[0]["interaction"]), probes[0]["sign"], probes[0]["metric"]
    scores = [
        [[statistics.fmean(probe["interaction"][m][key]) for probe in probes] for key in ("whole", "additive")]
        for m in names
    ]
    comparisons = [_compare(best, probes, whole, additive) for whole, additive in scores]
    corrected = holm([comparison.p for comparison in comparisons])
    statements = []
    for m, comparison, p, (whole, additive) in zip(names, comparisons, corrected, scores, strict=True):
        found = effect_verdict(comparison, p, statistics.fmean(whole))
        claim = {
            BETTER: "relies on cross-modal interaction",
            NEGLIGIBLE: "does not rely on cross-modal interaction",
            WORSE: "scores better without cross-modal interaction",
        }.get(found, "is not shown to rely on cross-modal interaction")
        projection = "its additive projection (EMAP)"
        if len(names) > 1:
            projection = f"its additive projection over {m} and the rest (EMAP)"
        as_well = "as well, " if found == NEGLIGIBLE else ""
        text = (
            f"{best.method} {claim}: {projection} scores {as_well}{sign * statistics.fmean(additive):.4f}, against "
            f"{sign * statistics.fmean(whole):.4f} of the model itself ({metric} on {probes[0]['paired']} test "
            f"examples, drawn for each run); {describe_difference(comparison, p)}."
        )
        statements.append(Statement("interaction", found, text, comparison))
    return statements


def _modalities(best: MethodResult, probes: Probes) -> list[Statement]:
    """Returns for each modality the share of the best method's score that permuting it costs."""
    names, metric = sorted(probes[0]["perceptual"]), probes[0]["metric"]
    none = [0.0] * len(probes)
    comparisons = [_compare(best, probes, [probe["perceptual"][m] for probe in probes], none) for m in names]
    corrected = holm([comparison.p for comparison in comparisons])
    statements = []
    for m, comparison, p in zip(names, comparisons, corrected, strict=True):
        found = effect_verdict(comparison, p, 1.0)
        low, high = (100 * end for end in comparison.interval)
        text = (
            f"Permuting {m} costs {best.method} {100 * comparison.difference:.1f} % of its {metric} (95 % CI {low:.1f} "
            f"to {high:.1f} %, p = {p:.3g}, {_sample(probes, comparison)}). "
        )
        text += {
            BETTER: f"{best.method} uses {m}.",
            NEGLIGIBLE: f"{m} contributes nothing: the interval lies within ±{100 * EQUIVALENCE:.0f} %.",
            WORSE: f"{best.method} scores better with {m} permuted.",
        }.get(found, _inconclusive(p, len(names), comparison))
        statements.append(Statement("modality", found, text, comparison))
    return statements


def _compare(best: MethodResult, probes: Probes, first: list[float], second: list[float]) -> Comparison:
    """Compares two values of each probed run, over seeds or over the means of each fold."""
    if not best.folds:
        return compare(first, second)
    folds = [probe["fold"] for probe in probes]
    return compare_folds(fold_means(first, folds), fold_means(second, folds), best.test_over_train)


def _sample(probes: Probes, comparison: Comparison) -> str:
    folds = f" in each of {comparison.n} folds, corrected resampled t" if comparison.over == FOLDS else ""
    return f"{probes[0]['rows']} test examples{folds}"


def _inconclusive(p: float, modalities: int, comparison: Comparison) -> str:
    if p < 1 - LEVEL:
        return "Inconclusive: the bootstrap intervals do not support an effect."
    few = needed_after_holm(modalities, comparison.n, "modalities") if comparison.over != FOLDS else ""
    return f"Not significant after Holm's correction{f': {few}' if few else ''}."


def _missing(best: MethodResult, probes: Probes) -> list[Statement]:
    """Returns the best method's score without each modality."""
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


def effect_verdict(comparison: Comparison, p: float, score: float) -> str:
    """Returns `negligible` if both 95 % intervals lie within EQUIVALENCE of the score, otherwise the verdict."""
    ends = (*comparison.interval, *comparison.normal_interval)
    if (comparison.n >= MIN_SEEDS or comparison.over == FOLDS) and max(map(abs, ends)) < EQUIVALENCE * abs(score):
        return NEGLIGIBLE
    return verdict(comparison, p)


def _leaves(tree: Any) -> Iterator[Any]:
    """Yields the leaves of nested lists and mappings; undefined values are None."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for child in tree:
        yield from _leaves(child)
