"""Where encoders begin: at published weights, or at those of another run, as `init` of their config says."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mmfusion.errors import UserError, nearest
from mmfusion.models.encoders.images import PerImage
from mmfusion.models.model import FusionModel
from mmfusion.models.pretrained import sources, weights
from mmfusion.training.restore import open_run
from mmfusion.training.state import TrainState


def begin(
    encoders: Mapping[str, Any], model: FusionModel, state: TrainState, fitted: Mapping[str, str]
) -> tuple[TrainState, list[str]]:
    """Returns the state with every encoder's weights as its `init` says, and a line a person can read for each.

    With the encoder of another run come the heads that this modality has of its own in both, those of a strategy of
    decisions.

    Args:
      encoders: the section `model.encoders` of a config.
      model: what it describes.
      state: before the first step, on the host.
      fitted: what training rows have taught of each modality, such as a vocabulary.

    Raises:
      UserError: the weights cannot be read or do not fit, or the other run's vocabulary is another.
    """
    said = []
    for m, options in encoders.items():
        if not (source := options.init):
            continue
        name = f"encoders_{m}"
        params, batch_stats, heads = state.params[name], state.batch_stats.get(name, {}), {}
        if weights.from_run(source):
            params, batch_stats, heads, line = _of_run(source, m, state, fitted.get(m))
        else:
            encoder: Any = model.encoders[m]
            found = weights.load(
                encoder.encoder if isinstance(encoder, PerImage) else encoder,
                params,
                batch_stats,
                weights.read(source, sources.CACHE),
                source,
            )
            params, batch_stats = found.params, found.batch_stats
            names = sorted(left for left in found.left_out if not left.endswith("num_batches_tracked"))
            line = f"init   {m}: {source}" + (f"; not used: {', '.join(names)}" if names else "")
        said.append(line)
        state = state.replace(
            params={**state.params, **heads, name: params},
            batch_stats={**state.batch_stats, name: batch_stats} if batch_stats else state.batch_stats,
        )
    return state, said


def check_sources(encoders: Mapping[str, Any]) -> None:
    """Raises UserError where an encoder of a new run starts from a run or from weights that are not there."""
    for m, options in encoders.items():
        run = epath.Path(options.init.removeprefix(weights.RUN), "config.json")
        path = f"config.model.encoders.{m}.init"
        if weights.from_run(options.init) and (options.init == weights.RUN or not run.is_file()):
            raise UserError("is no run directory: it has no config.json", path=path, value=options.init)
        if options.init and not weights.from_run(options.init):
            sources.find(options.init, path)


def _of_run(source: str, modality: str, state: TrainState, fitted: str | None) -> tuple[Any, Any, Any, str]:
    """Returns the encoder's variables and its heads at the best checkpoint of another run, if of the same shapes."""
    run = open_run(source.removeprefix(weights.RUN), [])
    theirs = jax.device_get(run.state)
    name, path = f"encoders_{modality}", f"config.model.encoders.{modality}.init"
    if name not in theirs.params:
        known = [key.removeprefix("encoders_") for key in theirs.params if key.startswith("encoders_")]
        message = f"that run has no encoder of {modality!r}: {nearest(modality, known)}"
        raise UserError(message, path=path, value=source)
    own, other = (jax.tree.map(np.shape, _parts(one, name)) for one in (state, theirs))
    if own != other:
        raise UserError("its encoder has other layers; give it the same options here", path=path, value=source)
    if run.dataset.fitted.get(modality) != fitted:
        raise UserError(
            f"its {modality!r} has another vocabulary or range, whose numbers mean other things: train both on the "
            "same rows, or give both the same tokenizer file or range",
            path=path,
            value=source,
        )
    heads = {
        head: values
        for head, values in theirs.params.items()
        if run.setup.model.fusion.declares.level != "feature"
        and head.startswith("heads_") and head.endswith(f"_{modality}")
        and jax.tree.map(np.shape, values) == jax.tree.map(np.shape, state.params.get(head))
    }  # fmt: skip
    also = f" with {', '.join(heads)}" if heads else ""
    return *_parts(theirs, name), heads, f"init   {modality}: {source}, step {run.step}{also}"


def _parts(state: TrainState, name: str) -> tuple[Any, Any]:
    return state.params[name], state.batch_stats.get(name, {})
