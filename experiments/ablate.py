"""Compares fusion strategies over seeds, and ends in a claim with its evidence.

`python -m experiments.ablate --config=configs/X.py --fusions=all|a,b --seeds=N --workdir=DIR [--match=parameters|flops]
[--vary=optim.learning_rate=1e-3,3e-4] [--jobs=N] [--shard=i/n] [--config.key=value ...]`
"""

import functools
import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli, trial_config
from experiments.strategies import fusion_classes
from mmfusion.analysis.ablation import remote_copy, runner
from mmfusion.errors import UserError, nearest

WORKDIR = flags.DEFINE_string("workdir", None, "the ablation's directory, a local one or gs://...", required=True)
SEEDS = flags.DEFINE_integer(
    "seeds", 6, "of every method; six can tell one difference at the earliest, nine one of eleven"
)
MATCH = flags.DEFINE_enum(
    "match", "none", ["none", "parameters", "flops"], "choose each strategy's width so that all cost the same"
)
VARY = flags.DEFINE_multi_string("vary", [], "KEY=VALUE,VALUE: a config key and what to try; optim.* by validation")
METRIC = flags.DEFINE_string("metric", "", "that chooses and is compared (default: the config's, if it is no loss)")
JOBS = flags.DEFINE_integer("jobs", 0, "processes on CPU, each on its own core (default: one a core)", lower_bound=0)
SHARD = flags.DEFINE_string("shard", "0/1", "i/n: run only this share of the plan; the others run theirs")
LATEX = flags.DEFINE_bool("latex", False, "write the table as table.tex, too")
PUBLISHED = flags.DEFINE_multi_string("published", [], "NAME=SCORE: a score that others report, shown beside ours")


def main(argv: Sequence[str]) -> None:
    with runner.preempted_by_sigterm():
        ablate(argv)


def ablate(argv: Sequence[str]) -> None:
    """Plans, runs, examines and judges."""
    source, rest = cli.take_config(argv)
    overrides = [arg for arg in rest[1:] if arg.startswith(("--config.", "--noconfig."))]
    cli.parse([arg for arg in rest if arg not in overrides])
    directory, remote = remote_copy.local(WORKDIR.value, cli.cache_folder() / "ablations")
    make = functools.partial(trial_config.config, source, tuple(overrides))
    vary = dict(trial_config.values(item) for item in VARY.value)
    published = dict(trial_config.score(item) for item in PUBLISHED.value)
    if SEEDS.value < 1:
        raise UserError(f"--seeds={SEEDS.value} must be at least 1")

    import jax

    from experiments import progress_table
    from mmfusion import config as configs
    from mmfusion.analysis import ablate as ablation
    from mmfusion.analysis import report
    from mmfusion.analysis.ablation import budget, plan, replicated_runner
    from mmfusion.analysis.probing.probe import compared_metric

    names = list(fusion_classes())
    example = make(names[0], 0, "")
    cli.prepare(example)  # the processes that train begin with this one's environment
    metric = METRIC.value or compared_metric(example)
    if metric not in (have := configs.selectable(example)):
        raise UserError(f"--metric={metric}: {nearest(metric, have)}")
    if MATCH.value != "none":
        make, target, matches = budget.matched(make, names, MATCH.value)
        progress_table.matches(matches, MATCH.value, target)
    planned = plan.build(make, names, SEEDS.value, vary)
    for cell in planned.cells:
        configs.check(configs.from_json(cell.config), jax.device_count())
    try:
        mine = runner.shard(planned.cells, SHARD.value)
    except ValueError as error:
        raise UserError(f"--shard={error}") from error
    shared = remote_copy.Mirror(remote, directory)
    shared.fetch(planned.cells)
    settled = plan.settle(planned, directory)
    shared.send()
    jobs = JOBS.value or (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())

    with runner.Pool(directory, jobs, cli.prepare_worker) as pool:
        work_on = pool.run if jax.default_backend() == "cpu" else functools.partial(replicated_runner.run, directory)

        def look_at(cells: Sequence[plan.Cell]) -> None:
            names, work = {cell.name for cell in cells}, ablation.examining(metric)
            best = [cell for cell in ablation.chosen_cells(settled, directory, metric) if cell.name in names]
            progress_table.show("examine", best, directory, shared.sending(work_on(best, work)), work)

        progress_table.show("train", mine, directory, shared.sending(work_on(mine, runner.TRAINING)), runner.TRAINING)
        shared.fetch(planned.cells)
        if ablation.unfinished(settled, directory):
            look_at(mine)  # and then, whether the others have finished
            shared.fetch(planned.cells)
        if waiting := ablation.unfinished(settled, directory):
            print(f"{len(waiting)} of {len(settled.cells)} cells are left to other shards; the last writes the report")
            return
        look_at(settled.cells)
    outcome = ablation.conclude(
        settled, directory, metric, *ablation.classical(example, metric, SEEDS.value, directory), published
    )
    _, again = cli.take_flag(list(argv), "shard")
    command = shlex.join(["python", "-m", "experiments.ablate", *again[1:]])
    train = functools.partial(trial_config.command, source, tuple(overrides))
    report.write(outcome, settled, directory, command, train, LATEX.value)
    shared.send()
    progress_table.conclusion(outcome, remote or directory)


if __name__ == "__main__":
    cli.run(main)
