"""Outcomes of ablations with chosen scores, for tests of studies."""

from collections.abc import Mapping, Sequence

from mmfusion.analysis.claims.claims import Claims
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.outcome import Outcome

ALONE, CLASSICAL, MAJORITY, ENSEMBLE = " alone", ", ", "majority", "ensemble"


def result(name: str, test: Sequence[float], valid: Sequence[float] = (), seeds: Sequence[int] = ()) -> MethodResult:
    """Returns a method's result, whose name tells a strategy from a floor; validation scores are the test's.

    The trials of an ensemble are runs of others taken together, which have no `result.json`.
    """
    is_classical = CLASSICAL in name or name == MAJORITY
    is_strategy = not (name.endswith(ALONE) or is_classical or name.startswith(ENSEMBLE))
    trains = is_strategy or name.endswith(ALONE)
    seeds = tuple(seeds or range(len(test)))
    return MethodResult(
        method=name,
        unimodal_baseline=not is_strategy,
        selected={},
        trials=() if is_classical else tuple(f"{name}_seed={seed}" for seed in seeds),
        seeds=seeds,
        failed_seeds=(),
        valid=tuple(valid or test),
        test=tuple(test),
        parameters=1000 * len(name) if trains else None,
        fusion=name if is_strategy else "",
    )


def outcome(
    methods: Mapping[str, Sequence[float]] | Sequence[MethodResult], *, metric: str = "accuracy", higher: bool = True
) -> Outcome:
    """Returns an outcome of methods: results, or name -> test scores."""
    results = [result(*item) for item in methods.items()] if isinstance(methods, Mapping) else list(methods)
    runs = {
        trial: {
            "seconds": 2.0, "examples_per_second": 100.0, "versions": {"jax": "0.0"}, "device": "1 x cpu",
            "data": {"name": "made", "fingerprint": "f00d", "examples": {"test": 2000}},
        }
        for one in results if not one.method.startswith(ENSEMBLE) for trial in one.trials
    }  # fmt: skip
    return Outcome(metric, higher, tuple(results), Claims("", ""), runs, {}, {}, {})
