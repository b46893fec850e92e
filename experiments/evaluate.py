"""Evaluates a run's best checkpoint on a split of its dataset or of another, with any subset of its modalities.

`python -m experiments.evaluate --workdir=DIR [--split=test] [--modalities=image,text] [--data=NAME] [--data_dir=DIR]`

Appends the metrics to `evaluation.json` in the run's directory, a list with an entry per call.
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.distributed import hosts

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
SPLIT = flags.DEFINE_string("split", "test", "train, valid or test; of another dataset a split expression, test[:50%]")
DATA = flags.DEFINE_string("data", "", "another prepared dataset with the same features and classes (default: its own)")
DATA_DIR = flags.DEFINE_string("data_dir", "", "where the dataset is prepared (default: where the run's own was)")
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)
flags.DEFINE_string("distributed", "", "multi-host evaluation, see experiments.train")
MODALITIES = flags.DEFINE_list("modalities", [], "modalities to keep; the others count as absent (default: all)")


def main(argv: Sequence[str]) -> None:
    distributed, rest = cli.take_flag(list(argv), "distributed")
    hosts.initialize(distributed or "")
    cli.parse(rest)
    cli.enable_compilation_cache()

    import jax
    from rich.console import Console

    from mmfusion.files import append_json
    from mmfusion.inference.evaluate import evaluate
    from mmfusion.tracking.tables import results_table
    from mmfusion.training.restore import trust_run

    hosts.check_same(repr((WORKDIR.value, SPLIT.value, DATA.value, sorted(MODALITIES.value))), "command")
    if TRUST.value:
        trust_run(WORKDIR.value)
    scores = evaluate(WORKDIR.value, SPLIT.value, MODALITIES.value or None, data=DATA.value, data_dir=DATA_DIR.value)
    if jax.process_index():
        return
    title = f"{DATA.value} {scores['split']}: {'+'.join(scores['modalities'])}".strip()
    metrics = {name: value for name, value in scores.items() if name not in ("data", "split", "modalities", "step")}
    Console(markup=False, emoji=False).print(results_table({title: metrics}))
    append_json(f"{WORKDIR.value.rstrip('/')}/evaluation.json", scores)


if __name__ == "__main__":
    cli.run(main)
