"""The claims of an ablation as sentences with their evidence, limited to what the number of seeds supports."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims import collapse, selection, undertrained
from mmfusion.analysis.claims.differences import NO_SCOPE, Difference, Scope, differences, selected_difference
from mmfusion.analysis.claims.folds import MIN_FOLDS
from mmfusion.analysis.claims.probes import information_claim, probe_claims
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import BETTER, CANNOT_TELL, EQUIVALENT, MIN_SEEDS, WORSE
from mmfusion.analysis.claims.statement import (
    NO_RESULT,
    Statement,
    describe_difference,
    describe_new_data,
    enumerate_names,
)
from mmfusion.analysis.claims.undertrained import Undertrained

RULE = (
    "Each method's hyperparameters are selected from one search space by their mean validation {metric}; those that "
    "fail on fewer seeds rank first. The best strategy and the best unimodal baseline are also selected on validation, "
    "and test scores are read once, afterwards. Differences are paired by seed. Verdicts, 95 % Student's t intervals "
    "and p values speak of new training runs on this test set: two methods are `equivalent` where two one-sided tests "
    "at 0.05 place their difference within {margin} of the score of the other; otherwise `better` requires p < 0.05 in "
    "the exact sign-flip test and an interval above 0, `worse` is the mirror image, and everything else is "
    "`cannot tell`. p values are corrected for each family of comparisons by the max-T method (Westfall and Young): "
    "each strategy against {reference}, each against the best unimodal baseline, each modality, each interaction, and "
    "every pair of candidates where the best strategy is compared with the best baseline. That difference is corrected "
    "for the selection of both by resampling the seeds. Where the {metric} is a mean over examples, each difference is "
    "also judged for new training runs on new data: seeds and test examples are crossed random effects, and p is "
    "corrected by Bonferroni's method."
)
RULE_OVER_FOLDS = (
    "Each fold is the test split once. In each fold by itself, each method's hyperparameters are selected from one "
    "search space by their mean validation {metric}; those that fail on fewer seeds rank first. The best strategy and "
    "the best baseline are selected by validation over all folds. Scores are means over the seeds of a fold, and "
    "differences are paired by fold. Folds have training rows in common and are not independent: intervals and p "
    "values are those of the corrected resampled t (Nadeau and Bengio 2003), in which the variance of a mean over J "
    "folds is the sample variance times 1/J + n_test/n_train. They describe the variation over training rows, test "
    "rows and seeds of this data. Two methods are `equivalent` where two one-sided tests at 0.05 place their "
    "difference within {margin} of the score of the other; otherwise `better` requires p < 0.05 after correction for "
    "multiple comparisons, `worse` is the mirror image, and everything else is `cannot tell`. p values are corrected "
    "by Holm's method where each strategy is compared with {reference} or with the best unimodal baseline, and where "
    "each modality or interaction is tested for an effect; and by Bonferroni's method, for every pair of a strategy "
    "and a baseline, where the best strategy is compared with the best unimodal or classical baseline, as validation "
    "rows of one fold are test rows of another."
)
RULE_OF_TRAINING = (
    " A method is undertrained if its best step is the last one in more than a fifth of its runs, or if its validation "
    "{metric} improves by more than {margin} of itself over the last fifth of training; no claim rests on it."
)
INPUT_FREE = ("majority", "mean")  # classical baselines
STRONG = "late_transformer"  # tuned, does any other strategy beat late fusion by a transformer? (arXiv:2512.22991)
FLOOR = (
    " Unimodal baselines are each modality alone, the ensembles of these runs (`mean`: of their probabilities or "
    "values; `stacked`: a linear model of their outputs, fitted on validation, whose validation score is that of rows "
    "left out of the fit), and classical models of one modality."
)


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
      undertrained: the methods that no claim rests on, as they were still improving.
      scope: the number of `strategies` with a score, of tuning `trials` of each (0: none), of hyperparameter `settings`
        that were selected from, and of `test_examples` (0: unknown).
    """

    rule: str
    none: str
    statements: tuple[Statement, ...] = ()
    best: str = ""
    against_unimodal: tuple[Difference, ...] = ()
    against_reference: tuple[Difference, ...] = ()
    undertrained: tuple[Undertrained, ...] = ()
    scope: Mapping[str, int] = dataclasses.field(default_factory=dict)


def claims(
    results: Sequence[MethodResult],
    classical: Sequence[MethodResult],
    probes: Mapping[str, Mapping[str, Any]],
    information: Mapping[str, Any],
    metric: str,
    higher: bool,
    scope: Scope = NO_SCOPE,
) -> Claims:
    """Returns the claims that the results of an ablation support.

    Args:
      results: one result per method.
      classical: results of classical baselines; those with at most one modality are unimodal baselines, too.
      probes: trial name -> the result of `probe_run`, at least for the best method's trials.
      information: that of `floors.Classical`; may be empty.
      metric: the metric that methods are compared by.
      higher: whether a higher value is better.
      scope: what comparisons need beside scores.
    """
    chance = collapse.chance_score(classical, INPUT_FREE, higher)
    if chance is not None:
        results = [collapse.set_apart(result, chance, higher) for result in results]
    references = {method: result for method, result in selection.references(results).items() if result.test}
    names = {result.method for result in references.values()}
    over_folds = any(result.folds or result.failed_folds for result in results)
    late = undertrained.undertrained(results, scope.training, higher, scope.equivalence)
    scope = dataclasses.replace(scope, undertrained=undertrained.resting_on(late, results, scope.training))
    rule = (RULE_OVER_FOLDS if over_folds else RULE) + FLOOR + RULE_OF_TRAINING
    rule = rule.format(
        metric=metric,
        reference=names.pop() if len(names) == 1 else REFERENCE,
        margin=f"{scope.equivalence:.2g}",
    )
    fused = [result for result in results if not result.unimodal_baseline]
    best = selection.best(fused, higher)
    if best is None:
        return Claims(rule, "No claims: no run of a fusion strategy has a score.")
    if over_folds and len(best.units) < MIN_FOLDS:
        found = f"{best.method} has a score in {len(best.units)} folds"
        none = f"No claims: {found}, and a difference needs at least {MIN_FOLDS}."
        return Claims(rule, none, best=best.method, undertrained=late)
    if not over_folds and len(best.seeds) < 2:
        reason = f"{best.method} has a score on {len(best.seeds)} of its seeds" if best.failed_seeds else "one seed"
        none = f"No claims: {reason}; a difference needs at least {MIN_SEEDS} (--seeds={MIN_SEEDS})."
        return Claims(rule, none, best=best.method, undertrained=late)
    statements: list[Statement] = []
    if not over_folds and len(best.seeds) < MIN_SEEDS:
        text = f"{len(best.seeds)} seeds cannot show a difference: below {MIN_SEEDS} no test reaches p < 0.05."
        statements.append(Statement("seeds", CANNOT_TELL, text))
    if late:
        statements.append(undertrained.statement(late, metric))
    scored = [result for result in fused if result.test]
    tried = _tried(scored, scope)
    baselines = [result for result in (*results, *classical) if result.unimodal_baseline]
    unimodal = selection.best(
        baselines, higher, fewest_failures_first=False
    )  # a baseline must not lose by failed seeds
    if unimodal:
        difference = selected_difference(scored, baselines, best, unimodal, higher, scope)
        statements.append(_fusion_claim(difference, best, unimodal, higher, _scope(tried), scope.equivalence))
    multimodal = [result for result in classical if not result.unimodal_baseline]
    joint = selection.best(multimodal, higher)
    if joint:
        difference = selected_difference(scored, multimodal, best, joint, higher, scope)
        noun = f"the best classical baseline on all modalities ({joint.method}: {joint.mean:.4f})"
        statements.append(_claim_against("classical", difference, noun, higher))
    statements += _strong_claim(scored, higher, scope)
    against_unimodal = differences([(result, unimodal) for result in scored], higher, scope) if unimodal else []
    pairs = [(result, references[result.method]) for result in scored if result.method in references]
    against_reference = differences(pairs, higher, scope)
    statements += _strategy_claims(against_reference, scope.equivalence)
    cells = zip(best.trials, best.folds or [None] * len(best.trials), strict=True)
    probed = [{**probes[name], "fold": fold} for name, fold in cells if name in probes]
    statements += [_of_trained(best, scope, one) for one in probe_claims(best, probed, scope.equivalence)]
    if information:
        statements.append(information_claim(information))
    reference = next((row for row in references.values()), None)
    if statement := collapse.rate_statement(fused, reference):
        statements.append(statement)
    if failed := [result.method for result in results if not result.test]:
        statements.append(Statement("failed", NO_RESULT, f"Failed on every seed: {enumerate_names(failed)}."))
    if scope.untuned:
        names = enumerate_names(scope.untuned)
        text = f"Tuning failed with every setting, and the config's own values were used: {names}."
        statements.append(Statement("untuned", NO_RESULT, text))
    return Claims(
        rule, "", tuple(statements), best.method, tuple(against_unimodal), tuple(against_reference), late, tried
    )


def _tried(strategies: Sequence[MethodResult], scope: Scope) -> dict[str, int]:
    """Returns the numbers that a claim about the best strategy is limited to; see `Claims.scope`."""
    return {
        "strategies": len(strategies),
        "trials": scope.trials,
        "settings": scope.tuned,
        "test_examples": scope.test_examples,
    }


def _scope(tried: Mapping[str, int], other: str = "") -> str:
    """Returns what the best strategy was selected from, how it was tuned, and on how many examples it was tested."""
    each = "each " if tried["strategies"] > 1 else ""
    parts = [f"of the {tried['strategies']} {other}strategies tried"] if each else []
    if tried["trials"]:
        parts.append(f"{each}tuned with {tried['trials']} trial{'s' if tried['trials'] > 1 else ''}")
    elif tried["settings"] > 1:
        parts.append(f"{each}with {tried['settings']} settings")
    if tried["test_examples"]:
        parts.append(f"on {tried['test_examples']:,} test examples")
    return ", ".join(parts)


def _of_trained(best: MethodResult, scope: Scope, one: Statement) -> Statement:
    """Returns a statement about the best strategy, without its verdict if the strategy is undertrained."""
    if best.method not in scope.undertrained or one.verdict in ("", NO_RESULT):
        return one
    text = f"Not claimed, as {undertrained.reason([best.method])}: {one.text}"
    return dataclasses.replace(one, verdict=CANNOT_TELL, text=text)


def _fusion_claim(
    difference: Difference, best: MethodResult, unimodal: MethodResult, higher: bool, scope: str, equivalence: float
) -> Statement:
    claim = {
        BETTER: "Fusion helps",
        WORSE: "Fusion hurts",
        EQUIVALENT: f"Fusion changes less than {equivalence:.2g} of the score",
    }.get(difference.verdict, "Fusion is not shown to help")
    if difference.undertrained:
        claim += f", as {undertrained.reason(difference.undertrained)}"
    kind = "baseline without inputs" if unimodal.method in INPUT_FREE else "best unimodal baseline"
    text = (
        f"{claim}: {best.method}{f' ({scope})' if scope else ''} scores {best.mean:.4f}, the {kind} "
        f"({unimodal.method}) {unimodal.mean:.4f}; {_describe(difference, higher)}."
    )
    if difference.seeds_needed:
        text += f" About {difference.seeds_needed} seeds would tell."
    return Statement("fusion", difference.verdict, text + describe_new_data(difference.new_data), difference.comparison)


def _strong_claim(strategies: Sequence[MethodResult], higher: bool, scope: Scope) -> list[Statement]:
    """Returns whether the best other strategy is better than late fusion by a transformer, if that is one of them."""
    own = [result for result in strategies if result.fusion == STRONG]
    others = [result for result in strategies if result.fusion != STRONG]
    strong, best = selection.best(own, higher), selection.best(others, higher)
    if strong is None or best is None:
        return []
    settings = scope.trials or scope.tuned
    tuned = f"tuned with {settings} settings" if settings > 1 else "not tuned"
    noun = f"the strong baseline {strong.method} ({tuned}: {strong.mean:.4f})"
    difference = selected_difference(others, own, best, strong, higher, scope)
    found = _scope(_tried(others, scope), "other ")
    return [_claim_against("strong baseline", difference, noun, higher, f" ({found})" if found else "")]


def _claim_against(about: str, difference: Difference, noun: str, higher: bool, selected: str = "") -> Statement:
    """Returns how the best strategy compares with a baseline that uses all modalities."""
    claim = {BETTER: "outperforms", WORSE: "underperforms", EQUIVALENT: "is equivalent to"}.get(
        difference.verdict, "is not distinguishable from"
    )
    if difference.undertrained:
        claim = f"is not claimed to differ, as {undertrained.reason(difference.undertrained)}, from"
    needed = f" About {difference.seeds_needed} seeds would tell." if difference.seeds_needed else ""
    text = (
        f"{difference.method}{selected} {claim} {noun}; {_describe(difference, higher)}.{needed}"
        f"{describe_new_data(difference.new_data)}"
    )
    return Statement(about, difference.verdict, text, difference.comparison)


def _strategy_claims(found: Sequence[Difference], equivalence: float) -> list[Statement]:
    """Returns a statement for the strategies better than the reference, for those worse, and for the others."""
    statements = []
    others = {difference.other for difference in found}
    reference = others.pop() if len(others) == 1 else REFERENCE
    phrases = {
        BETTER: f"Better than {reference}",
        WORSE: f"Worse than {reference}",
        EQUIVALENT: f"Equivalent to {reference} within {equivalence:.2g} of its score",
        CANNOT_TELL: f"Not distinguishable from {reference}",
    }
    for verdict, phrase in phrases.items():
        group = [one for one in found if one.verdict == verdict and not one.undertrained]
        if group:
            names = enumerate_names([f"{difference.method}{_without_failed(difference)}" for difference in group])
            text = f"{phrase}: {names}.{_also_on_new_data(group)}{_seeds_needed(group)}"
            statements.append(Statement("strategies", verdict, text))
    if late := [difference for difference in found if difference.undertrained]:
        names = enumerate_names([difference.method for difference in late])
        text = f"Not compared with {reference}, as one of the two is undertrained: {names}."
        statements.append(Statement("strategies", CANNOT_TELL, text))
    return statements


def _also_on_new_data(group: Sequence[Difference]) -> str:
    """Returns which of the strategies that are better, or worse, are so on new data, too."""
    judged = [(d.method, d.new_data.verdict) for d in group if d.new_data and d.verdict in (BETTER, WORSE)]
    if not judged:
        return ""
    names = [method for method, verdict in judged if verdict == group[0].verdict]
    return f" On new data, too: {enumerate_names(names)}." if names else " None of them is shown to be so on new data."


def _seeds_needed(group: Sequence[Difference]) -> str:
    """Returns the number of seeds needed to distinguish the strategies, fewest first."""
    by_seeds: dict[int, list[str]] = {}
    for difference in group:
        if difference.seeds_needed:
            by_seeds.setdefault(difference.seeds_needed, []).append(difference.method)
    if not by_seeds:
        return ""
    parts = [f"{seeds} for {enumerate_names(names)}" for seeds, names in sorted(by_seeds.items())]
    return f" Seeds that would tell: about {'; '.join(parts)}."


def _without_failed(difference: Difference) -> str:
    if difference.failed_folds:
        folds = enumerate_names([str(fold) for fold in difference.failed_folds])
        return f" (without the seeds of fold {folds} where one of the two failed)"
    seeds = enumerate_names([str(seed) for seed in difference.failed_seeds]) if difference.failed_seeds else ""
    return f" (without seed {seeds}, where one of the two failed or collapsed)" if seeds else ""


def _describe(difference: Difference, higher: bool) -> str:
    if difference.comparison is None or difference.p is None:
        return "too few seeds or folds can be paired"
    text = describe_difference(difference.comparison, difference.p, higher) + _without_failed(difference)
    shown = abs(difference.selection) >= 0.00005
    return f"{text}, corrected by {-difference.selection:+.4f} for the selection" if shown else text
