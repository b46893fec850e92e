"""Compares two recordings of `tests.witness`, value by value."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

TOLERANCE = 1e-6  # relative
FLOOR = 1e-3  # smallest denominator of relative differences: float32 sums near one have no more digits
LAGGING = 1e-2  # tolerance of validation if `noise` finds biases with gradients of rounding errors
NOISE = 1e-6  # gradients with a smaller root mean square are rounding errors: all other arrays have at least 1e-6

Record = dict[str, Any]

ROUNDING_ONLY = "rounding alone"  # the part of a record with rounding differences only
VALIDATED = ("valid", "scores", "batch_stats")  # the parts affected by them


@dataclasses.dataclass
class Comparison:
    """Differences of a case between two recordings.

    Attributes:
      noise: names of parameters, without `params/`, whose gradients are rounding errors, see `noise`.
      equal: whether all values in both recordings are bit-identical.
      worst: part of the record -> largest relative difference, and its location.
      wrong: differences that no tolerance allows.
      warnings: names that only one recording has, and differences of descriptive values.
    """

    noise: frozenset[str] = frozenset()
    equal: bool = True
    worst: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def fits(self, tolerance: float, *, rounding: bool = True) -> bool:
        """Returns whether `wrong` is empty and all differences are within the tolerance.

        Args:
          tolerance: relative tolerance.
          rounding: whether to allow differences caused by `noise`.
        """
        allowed = {ROUNDING_ONLY: math.inf, **dict.fromkeys(VALIDATED, LAGGING)} if rounding and self.noise else {}
        return not self.wrong and all(
            worst <= max(tolerance, allowed.get(part.removeprefix("resumed "), 0.0))
            for part, (worst, _) in self.worst.items()
        )

    def number(self, part: str, before: Any, after: Any, where: str, *, floor: float = FLOOR) -> None:
        """Records the difference of two numbers; None is a non-finite number."""
        if same(before, after):
            return
        self.equal = False
        self._record_worst(part, relative(before, after, floor), where)

    def array(self, part: str, before: list[Any], after: list[Any], where: str) -> None:
        """Records the difference of two arrays, given by `describe`."""
        if list(before[:3]) == list(after[:3]):
            return
        self.equal = False
        if list(before[:2]) != list(after[:2]):
            self.wrong.append(f"{where} was {before[1]}{before[0]} and is {after[1]}{after[0]}")
            return
        if re.sub(r"^params/|.*/(mu|nu)/", "", where) in self.noise:
            part = ROUNDING_ONLY
        # The Cauchy-Schwarz bound of the sum; the sum itself may be small because terms cancel.
        largest = max(before[4], after[4]) * math.sqrt(math.prod(before[0]))
        self._record_worst(part, relative(before[3], after[3], max(largest, 1e-12)), f"sum of {where}")
        self._record_worst(part, relative(before[4], after[4], 1e-12), f"norm of {where}")

    def exact(self, before: Any, after: Any, where: str) -> None:
        """Records values that must be equal."""
        if before != after:
            self.equal = False
            self.wrong.append(f"{where} was {_short(before)} and is {_short(after)}")

    def only(self, before: Iterable[str], after: Iterable[str], kind: str) -> None:
        """Adds a warning about names in only one of two recordings."""
        for names, when in ((set(before) - set(after), "before"), (set(after) - set(before), "after")):
            if names:
                shown = ", ".join(sorted(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                self.warnings.append(f"{kind} only {when}: {shown}")

    def _record_worst(self, part: str, difference: float, where: str) -> None:
        if difference > self.worst.get(part, (-1.0, ""))[0]:
            self.worst[part] = (difference, where)


def compare_cases(before: Record, after: Record) -> Comparison:
    """Returns the differences between two records of one case."""
    result = Comparison(noise(before["state"]))
    _compare_runs(result, before, after, "")
    if "resumed" in before and "resumed" in after:
        _compare_runs(result, before["resumed"], after["resumed"], "resumed ")
    return result


def noise(state: Mapping[str, Any]) -> frozenset[str]:
    """Returns the parameters whose gradients are rounding errors, by Adam's second moment."""
    second_moments = {path.split("/nu/")[1]: x for path, x in state.items() if "/nu/" in path}
    small = [name for name, x in second_moments.items() if x[3] <= NOISE**2 * math.prod(x[0])]
    # Exactly zero means an unused parameter, not a rounding error.
    return frozenset(name for name in small if second_moments[name][3] > 0)


def _compare_runs(result: Comparison, before: Record, after: Record, kind: str) -> None:
    result.exact(before["status"], after["status"], f"{kind}exit status")
    if before["error"] != after["error"]:
        result.warnings.append(f"error was {before['error']!r} and is {after['error']!r}")
    for split in ("train", "valid"):
        _compare_series(result, before[split], after[split], kind + split)
    _compare_facts(result, before["result"], after["result"], kind)
    _compare_states(result, before["state"], after["state"], kind)


def _compare_series(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], part: str) -> None:
    result.only(before, after, f"metrics of {part}")
    steps = before.get("step", [])
    result.exact(steps, after.get("step", []), f"steps of {part}")
    for name in [name for name in before if name in after]:
        if len(before[name]) != len(after[name]):
            continue  # reported by the steps
        if name in ("ids", "step"):
            result.exact(before[name], after[name], f"{part} {name}")
            continue
        for step, one, other in zip(steps, before[name], after[name], strict=True):
            result.number(part, one, other, f"{name} of step {step}")


def _compare_facts(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> None:
    result.only(before, after, f"{kind}results")
    for name in [name for name in before if name in after]:
        one, other = before[name], after[name]
        if name.startswith(("data/name", "data/fingerprint", "data/rows", "data/content", "device")):
            if one != other:
                result.warnings.append(f"{name} was {one} and is {other}")
        elif name.startswith(("valid/", "test/")):
            result.number(f"{kind}scores", one, other, name)
        else:
            result.exact(one, other, f"{kind}{name}")


def _compare_states(result: Comparison, before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> None:
    """Compares arrays by path, and renamed arrays of the optimizer state by their parameter."""
    result.only(before, after, f"{kind}arrays")
    gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    renamed = {_parameter_key(path): path for path in new}
    pairs = {path: path for path in before if path in after}
    pairs |= {path: renamed[_parameter_key(path)] for path in gone if _parameter_key(path) in renamed}
    for path, new_path in pairs.items():
        result.array(kind + path.split("/")[0], before[path], after[new_path], path)
    # Other removed arrays must exist under a new name with the same content if they are parameters or optimizer state.
    digests = {after[path][2] for path in new}
    for path in [path for path in gone if path not in pairs and before[path][2] not in digests]:
        if path.startswith(("params/", "opt_state/")):
            result.equal = False
            result.wrong.append(f"{kind}{path} is gone, and no new array is the same")
        else:
            result.warnings.append(f"{kind}{path} is gone, and no new array is the same")


def _parameter_key(path: str) -> str:
    found = re.search(r"/(mu|nu|trace)/.*", path)  # Adam and Lion, or momentum
    return found[0] if found else path


def same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal, with NaN equal to itself."""
    return one == other or (one != one and other != other)


def relative(one: Any, other: Any, floor: float) -> float:
    """Returns the difference relative to the larger number or `floor`; infinite if one is None or not finite."""
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (one, other)):
        return 0.0 if same(one, other) else math.inf
    return abs(one - other) / max(abs(one), abs(other), floor)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def report_lines(name: str, comparison: Comparison, tolerance: float = TOLERANCE) -> list[str]:
    """Returns the lines of the report on a case."""
    fit = next(
        kind
        for kind, applies in (
            ("equal", comparison.equal),
            ("close", comparison.fits(tolerance, rounding=False)),
            ("rounding", comparison.fits(tolerance)),
            ("DIFFERENT", True),
        )
        if applies
    )
    worst = "  ".join(f"{part} {value:.1e}" for part, (value, _) in comparison.worst.items())
    lines = [f"{fit:9}  {name}  {worst}".rstrip()]
    lines += [f"           {part}: {value:.2e} in {where}" for part, (value, where) in comparison.worst.items()]
    lines += [f"           wrong: {line}" for line in comparison.wrong]
    return lines + [f"           warning: {line}" for line in comparison.warnings]


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], selected: Iterable[str], tolerance: float = TOLERANCE
) -> bool:
    """Prints the differences between two recordings, and returns whether they agree within the tolerance."""
    selected = list(selected)
    for key in sorted({*before["environment"], *after["environment"]} - {"commit"}):
        if before["environment"].get(key) != after["environment"].get(key):
            old, new = (one["environment"].get(key) for one in (before, after))
            print(f"warning: {key} was {old!r} and is {new!r}")
    counts, agreed = dict.fromkeys(("equal", "close", "rounding", "DIFFERENT"), 0), True
    for name in selected:
        if name in before["cases"] and name in after["cases"]:
            comparison = compare_cases(before["cases"][name], after["cases"][name])
            lines = report_lines(name, comparison, tolerance)
            counts[lines[0].split()[0]] += 1
            agreed = agreed and comparison.fits(tolerance)
            print("\n".join(lines))
    for one, other, when in ((before, after, "before"), (after, before, "after")):
        for name in [name for name in selected if name in one["cases"] and name not in other["cases"]]:
            print(f"warning: only {when}: {name}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), "to within", tolerance)
    return agreed


# The command
