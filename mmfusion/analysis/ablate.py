"""`mmfusion.ablate`: an ablation from Python, and its result."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import trial_source
from mmfusion.analysis.claims.claims import Claims
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.run_ablation import Execution, Request, run_ablation
from mmfusion.config import defaults
from mmfusion.config.files import load_file, set_values
from mmfusion.config.published import adopt
from mmfusion.models.fusion import fusion_classes


@dataclasses.dataclass(frozen=True)
class AblationResult:
    """A finished ablation; `report.html` in its directory shows the figures.

    Attributes:
      directory: the ablation's directory.
      outcome: methods, claims, results, probes and errors.
    """

    directory: Path
    outcome: Outcome

    @property
    def claims(self) -> Claims:
        """The claims: `statements`, each with `text`, `verdict` and evidence; `none` is the reason for having none."""
        return self.outcome.claims

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict per method, best mean test score first.

        Keys: `method`, `mean` and `std` over seeds (None with no finished seed, or with fewer than two), `test` (a
        score per run), `seeds`, `folds` (of each run; empty without folds), `chosen` (the values selected on
        validation) and `parameters`. With folds, mean and std are over the means of the folds.
        """
        rows = [
            {
                "method": row.method,
                "mean": row.mean if row.test else None,
                "std": statistics.stdev(row.units) if len(row.units) > 1 else None,
                "test": list(row.test),
                "seeds": list(row.seeds),
                "folds": list(row.folds),
                "chosen": dict(row.selected),
                "parameters": row.parameters,
            }
            for row in self.outcome.methods
        ]
        sign = -1 if self.outcome.higher else 1
        return sorted(rows, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0)))

    @property
    def errors(self) -> dict[str, str]:
        """The error of each run that failed."""
        return self.outcome.errors


def ablate(
    config: ConfigDict | str | Path,
    fusions: Sequence[str] | str,
    seeds: int,
    workdir: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    match: str = "none",
    metric: str = "",
    equivalence: float = 0.01,
    tune: int = 0,
    tune_seeds: int = 1,
    space: Mapping[str, str] | None = None,
    jobs: int = 0,
    engine: str = "",
    resources: Mapping[str, float] | None = None,
) -> AblationResult:
    """Compares fusion strategies over seeds; the same call resumes an interrupted ablation.

    Every strategy and each modality alone is trained with the same seeds. With `tune`, each of them is first tuned with
    the same settings; otherwise a varied learning rate is selected on validation for each method. Fewer than six seeds
    support no claim. A config whose data has folds (`data.folds`, `data.fold_by`) is tested on each of them with every
    seed, and judged over folds.

    Args:
      config: a config, or a config file, `path/to/X.py[:arg=value,...]`.
      fusions: names of strategies, or `all`.
      seeds: the number of seeds per method.
      workdir: the ablation's directory.
      changes: values by dotted path that all runs share, such as `{"steps": 100}`.
      vary: config key -> values, such as `{"optim.learning_rate": [1e-3, 3e-4]}`.
      match: `parameters` or `flops` chooses widths at which all strategies cost the same.
      metric: the metric to select and compare by; "": the config's.
      equivalence: the share of a score below which methods count as equivalent.
      tune: the number of settings that each method is tuned with; 0: methods are not tuned.
      tune_seeds: the number of seeds of each setting, none of which is one of `seeds`.
      space: config key, or a pattern such as `model.*.dropout` -> `LOW..HIGH`, `LOW..HIGH:log`, `A,B,C` or `none`: adds
        to the search space of `tune`, or replaces a key of it.
      jobs: the number of processes on CPU; 0 runs in this process. A script that starts processes needs the usual
        `if __name__ == "__main__":` of multiprocessing. With an engine the number of its tasks; 0: as many as fit.
      engine: `ray` or `ray:ADDRESS` runs the trials on a Ray cluster; "": on this machine.
      resources: what a task of the cluster needs, by Ray's names, such as `{"CPU": 1, "GPU": 0.5}`.

    Raises:
      UserError: an unknown strategy, key or engine, a directory of another ablation, or no cluster.
    """
    names = list(fusion_classes(fusions))
    given = config if isinstance(config, ConfigDict) else str(config)
    make = functools.partial(trial_config, given, dict(changes or {}))
    request = Request(make, names, seeds, vary or {}, match, metric, {}, equivalence, tune, tune_seeds, space or {})
    source = "config" if isinstance(config, ConfigDict) else repr(given)
    tuned = f", tune={tune}" if tune else ""
    command = f"mmfusion.ablate({source}, fusions={names}, seeds={seeds}{tuned}, workdir={str(workdir)!r})"
    execution = Execution(Path(workdir), jobs, engine, resources or {}, command=command)
    outcome = run_ablation(request, execution)
    assert outcome is not None  # None only with other shards
    return AblationResult(Path(workdir), outcome)


def trial_config(
    config: ConfigDict | str, changes: Mapping[str, Any], fusion: str, seed: int, modalities: str
) -> ConfigDict:
    """Returns the config of one run of an ablation.

    Args:
      config: a config, or `FILE[:key=value,...]`.
      changes: values by dotted path.
      fusion: the strategy; "": the config's own.
      seed: the seed.
      modalities: names joined by `+`, such as `image+text`; "": all.

    Raises:
      UserError: the source sets the strategy or the seed.
    """
    if isinstance(config, ConfigDict):
        result = config.copy_and_resolve_references()
        if fusion and result.model.fusion.name != fusion:
            configs.choose(result, "model.fusion", fusion)
        with result.unlocked():
            result.seed = seed
    else:
        result = load_file(trial_source(config, fusion, seed))
    # The options of the compared strategies do not apply to a unimodal baseline.
    set_values(result, {k: v for k, v in changes.items() if fusion or not k.startswith("model.fusion.")})
    adopt(result)
    defaults.keep_modalities(result, modalities)
    return result.lock()
