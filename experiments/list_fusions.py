"""Lists the fusion strategies with their declarations and costs.

`python -m experiments.list_fusions [--fusions=all|a,b] [--width=64] [--plot=FILE.png]`

FLOPs and memory are those of one example's forward pass through the strategy, without encoders and heads, at its
default options.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

FUSIONS = flags.DEFINE_string("fusions", "all", "comma-separated names or package.module:Class, or all")
PLOT = flags.DEFINE_string("plot", "", "an image file to write a plot of cost against tokens to")
WIDTH = flags.DEFINE_integer("width", 64, "width of tokens and features", lower_bound=1)
TOKENS, MODALITIES = (16, 64, 256), (2, 3, 4)
DECLARED = (("additive", "add"), ("synergy", "syn"), ("symmetric", "sym"), ("any_modalities", "any"),
            ("needs_tokens", "tok"), ("unimodal_loss", "own"), ("classes_only", "cls"))  # fmt: skip


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    path = cli.file_in_folder("--plot", PLOT.value) if PLOT.value else None
    cli.enable_compilation_cache()

    import jax
    from rich.console import Console
    from rich.table import Table

    from mmfusion.analysis.ablation.cost import FusionSize, fusion_cost
    from mmfusion.models.fusion import fusion_classes

    fusions = fusion_classes(FUSIONS.value)
    base = FusionSize(width=WIDTH.value)
    console = Console(width=None if Console().is_terminal else 170, markup=False, emoji=False)
    strategies = Table(
        "name", "family", "level", "description", "paper", "declares",
        title="Strategies (add: additive, syn: synergy, sym: symmetric, any: any modalities, tok: reads tokens, "
        "own: each modality has its own loss, cls: single-label classes only)",
    )  # fmt: skip
    for name, kind in fusions.items():
        declared = " ".join(short for field, short in DECLARED if getattr(kind.declares, field))
        line = " ".join(kind.__doc__.split("\n\n")[0].split())
        strategies.add_row(name, kind.declares.family, kind.declares.level, line, kind.declares.paper, declared)
    console.print(strategies)

    def flops(kind: type, **changes: int) -> str:
        try:
            return shown(fusion_cost(kind, dataclasses.replace(base, **changes)).flops)
        except UserError:
            return "refused"

    costs = Table(
        "name", "parameters", "FLOPs", "memory",
        *(f"N={n}" for n in TOKENS), *(f"M={m}" for m in MODALITIES),
        title=f"One example: M={base.modalities} modalities, N={base.tokens} tokens, width {base.width}; FLOPs as N or "
        f"M grows; jax {jax.__version__}, {jax.devices()[0].device_kind}",
    )  # fmt: skip
    for name, kind in fusions.items():
        try:
            cost = fusion_cost(kind, base, compiled=True)
            first = f"{cost.parameters:,}", shown(cost.flops), f"{shown(cost.memory)}B"
        except UserError:
            first = "refused", "", ""
        costs.add_row(
            name, *first, *(flops(kind, tokens=n) for n in TOKENS), *(flops(kind, modalities=m) for m in MODALITIES)
        )
    console.print(costs)
    if path:
        plot(fusions, base, path)


def shown(number: float) -> str:
    """Returns a value with three significant digits and an SI prefix."""
    if math.isnan(number):
        return "?"
    for divisor, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= divisor:
            return f"{number / divisor:.3g}{prefix}"
    return f"{number:.0f} "


def plot(fusions: dict[str, type], base, path: Path) -> None:
    """Plots FLOPs against tokens, with one line per strategy, labelled at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mmfusion.analysis.ablation.cost import fusion_cost

    tokens = [4, 16, 64, 256, 1024]
    figure, axes = pyplot.subplots(figsize=(9, 9), layout="constrained")
    families = sorted({kind.declares.family for kind in fusions.values()})
    ends = []
    for name, kind in fusions.items():
        try:
            flops = [fusion_cost(kind, dataclasses.replace(base, tokens=n)).flops for n in tokens]
        except UserError:
            continue  # reported in the table
        colour = f"C{families.index(kind.declares.family)}"
        axes.plot(tokens, flops, color=colour, linewidth=1, alpha=0.8)
        ends.append((flops[-1], name, colour))
    height = 0.0
    for flops, name, colour in sorted(ends):
        height = max(math.log10(max(flops, 1)), height + 0.11)  # keeps labels apart
        axes.annotate(
            name, (tokens[-1] * 1.1, 10**height), color=colour, fontsize=7, va="center", annotation_clip=False
        )
    for i, family in enumerate(families):
        axes.plot([], [], color=f"C{i}", label=family)
    axes.set(
        xscale="log", yscale="log", xlabel="tokens per modality", ylabel="FLOPs per example, forward", xlim=(4, 4500)
    )
    axes.set_title(f"Cost without encoders and heads: {base.modalities} modalities, width {base.width}")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main)
