"""What a study says, as sentences with their evidence; every number is one of `study.json`."""

from collections.abc import Sequence

from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.claims.significance import BETTER, CANNOT_TELL, EQUIVALENT, MIN_SEEDS, WORSE
from mmfusion.analysis.claims.statement import Statement, describe_difference, enumerate_names
from mmfusion.analysis.study.aggregates import Estimate
from mmfusion.analysis.study.datasets import BEST_CLASSICAL, BEST_UNIMODAL, ENSEMBLE
from mmfusion.analysis.study.summary import LATE_TRANSFORMER, Row, Summary

VERDICTS = (BETTER, EQUIVALENT, WORSE, CANNOT_TELL)
MAX_LAST_STEP = 0.2  # of the runs of a method
PHRASES = {
    BETTER: "is better than",
    EQUIVALENT: "is equivalent to",
    WORSE: "is worse than",
    CANNOT_TELL: "is not distinguishable from",
}
RULE = (
    "Each dataset is an ablation of its own, whose report has its claims. A method of the study has a score on every "
    f"dataset; `{BEST_UNIMODAL}` and `{BEST_CLASSICAL}` are selected on validation for each. The best strategy has the "
    "best mean rank by validation score, and test scores are read once, afterwards. Normalised scores are 0 at the "
    "baseline without inputs and 1 at a perfect score, neither of which depends on a method that is compared. "
    "Intervals are 95 % percentile intervals of a bootstrap stratified by dataset: seeds are drawn within each "
    "dataset, for all methods together. They speak of new training runs on these datasets. Verdicts over datasets "
    "compare mean normalised scores paired by dataset, and speak of further datasets like these: `equivalent` where "
    "two one-sided tests at 0.05 place the mean difference within {margin} of the normalised scale; otherwise "
    "`better` requires p < 0.05 in the exact sign-flip test, corrected for all strategies against one reference by "
    "the max-T method (Westfall and Young), and a 95 % Student's t interval above 0; `worse` is the mirror image, and "
    "everything else is `cannot tell`. Verdicts on one dataset are the same, paired by seed, with a margin of "
    "{margin} of the score. Runs that stayed at chance count as they are."
)


def statements(summary: Summary) -> list[Statement]:
    """Returns what a study says, the most important first."""
    found = [_best(summary)]
    if answer := _answer(summary):
        found.append(answer)
    if len(summary.normalised) < MIN_SEEDS:
        found.append(_too_few(summary))
    found += [_against(summary, other) for other in summary.references if summary.against(other)]
    if where := _where(summary):
        found.append(where)
    if summary.test:
        found.append(_ranks(summary))
    if undertrained := _undertrained(summary):
        found.append(undertrained)
    if missing := _missing(summary):
        found.append(missing)
    return found


def rule(summary: Summary) -> str:
    """Returns how methods are compared over datasets."""
    return RULE.format(margin=f"{summary.equivalence:.2g}")


def _best(summary: Summary) -> Statement:
    row = summary.row(summary.best)
    text = (
        f"Best over {_datasets(summary)}: {row.method}, selected on validation from {_scope(summary)}. Its mean rank "
        f"on test is {_estimate(row.rank, 2)} of {len(summary.rows)} methods"
    )
    if row.middle:
        text += f", its interquartile mean of normalised scores {_estimate(row.middle, 3)}"
    top = summary.rows[0]
    if top.method != row.method:
        text += f". The best mean rank on test is that of {top.method} ({_estimate(top.rank, 2)})"
    return Statement("best", "", f"{text}.")


def _answer(summary: Summary) -> Statement | None:
    """Returns whether a strategy beats the late-fusion transformer and the ensemble, as arXiv:2512.22991 asks."""
    floors = [name for name in summary.references if name == LATE_TRANSFORMER or name.startswith(ENSEMBLE)]
    by_method = {name: [j for j in summary.over_datasets if j.method == name] for name in summary.strategies}
    verdicts = {
        name: {judged.other: judged.verdict for judged in found if judged.other in floors}
        for name, found in by_method.items()
        if name != LATE_TRANSFORMER
    }
    verdicts = {name: found for name, found in verdicts.items() if found}
    if not verdicts:
        return None
    tuned = "tuned " if summary.tune else ""
    named = [f"the {tuned}late-fusion transformer" if name == LATE_TRANSFORMER else _the(name) for name in floors]
    question = f"Do other fusion strategies beat {enumerate_names(named)} of single modalities"
    if not any(name.startswith(ENSEMBLE) for name in floors):
        question = f"Do other fusion strategies beat {enumerate_names(named)}"
    winners = [name for name, found in verdicts.items() if set(found.values()) == {BETTER}]
    some = [name for name, found in verdicts.items() if BETTER in found.values() and name not in winners]
    number = _number(len(verdicts))
    every = {verdict for found in verdicts.values() for verdict in found.values()}
    verdict = CANNOT_TELL
    if winners:
        says, verdict = f"Yes: {enumerate_names(winners)}, of {number}", BETTER
    elif some:
        says = f"Not both: of {number}, {enumerate_names(some)} beat{'s' if len(some) == 1 else ''} one of them"
    elif every <= {EQUIVALENT, WORSE}:
        says = f"No: each of {number} is equivalent or worse"
        verdict = EQUIVALENT if EQUIVALENT in every else WORSE
    else:
        says = f"Not shown: none of {number} is better than {'either' if len(floors) > 1 else 'it'}"
    counts = "; ".join(
        f"against {_the(name)}, {_counts([f[name] for f in verdicts.values() if name in f])}" for name in floors
    )
    text = f"{question} (arXiv:2512.22991)? {says} over {_datasets(summary)} ({counts})."
    return Statement("answer", verdict, text)


def _too_few(summary: Summary) -> Statement:
    number = len(summary.normalised)
    text = f"{number} dataset{'s' * (number != 1)} cannot show a difference over datasets: below {MIN_SEEDS} no test"
    return Statement("datasets", CANNOT_TELL, f"{text} reaches p < 0.05, and none counts as equivalent.")


def _against(summary: Summary, other: str) -> Statement:
    """Returns how the best strategy, or the next, compares with a reference over datasets, and how the others do."""
    found = {difference.method: difference for difference in summary.against(other)}
    name = min(found, key=lambda method: summary.row(method).valid_rank)
    judged = found[name]
    text = f"{name} {PHRASES[judged.verdict]} {_the(other)} over {_datasets(summary)}"
    if judged.comparison and judged.p is not None:
        text += f": {describe_difference(judged.comparison, judged.p)} of the normalised scale"
        if other in (improvement := summary.row(name).improvement):
            text += (
                f"; a run of it is better than one of {_the(other)} with probability {_estimate(improvement[other], 2)}"
            )
    text += f". Of {_number(len(found))}: {_counts([difference.verdict for difference in found.values()])}."
    for verdict in (BETTER, WORSE):
        names = [method for method, each in found.items() if each.verdict == verdict]
        text += f" {verdict.capitalize()}: {enumerate_names(names)}." if names else ""
    return Statement("against", judged.verdict, text, judged.comparison)


def _where(summary: Summary) -> Statement | None:
    """Returns where the best strategy is not the best, by the tests over the seeds of each dataset."""
    best, parts = summary.best, []
    for other in summary.references:
        judged = {name: _find(found, best, other) for name, found in summary.over_seeds.items()}
        worse = [name for name, one in judged.items() if one and one.verdict == WORSE]
        if worse:
            parts.append(f"it is worse than {_the(other)} on {enumerate_names(worse)}")
    winners = {dataset.name: _winner(summary, dataset.name) for dataset in summary.datasets}
    others = [f"{method} on {name}" for name, method in winners.items() if method != best]
    if others:
        parts.append(f"the strategy of the best mean test score is {enumerate_names(others)}")
    if not parts:
        return None
    return Statement("where", "", f"Where {best} is not the best: {'; '.join(parts)}.")


def _winner(summary: Summary, name: str) -> str:
    dataset = next(one for one in summary.datasets if one.name == name)
    sign = 1.0 if dataset.outcome.higher else -1.0
    return max(summary.strategies, key=lambda method: sign * dataset.methods[method].mean)


def _find(found: Sequence[Difference], method: str, other: str) -> Difference | None:
    return next((judged for judged in found if (judged.method, judged.other) == (method, other)), None)


def _ranks(summary: Summary) -> Statement:
    assert summary.test
    rows: Sequence[Row] = summary.rows
    difference = summary.test.critical_difference
    apart = sum(
        abs(one.rank.value - other.rank.value) >= difference for i, one in enumerate(rows) for other in rows[i + 1 :]
    )
    pairs = len(rows) * (len(rows) - 1) // 2
    text = (
        f"Mean ranks of {len(rows)} methods on {len(summary.datasets)} datasets: Friedman's test has p = "
        f"{summary.test.p:.3g}; by Nemenyi's test two methods differ where their mean ranks are {difference:.2f} "
        f"apart, as {apart} of {pairs} pairs are."
    )
    if not apart:
        text += " So few datasets tell no two of so many methods apart by their ranks alone."
    return Statement("ranks", "", text)


def _undertrained(summary: Summary) -> Statement | None:
    shares = {row.method: row.last_step for row in summary.rows if row.last_step and row.last_step > MAX_LAST_STEP}
    if not shares:
        return None
    names = enumerate_names([f"{method} ({share:.0%})" for method, share in shares.items()])
    text = f"Longer training may be better: the best step is the last one in more than {MAX_LAST_STEP:.0%} of the runs"
    return Statement("undertrained", "", f"{text} of {names}.")


def _missing(summary: Summary) -> Statement | None:
    parts = [f"{name} ({reason})" for name, reason in summary.without.items()]
    parts += [f"{method}, without a score on {enumerate_names(names)}" for method, names in summary.left_out.items()]
    scale = [dataset.name for dataset in summary.datasets if dataset.scale is None]
    text = f"Left out: {enumerate_names(parts)}." if parts else ""
    if scale:
        text += f" In no normalised score: {enumerate_names(scale)}, where the metric has no chance or perfect value."
    return Statement("missing", "", text.strip()) if text else None


def _datasets(summary: Summary) -> str:
    finished, plural = len(summary.datasets), "s" * (len(summary.datasets) != 1)
    return f"{finished} dataset{plural}" if finished == summary.planned else f"{finished} of {summary.planned} datasets"


def _scope(summary: Summary) -> str:
    text = _number(len(summary.strategies))
    return f"{text}, each tuned with {summary.tune} trials" if summary.tune else text


def _number(strategies: int) -> str:
    return f"{strategies} strateg{'y' if strategies == 1 else 'ies'}"


def _the(reference: str) -> str:
    """Returns a reference as it is named in a sentence: a strategy by its name, a floor with an article."""
    if reference.startswith(ENSEMBLE):  # such as `ensemble (mean)`
        return f"the {reference.partition('(')[2].rstrip(')')} ensemble"
    return f"the {reference}" if reference == BEST_UNIMODAL else reference


def _counts(verdicts: Sequence[str]) -> str:
    """Returns how many verdicts are of each kind, such as `2 better, 9 cannot tell`."""
    return ", ".join(f"{verdicts.count(each)} {each}" for each in VERDICTS if each in verdicts)


def _estimate(estimate: Estimate, digits: int) -> str:
    if estimate.interval is None:
        return f"{estimate.value:.{digits}f}"
    low, high = estimate.interval
    return f"{estimate.value:.{digits}f} (95 % interval {low:.{digits}f} to {high:.{digits}f})"
