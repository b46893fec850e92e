"""Scores a run's best checkpoint on any split, with any subset of its modalities; prints a table, writes JSON."""

from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.distributed import hosts

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
SPLIT = flags.DEFINE_string("split", "test", "train, valid or test")
flags.DEFINE_string("distributed", "", "as of experiments.train")
MODALITIES = flags.DEFINE_list("modalities", [], "those that stay; the others count as absent (default: all)")


def main(argv: Sequence[str]) -> None:
    where, rest = cli.take_flag(list(argv), "distributed")
    hosts.initialize(where or "")
    cli.parse(rest)
    cli.enable_compilation_cache()

    import jax
    from rich.console import Console

    from mmfusion.files import write_json
    from mmfusion.inference.evaluate import evaluate
    from mmfusion.tracking.tables import results_table

    hosts.check_same(repr((WORKDIR.value, SPLIT.value, sorted(MODALITIES.value))), "command")
    scores = evaluate(WORKDIR.value, SPLIT.value, MODALITIES.value or None)
    if jax.process_index():
        return
    title = f"{scores['split']}: {'+'.join(scores['modalities'])}"
    numbers = {name: value for name, value in scores.items() if name not in ("split", "modalities", "step")}
    Console().print(results_table({title: numbers}))
    write_json(f"{WORKDIR.value.rstrip('/')}/evaluation.json", scores)


if __name__ == "__main__":
    cli.run(main)
