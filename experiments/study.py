"""Compares fusion strategies over several datasets: an ablation of each, and one report over all of them.

`python -m experiments.study --configs=configs/X.py:arg=value,configs/Y.py --fusions=a,b --tune=N --seeds=N
--workdir=DIR [--vary=KEY=VALUE,VALUE] [--jobs=N] [--engine=ray[:ADDRESS]] [--config.key=value ...]`
A comma begins another config where FILE.py follows it. The same command continues, and may have more configs.
"""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, study_plan, trial_config
from mmfusion.analysis.ablation import runner
from mmfusion.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "the study's directory; each ablation has one in it", required=True)
CONFIGS = flags.DEFINE_multi_string(
    "configs", [], "FILE.py[:key=value,...],FILE.py...: the config of each dataset; may be given several times"
)
FUSIONS = flags.DEFINE_string("fusions", "all", "comma-separated names or package.module:Class, or all")
SEEDS = flags.DEFINE_integer("seeds", 6, "seeds per method and dataset")
TUNE = flags.DEFINE_integer("tune", 0, "trials of hyperparameters per method and dataset, equal for all", lower_bound=0)
VARY = flags.DEFINE_multi_string(
    "vary", [], "KEY=VALUE,VALUE: values of a config key; values of optim.* are selected on validation"
)
EQUIVALENCE = flags.DEFINE_float("equivalence", 0.01, "the share of a score below which methods count as equivalent")
JOBS = flags.DEFINE_integer(
    "jobs", 0, "number of processes on CPU, each on its own core (default: all cores); of Ray: of tasks", lower_bound=0
)
ENGINE = flags.DEFINE_string("engine", "", "ray[:ADDRESS]: run the trials on a Ray cluster (default: on this machine)")
RESOURCES = flags.DEFINE_string(
    "resources", "", "what a trial needs of the cluster, by Ray's names: CPU=1,GPU=0.5 or TPU=4 (default: CPU=1)"
)


def main(argv: Sequence[str]) -> None:
    with runner.preempted_by_signal():
        study(argv)


def study(argv: Sequence[str]) -> None:
    """Runs the study defined by the flags."""
    overrides = tuple(arg for arg in argv[1:] if arg.startswith(("--config.", "--noconfig.")))
    cli.parse([arg for arg in argv if arg not in overrides])
    sources = study_plan.named_sources(CONFIGS.value)
    if "://" in WORKDIR.value:
        raise UserError("must be a local folder", path="--workdir", value=WORKDIR.value)
    directory = Path(WORKDIR.value)
    vary = dict(trial_config.values(item) for item in VARY.value)
    resources = trial_config.resources(RESOURCES.value)
    make = {name: functools.partial(trial_config.config, source, overrides) for name, source in sources.items()}

    from experiments import progress_table
    from mmfusion.analysis import run_ablation
    from mmfusion.analysis.study.run_study import Entry, run_study
    from mmfusion.analysis.study.statements import statements
    from mmfusion.models.fusion import fusion_classes

    fusions = list(fusion_classes(FUSIONS.value))
    for each in make.values():
        cli.prepare(each(fusions[0], 0, ""))  # the worker processes inherit this environment
    entries = {
        name: Entry(
            run_ablation.Request(
                make[name], fusions, SEEDS.value, vary, equivalence=EQUIVALENCE.value, tune=TUNE.value
            ),
            run_ablation.Execution(
                directory / name,
                JOBS.value if ENGINE.value else JOBS.value or run_ablation.cores(),
                ENGINE.value,
                resources,
                prepare_worker=cli.prepare_worker,
                progress=progress_table,
                command=study_plan.ablate_command(argv, source, directory / name),
                train_command=functools.partial(trial_config.command, source, overrides),
            ),
        )
        for name, source in sources.items()
    }
    summary = run_study(entries, directory, shlex.join(["python", "-m", "experiments.study", *argv[1:]]), TUNE.value)
    progress_table.study_conclusion(statements(summary), directory)


if __name__ == "__main__":
    cli.run(main)
