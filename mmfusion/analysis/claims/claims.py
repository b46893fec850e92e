"""The claims of an ablation in words, each with its evidence; nothing is claimed that the seeds do not carry."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.selection import Difference, Row
from mmfusion.analysis.claims.significance import Comparison, compare, fewest_pairs, holm, verdict

RULE = (
    "For each method the values of the optimizer with the best mean validation {metric} are chosen, from the same "
    "ones for all; of two values, and of two strategies, the one that failed on fewer seeds goes first. The best "
    "strategy and the best modality alone are chosen by validation as well, and test scores are read once after that."
    " Differences are paired by seed; intervals and p are over training seeds, on one test set. `Better` asks for p <"
    " 0.05 of the exact sign-flip test, a 95 % BCa interval of the difference beyond 0, and P(A>B) with an interval "
    "above 0.5 that reaches 0.75; `worse` is its mirror, and everything else cannot be told. Where each strategy is "
    "held against {reference} or the best modality alone, and each modality or interaction against none, p is "
    "corrected for the number of these (Holm); where the best strategy is held against the best modality or baseline,"
    " for all that they were chosen of (Westfall and Young). A modality or an interaction counts as nothing only "
    "where the whole 95 % interval of what it is worth, by the bootstrap and by Student's t, lies within 1 % of the "
    "score."
)
FEWEST = fewest_pairs(1)
BLIND = ("majority", "mean")  # baselines
NEGLIGIBLE = 0.01  # share of the score below which a part of the model counts as nothing


@dataclasses.dataclass(frozen=True)
class Statement:
    """A sentence, what it is about, its verdict, and the comparison that carries it, if one does."""

    about: str
    verdict: str
    text: str
    evidence: Comparison | None = None


@dataclasses.dataclass(frozen=True)
class Claims:
    """What an ablation says.

    Attributes:
      rule: how methods were chosen and compared.
      none: why there are no claims, or "".
      statements: the most important first.
      best: the method that validation chose; "" where none ended.
      against_floor, against_reference: differences of each fused method from the best modality alone, and `concat`.
    """

    rule: str
    none: str
    statements: tuple[Statement, ...] = ()
    best: str = ""
    against_floor: tuple[Difference, ...] = ()
    against_reference: tuple[Difference, ...] = ()


def claims(
    found: Sequence[Row],
    classical: Sequence[Row],
    examined: Mapping[str, Mapping[str, Any]],
    bits: Mapping[str, Mapping[str, float]],
    metric: str,
    higher: bool,
) -> Claims:
    """Returns what the rows of an ablation say.

    Args:
      found: a row a method.
      classical: rows of baselines that are no networks; the floor takes those of one modality or none.
      examined: cell name -> what `examine` found; those of the best method at least.
      bits: the information in two modalities, of `train` and by `chance`; empty where it is not known.
      metric: what was compared.
      higher: whether more of it is better.
    """
    references = {method: row for method, row in selection.references(found).items() if row.test}
    held = {row.method for row in references.values()}
    rule = RULE.format(metric=metric, reference=held.pop() if len(held) == 1 else REFERENCE)
    fused = [row for row in found if not row.floor]
    floors = [row for row in (*found, *classical) if row.floor]
    joints = [row for row in classical if not row.floor]
    alone = selection.best(floors, higher, failing_last=False)  # what fails now and then is a floor all the same
    joint, top = selection.best(joints, higher), selection.best(fused, higher)
    if not top:
        return Claims(rule, "No claims: no run of a fusion strategy ended in a number.")
    if len(top.seeds) < 2:
        why = "one seed" if not top.lost else f"{top.method} ended on {len(top.seeds)} of its seeds"
        return Claims(
            rule, f"No claims: {why}; a difference needs at least {FEWEST} (--seeds={FEWEST}).", best=top.method
        )
    said = []
    ended = [row for row in fused if row.test]
    against_floor = selection.differences([(row, alone) for row in ended], higher) if alone else []
    if alone:
        mine = selection.chosen_difference(ended, floors, top, alone, higher)
        words = {"better": "Fusion helps", "worse": "Fusion hurts"}.get(mine.verdict, "Whether fusion helps is open")
        text = f"{words}: {_beside(top, alone)}; {_difference(mine, higher)}{_more(mine)}."
        said.append(Statement("fusion", mine.verdict, text, mine.comparison))
    if joint:
        mine = selection.chosen_difference(ended, joints, top, joint, higher)
        words = {"better": "is better than", "worse": "is worse than"}.get(mine.verdict, "cannot be told from")
        text = (
            f"{top.method} {words} the best classical baseline on all modalities, {joint.method} ({joint.mean:.4f}); "
            f"{_difference(mine, higher)}."
        )
        said.append(Statement("classical", mine.verdict, text, mine.comparison))
    pairs = [(row, references[row.method]) for row in ended if row.method in references]
    against_reference = selection.differences(pairs, higher)
    if pairs:
        said += _groups(against_reference)
    runs = [examined[name] for name in top.runs if name in examined]
    said += _looked_at(top, runs)
    names = max(runs[0]["subsets"], key=len).split("+") if runs else []
    said += _information(bits, names) if bits and len(names) == 2 else []
    if len(top.seeds) < FEWEST:
        text = f"{len(top.seeds)} seeds cannot show a difference: no test of fewer than {FEWEST} comes below 0.05."
        said.insert(0, Statement("seeds", "cannot tell", text))
    lost = [row.method for row in found if not row.test]
    if lost:
        said.append(Statement("lost", "no result", f"No seed of {_names(lost)} ended in a number."))
    return Claims(rule, "", tuple(said), top.method, tuple(against_floor), tuple(against_reference))


def _groups(differences: Sequence[Difference]) -> list[Statement]:
    """Returns a statement for the strategies better than the reference, for those worse, and for the others."""
    said = []
    others = {one.other for one in differences}
    reference = others.pop() if len(others) == 1 else REFERENCE
    pairs = [one.comparison.n for one in differences if one.comparison]
    count, seeds = len(pairs), max(pairs, default=0)
    if count and seeds < (needed := fewest_pairs(count)):
        text = (
            f"{seeds} seeds cannot tell any strategy from {reference}: {count} comparisons need at least "
            f"{needed} (--seeds={needed})."
        )
        said.append(Statement("strategies", "cannot tell", text))
    for kind, words in (("better", "Better than"), ("worse", "Worse than"), ("cannot tell", "Not to be told from")):
        group = [one for one in differences if one.verdict == kind]
        if group:
            named = [f"{one.method}{_without(one)}" for one in group]
            text = f"{words} {reference}: {_names(named)}{_needed(group)}."
            said.append(Statement("strategies", kind, text))
    return said


def _needed(group: Sequence[Difference]) -> str:
    """Returns how many seeds would tell which of the strategies, the fewest first."""
    by_number: dict[int, list[str]] = {}
    for one in sorted((one for one in group if one.seeds_needed), key=lambda one: one.seeds_needed):
        by_number.setdefault(one.seeds_needed, []).append(one.method)
    return "".join(f"; about {number} seeds would tell {_names(names)}" for number, names in by_number.items())


def _looked_at(top: Row, runs: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """Says what the examinations of the best method's runs found, and where they found no number."""
    said = []
    if len(runs) < len(top.runs):
        text = f"{len(runs)} of {len(top.runs)} runs of {top.method} were examined; the others failed."
        said.append(Statement("examined", "no result", text))
    for part, words in (
        ("interaction", "whether the interaction of the modalities is used"),
        ("perceptual", "what each modality is worth"),
        ("subsets", "what is left without a modality"),
    ):
        known = [run for run in runs if run[part] and None not in _leaves(run[part])]
        if len(known) > 1:
            said += SAY[part](top, known)
        lacking = len(runs) - len(known)
        if lacking and any(len(run["subsets"]) > 2 for run in runs):  # there are two modalities
            text = f"{words[0].upper()}{words[1:]} is not defined on {lacking} of {len(runs)} runs of {top.method}."
            said.append(Statement(part, "no result", text))
    return said


def _interaction(top: Row, runs: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """Says whether the best method's score falls when it is made additive, modality against modality."""
    names = list(runs[0]["interaction"])
    scores = [
        [[statistics.fmean(run["interaction"][m][what]) for run in runs] for what in ("whole", "additive")]
        for m in names
    ]
    each = [compare(whole, additive) for whole, additive in scores]
    said = []
    for m, one, p, (whole, additive) in zip(names, each, holm([one.p for one in each]), scores, strict=True):
        kind = _worth(one, p, statistics.fmean(whole))
        words = {
            "better": "uses the interaction of its modalities",
            "nothing": "does not need the interaction of its modalities",
            "worse": "does better without the interaction of its modalities",
        }.get(kind, "may or may not use the interaction of its modalities")
        sign = runs[0]["sign"]
        text = (
            f"{top.method} {words}: {sign * statistics.fmean(whole):.4f}, and {sign * statistics.fmean(additive):.4f} "
            f"as the nearest sum of a part of {m} and a part of the rest ({runs[0]['metric']} of {runs[0]['paired']} "
            f"examples, drawn anew for each seed); {_numbers(one, p)}."
        )
        said.append(Statement("interaction", kind, text, one))
    return said


def _modalities(top: Row, runs: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """Says of each modality whether the best method's score falls when that one's examples are mixed up."""
    names = sorted(runs[0]["perceptual"])
    each = [compare([run["perceptual"][m] for run in runs], [0.0] * len(runs)) for m in names]
    said = []
    for m, one, p in zip(names, each, holm([one.p for one in each]), strict=True):
        kind = _worth(one, p, 1.0)
        low, high = (100 * x for x in one.interval)
        words = {
            "better": "counts",
            "nothing": "contributes nothing",
            "worse": "is better mixed up than right",
        }.get(kind, "may or may not count")
        bound = f" (less than {100 * NEGLIGIBLE:.0f} %)" if kind == "nothing" else ""
        text = (
            f"{m} {words}: giving each of {runs[0]['rows']} test examples another one's {m} costs {top.method} "
            f"{100 * one.difference:.1f} % of its {runs[0]['metric']}{bound}, 95 % interval {low:.1f} to {high:.1f} %, "
            f"p = {p:.3g}."
        )
        said.append(Statement("modality", kind, text, one))
    return said


def _worth(one: Comparison, p: float, score: float) -> str:
    """Returns `nothing` where all of both intervals is within a small share of the score, else the verdict."""
    ends = (*one.interval, *one.normal_interval)
    if one.n >= FEWEST and max(map(abs, ends)) < NEGLIGIBLE * abs(score):
        return "nothing"
    return verdict(one, p)


def _information(bits: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[Statement]:
    """Says what simple features of the modalities tell of the label, beside what chance feigns."""
    parts = {
        "both tell": "redundant",
        f"{names[0]} alone": "unique_1",
        f"{names[1]} alone": "unique_2",
        "only the two together": "synergy",
    }
    listed = [f"{words} {bits['train'][key]:.2f} (by chance {bits['chance'][key]:.2f})" for words, key in parts.items()]
    text = f"Bits that clusters of simple features tell of the label in the training data: {_names(listed)}."
    return [Statement("information", "", text)]


def _missing(top: Row, runs: Sequence[Mapping[str, Any]]) -> list[Statement]:
    """Says what is left of the best method's score when one modality is not there."""
    subsets = {kept: statistics.fmean(run["subsets"][kept] for run in runs) for kept in runs[0]["subsets"]}
    names = max(subsets, key=len).split("+")
    sign, metric = runs[0]["sign"], runs[0]["metric"]
    parts = [
        f"{sign * subsets['+'.join(kept)]:.4f} without {m}"
        for m in names
        if (kept := [other for other in names if other != m])
    ]
    if not parts:
        return []
    whole, none = (sign * subsets[kept] for kept in ("+".join(names), ""))
    text = (
        f"Where a modality is missing, {top.method}, trained with all, is left with {_names(parts)} "
        f"({metric} with all {whole:.4f}, with none {none:.4f})."
    )
    return [Statement("missing", "", text)]


def _leaves(tree: Any) -> Iterator[Any]:
    """Yields the values in nested lists and mappings; an undefined number is None there."""
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        yield tree
        return
    for one in tree:
        yield from _leaves(one)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _more(one: Difference) -> str:
    return f" (about {one.seeds_needed} seeds would tell)" if one.seeds_needed else ""


def _without(one: Difference) -> str:
    return f" (without seed {_names([str(seed) for seed in one.lost])}, where one failed)" if one.lost else ""


def _beside(mine: Row, other: Row) -> str:
    what = "which looks at nothing" if other.method in BLIND else "the best that one modality gives"
    return f"{mine.method} {mine.mean:.4f}, and {other.mean:.4f} of {other.method}, {what}"


def _difference(one: Difference, higher: bool) -> str:
    if one.comparison is None or one.p is None:
        return "fewer than two seeds are paired"
    turned = "" if higher else " (less is better; turned)"
    return f"{_numbers(one.comparison, one.p, turned)}{_without(one)}"


def _numbers(one: Comparison, p: float, turned: str = "") -> str:
    low, high = one.interval
    return f"{one.difference:+.4f}{turned} over {one.n} seeds, 95 % interval {low:+.4f} to {high:+.4f}, p = {p:.3g}"


SAY = {"interaction": _interaction, "perceptual": _modalities, "subsets": _missing}
