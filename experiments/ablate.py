"""Compares fusion strategies over seeds and writes a report of claims with their evidence.

`python -m experiments.ablate --config=configs/X.py --fusions=all|a,b --seeds=N --workdir=DIR [--tune=N]
[--match=parameters|flops] [--vary=optim.learning_rate=1e-3,3e-4] [--jobs=N] [--engine=ray[:ADDRESS]] [--shard=i/n]
[--config.key=value ...]`
The same command on several machines with one shared DIR runs one ablation.
"""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli, trial_config
from mmfusion.analysis.ablation import remote_copy, runner

WORKDIR = flags.DEFINE_string("workdir", None, "the ablation's directory, local or gs://...", required=True)
FUSIONS = flags.DEFINE_string("fusions", "all", "comma-separated names or package.module:Class, or all")
SEEDS = flags.DEFINE_integer(
    "seeds", 6, "seeds per method; a difference needs at least 6 to be told, however many methods are compared"
)
MATCH = flags.DEFINE_enum(
    "match", "none", ["none", "parameters", "flops"], "choose widths at which all strategies cost the same"
)
VARY = flags.DEFINE_multi_string(
    "vary", [], "KEY=VALUE,VALUE: values of a config key; values of optim.* are selected on validation"
)
TUNE = flags.DEFINE_integer(
    "tune", 0, "settings of one search space that every strategy and every modality alone is tuned with; 0: none"
)
TUNE_SEEDS = flags.DEFINE_integer("tune_seeds", 1, "seeds of each setting, none of which is one of --seeds")
SPACE = flags.DEFINE_multi_string(
    "space", [], "KEY=LOW..HIGH[:log], KEY=A,B,C or KEY=none: changes the search space of --tune; model.*.dropout is "
    "every key that it matches",
)  # fmt: skip
METRIC = flags.DEFINE_string("metric", "", "the metric to select and compare by (default: the config's)")
EQUIVALENCE = flags.DEFINE_float("equivalence", 0.01, "the share of a score below which methods count as equivalent")
JOBS = flags.DEFINE_integer(
    "jobs", 0, "number of processes on CPU, each on its own core (default: all cores); of Ray: of tasks", lower_bound=0
)
ENGINE = flags.DEFINE_string("engine", "", "ray[:ADDRESS]: run the trials on a Ray cluster (default: on this machine)")
RESOURCES = flags.DEFINE_string(
    "resources", "", "what a trial needs of the cluster, by Ray's names: CPU=1,GPU=0.5 or TPU=4 (default: CPU=1)"
)
SHARD = flags.DEFINE_string(
    "shard", "", "i/n: run every n-th trial from the i-th on (default: every trial that no other machine runs)"
)
LATEX = flags.DEFINE_bool("latex", False, "also write the table as table.tex")
PUBLISHED = flags.DEFINE_multi_string("published", [], "NAME=SCORE: a published score to show in the report")


def main(argv: Sequence[str]) -> None:
    with runner.preempted_by_signal():
        ablate(argv)


def ablate(argv: Sequence[str]) -> None:
    """Runs the ablation defined by the flags."""
    source, rest = cli.take_config(argv)
    overrides = tuple(arg for arg in rest[1:] if arg.startswith(("--config.", "--noconfig.")))
    cli.parse([arg for arg in rest if arg not in overrides])
    copies = cli.cache_folder() / "ablations" if "://" in WORKDIR.value else Path()
    directory, remote = remote_copy.local_directory(WORKDIR.value, copies)
    make = functools.partial(trial_config.config, source, overrides)
    vary = dict(trial_config.values(item) for item in VARY.value)
    space = dict(trial_config.dimension(item) for item in SPACE.value)
    published = dict(trial_config.score(item) for item in PUBLISHED.value)
    resources = trial_config.resources(RESOURCES.value)

    from experiments import progress_table
    from mmfusion.analysis import run_ablation
    from mmfusion.models.fusion import fusion_classes

    names = list(fusion_classes(FUSIONS.value))
    request = run_ablation.Request(
        make, names, SEEDS.value, vary, MATCH.value, METRIC.value, published, EQUIVALENCE.value, TUNE.value,
        TUNE_SEEDS.value, space,
    )  # fmt: skip
    cli.prepare(make(names[0], 0, ""))  # the worker processes inherit this environment
    _, again = cli.take_flag(list(argv), "shard")
    execution = run_ablation.Execution(
        directory,
        JOBS.value if ENGINE.value else JOBS.value or run_ablation.cores(),
        ENGINE.value,
        resources,
        SHARD.value,
        remote,
        prepare_worker=cli.prepare_worker,
        progress=progress_table,
        command=shlex.join(["python", "-m", "experiments.ablate", *again[1:]]),
        train_command=functools.partial(trial_config.command, source, overrides),
        latex=LATEX.value,
    )
    outcome = run_ablation.run_ablation(request, execution)
    if outcome is not None:
        progress_table.conclusion(outcome, remote or directory)


if __name__ == "__main__":
    cli.run(main)
