"""Where a trained model looks: some test examples with their inputs and attention weights.

H W picture · C channels · S audio samples · N tokens
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfusion.analysis.examine import some
from mmfusion.evaluate import open_run

EXAMPLES = 12


@dataclasses.dataclass(frozen=True)
class Shown:
    """A test example as a person would see it, and where the model looked.

    Attributes:
      id: the row's number in its source.
      target, predicted: names of classes, or numbers.
      inputs: modality -> picture `[H, W, C]` uint8, words (one a token), or samples `[S]`; absent ones are left out.
      attention: (query modality, key modality) -> weights `[N_query, N_key]`, the mean over heads, of real tokens of
        texts and all of others; empty of strategies without attention.
    """

    id: int
    target: str
    predicted: str
    inputs: dict[str, Any]
    attention: dict[tuple[str, str], np.ndarray]


def examples(workdir: str | Path, count: int = EXAMPLES) -> list[Shown]:
    """Returns test examples of a finished run of one target, drawn by a fixed seed, at its best checkpoint."""
    run = open_run(workdir, ["test"])
    raw = some(run.dataset.splits["test"], count)
    (task,) = run.parts.tasks
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}

    @jax.jit
    def forward(variables: Mapping[str, Any], batch: Any) -> Any:
        out = run.parts.model.apply(variables, run.parts.preprocess(batch, None), train=False)
        return out.logits, {pair: weights.mean(axis=1) for pair, weights in out.attention.items()}

    logits, attention = jax.device_get(forward(variables, raw))
    reader = run.dataset.reader
    shown = []
    for i in range(len(raw.id)):
        kept = {
            m: raw.mask[m][i] if o["kind"] == "text" else slice(None)
            for m, o in reader.modalities.items()
            if raw.present[m][i]
        }
        absent = set(reader.modalities) - set(kept)
        inputs = {
            m: [reader.tokenizers[m].id_to_token(int(k)) for k in raw.inputs[m][i][real]]
            if reader.modalities[m]["kind"] == "text"
            else raw.inputs[m][i][raw.mask[m][i]]
            if reader.modalities[m]["kind"] == "audio"
            else raw.inputs[m][i]
            for m, real in kept.items()
        }
        weights = {
            (q, k): w[i][kept.get(q, slice(None))][:, kept.get(k, slice(None))]
            for (q, k), w in attention.items()
            if not absent & {q, k}
        }
        names = run.dataset.class_names[task]
        said = (raw.targets[task][i], logits[task][i].argmax() if names else logits[task][i][0])
        target, predicted = (names[int(x)] if names else f"{float(x):.3g}" for x in said)
        shown.append(Shown(int(raw.id[i]), target, predicted, inputs, weights))
    return shown
