"""The claims of an ablation as sentences with their evidence, limited to what the number of seeds supports."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.folds import MIN_FOLDS
from mmfusion.analysis.claims.probes import information_claim, modalities_of, probe_claims
from mmfusion.analysis.claims.selection import Difference, MethodResult
from mmfusion.analysis.claims.significance import BETTER, INCONCLUSIVE, SEEDS, WORSE, min_pairs
from mmfusion.analysis.claims.statement import (
    MIN_SEEDS,
    NO_RESULT,
    Statement,
    describe_difference,
    enumerate_names,
    needed_after_holm,
)

RULE = (
    "Each method's hyperparameters are selected from one search space by their mean validation {metric}; those that "
    "fail on fewer seeds rank first. The best strategy and the best unimodal baseline are also selected on validation, "
    "and test scores are read once, afterwards. Differences are paired by seed; intervals and p values describe the "
    "variation over training seeds on one test set. `better` requires p < 0.05 in the exact sign-flip test, a 95 % BCa "
    "bootstrap interval of the difference above 0, and an interval of P(A>B) above 0.5 that reaches 0.75; `worse` is "
    "the mirror image, and everything else is `inconclusive`. p values are corrected for multiple comparisons: by "
    "Holm's method where each strategy is compared with {reference} or with the best unimodal baseline, and where each "
    "modality or interaction is tested for an effect; by the max-T permutation method (Westfall and Young) where the "
    "best strategy is compared with the best unimodal or classical baseline. An effect is `negligible` where its 95 % "
    "intervals, by the bootstrap and by Student's t, lie within 1 % of the score."
)
RULE_OVER_FOLDS = (
    "Each fold is the test split once. In each fold by itself, each method's hyperparameters are selected from one "
    "search space by their mean validation {metric}; those that fail on fewer seeds rank first. The best strategy and "
    "the best baseline are selected by validation over all folds. Scores are means over the seeds of a fold, and "
    "differences are paired by fold. Folds have training rows in common and are not independent: intervals and p "
    "values are those of the corrected resampled t (Nadeau and Bengio 2003), in which the variance of a mean over J "
    "folds is the sample variance times 1/J + n_test/n_train. They describe the variation over training rows, test "
    "rows and seeds of this data. `better` requires p < 0.05 after correction for multiple comparisons, `worse` is "
    "the mirror image, and everything else is `inconclusive`. p values are corrected by Holm's method where each "
    "strategy is compared with {reference} or with the best unimodal baseline, and where each modality or interaction "
    "is tested for an effect; and by Bonferroni's method, for every pair of a strategy and a baseline, where the best "
    "strategy is compared with the best unimodal or classical baseline, as validation rows of one fold are test rows "
    "of another. An effect is `negligible` where its 95 % interval lies within 1 % of the score."
)
INPUT_FREE = ("majority", "mean")  # classical baselines


@dataclasses.dataclass(frozen=True)
class Claims:
    """The claims of an ablation.

    Attributes:
      rule: how methods were selected and compared.
      none: the reason for having no claims, or "".
      statements: the most important first.
      best: the method that validation selected; "" if no method has a score.
      against_unimodal: differences of each fused method from the best unimodal baseline.
      against_reference: differences of each fused method from its reference.
    """

    rule: str
    none: str
    statements: tuple[Statement, ...] = ()
    best: str = ""
    against_unimodal: tuple[Difference, ...] = ()
    against_reference: tuple[Difference, ...] = ()


def claims(
    results: Sequence[MethodResult],
    classical: Sequence[MethodResult],
    probes: Mapping[str, Mapping[str, Any]],
    information: Mapping[str, Mapping[str, float]],
    metric: str,
    higher: bool,
) -> Claims:
    """Returns the claims that the results of an ablation support.

    Args:
      results: one result per method.
      classical: results of classical baselines; those with at most one modality are unimodal baselines, too.
      probes: trial name -> the result of `probe_run`, at least for the best method's trials.
      information: the decomposition of two modalities, for `train` and for permuted labels (`chance`); may be empty.
      metric: the metric that methods are compared by.
      higher: whether a higher value is better.
    """
    references = {method: result for method, result in selection.references(results).items() if result.test}
    names = {result.method for result in references.values()}
    over_folds = any(result.folds or result.failed_folds for result in results)
    rule = (RULE_OVER_FOLDS if over_folds else RULE).format(
        metric=metric, reference=names.pop() if len(names) == 1 else REFERENCE
    )
    fused = [result for result in results if not result.unimodal_baseline]
    best = selection.best(fused, higher)
    if best is None:
        return Claims(rule, "No claims: no run of a fusion strategy has a score.")
    if over_folds and len(best.units) < MIN_FOLDS:
        found = f"{best.method} has a score in {len(best.units)} folds"
        none = f"No claims: {found}, and a difference needs at least {MIN_FOLDS}."
        return Claims(rule, none, best=best.method)
    if not over_folds and len(best.seeds) < 2:
        reason = f"{best.method} has a score on {len(best.seeds)} of its seeds" if best.failed_seeds else "one seed"
        none = f"No claims: {reason}; a difference needs at least {MIN_SEEDS} (--seeds={MIN_SEEDS})."
        return Claims(rule, none, best=best.method)
    statements: list[Statement] = []
    if not over_folds and len(best.seeds) < MIN_SEEDS:
        text = f"{len(best.seeds)} seeds cannot show a difference: below {MIN_SEEDS} no test reaches p < 0.05."
        statements.append(Statement("seeds", INCONCLUSIVE, text))
    scored = [result for result in fused if result.test]
    baselines = [result for result in (*results, *classical) if result.unimodal_baseline]
    unimodal = selection.best(
        baselines, higher, fewest_failures_first=False
    )  # a baseline must not lose by failed seeds
    if unimodal:
        statements.append(_fusion_claim(selection.selected_difference(scored, baselines, best, unimodal, higher),
                                        best, unimodal, higher))  # fmt: skip
    multimodal = [result for result in classical if not result.unimodal_baseline]
    joint = selection.best(multimodal, higher)
    if joint:
        statements.append(_classical_claim(selection.selected_difference(scored, multimodal, best, joint, higher),
                                           joint, higher))  # fmt: skip
    against_unimodal = selection.differences([(result, unimodal) for result in scored], higher) if unimodal else []
    pairs = [(result, references[result.method]) for result in scored if result.method in references]
    against_reference = selection.differences(pairs, higher)
    statements += _strategy_claims(against_reference)
    cells = zip(best.trials, best.folds or [None] * len(best.trials), strict=True)
    probed = [{**probes[name], "fold": fold} for name, fold in cells if name in probes]
    statements += probe_claims(best, probed)
    modalities = modalities_of(probed[0]) if probed else []
    if information and len(modalities) == 2:
        statements.append(information_claim(information, modalities))
    if failed := [result.method for result in results if not result.test]:
        statements.append(Statement("failed", NO_RESULT, f"Failed on every seed: {enumerate_names(failed)}."))
    return Claims(rule, "", tuple(statements), best.method, tuple(against_unimodal), tuple(against_reference))


def _fusion_claim(difference: Difference, best: MethodResult, unimodal: MethodResult, higher: bool) -> Statement:
    claim = {BETTER: "Fusion helps", WORSE: "Fusion hurts"}.get(difference.verdict, "Fusion is not shown to help")
    kind = "baseline without inputs" if unimodal.method in INPUT_FREE else "best unimodal baseline"
    text = (
        f"{claim}: {best.method} scores {best.mean:.4f}, the {kind} ({unimodal.method}) {unimodal.mean:.4f}; "
        f"{_describe(difference, higher)}."
    )
    if difference.seeds_needed:
        text += f" Detecting such a difference would take about {difference.seeds_needed} seeds."
    return Statement("fusion", difference.verdict, text, difference.comparison)


def _classical_claim(difference: Difference, joint: MethodResult, higher: bool) -> Statement:
    claim = {BETTER: "outperforms", WORSE: "underperforms"}.get(difference.verdict, "is not distinguishable from")
    text = (
        f"{difference.method} {claim} the best classical baseline on all modalities ({joint.method}: {joint.mean:.4f});"
        f" {_describe(difference, higher)}."
    )
    return Statement("classical", difference.verdict, text, difference.comparison)


def _strategy_claims(differences: Sequence[Difference]) -> list[Statement]:
    """Returns a statement for the strategies better than the reference, for those worse, and for the others."""
    statements = []
    others = {difference.other for difference in differences}
    reference = others.pop() if len(others) == 1 else REFERENCE
    # No number of folds is too few for Student's t.
    pairs = [d.comparison.n for d in differences if d.comparison and d.comparison.over == SEEDS]
    few = needed_after_holm(len(pairs), max(pairs), "comparisons") if pairs else ""
    if few:
        text = (
            f"No strategy can be distinguished from {reference} after Holm's correction: {few}; give "
            f"--seeds={min_pairs(len(pairs))}."
        )
        statements.append(Statement("strategies", INCONCLUSIVE, text))
    for verdict, phrase in ((BETTER, "Better than"), (WORSE, "Worse than"), (INCONCLUSIVE, "Not distinguishable from")):
        group = [difference for difference in differences if difference.verdict == verdict]
        if group:
            names = enumerate_names([f"{difference.method}{_without_failed(difference)}" for difference in group])
            statements.append(Statement("strategies", verdict, f"{phrase} {reference}: {names}.{_seeds_needed(group)}"))
    return statements


def _seeds_needed(group: Sequence[Difference]) -> str:
    """Returns the number of seeds needed to distinguish the strategies, fewest first."""
    by_seeds: dict[int, list[str]] = {}
    for difference in group:
        if difference.seeds_needed:
            by_seeds.setdefault(difference.seeds_needed, []).append(difference.method)
    if not by_seeds:
        return ""
    parts = [f"{seeds} for {enumerate_names(names)}" for seeds, names in sorted(by_seeds.items())]
    return f" Seeds needed to detect the observed differences: about {'; '.join(parts)}."


def _without_failed(difference: Difference) -> str:
    if difference.failed_folds:
        folds = enumerate_names([str(fold) for fold in difference.failed_folds])
        return f" (without the seeds of fold {folds} where one of the two failed)"
    seeds = enumerate_names([str(seed) for seed in difference.failed_seeds]) if difference.failed_seeds else ""
    return f" (without seed {seeds}, where one of the two failed)" if seeds else ""


def _describe(difference: Difference, higher: bool) -> str:
    if difference.comparison is None or difference.p is None:
        return "too few seeds or folds can be paired"
    return describe_difference(difference.comparison, difference.p, higher) + _without_failed(difference)
