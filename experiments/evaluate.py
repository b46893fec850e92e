"""Evaluates a run's best checkpoint on a split, with any subset of its modalities.

`python -m experiments.evaluate --workdir=DIR [--split=test] [--modalities=image,text]`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.distributed import hosts

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
SPLIT = flags.DEFINE_string("split", "test", "train, valid or test")
flags.DEFINE_string("distributed", "", "multi-host evaluation, see experiments.train")
MODALITIES = flags.DEFINE_list("modalities", [], "modalities to keep; the others count as absent (default: all)")


def main(argv: Sequence[str]) -> None:
    distributed, rest = cli.take_flag(list(argv), "distributed")
    hosts.initialize(distributed or "")
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
    metrics = {name: value for name, value in scores.items() if name not in ("split", "modalities", "step")}
    Console().print(results_table({title: metrics}))
    write_json(f"{WORKDIR.value.rstrip('/')}/evaluation.json", scores)


if __name__ == "__main__":
    cli.run(main)
