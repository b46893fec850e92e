"""Exports a trained run as files that need none of its code: program, weights, preprocessing as data, a model card.

B batch · N positions · C classes
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from mmfusion.config import read_json
from mmfusion.data.batch import Batch
from mmfusion.data.modalities import feature_names
from mmfusion.files import write_json
from mmfusion.inference.calibration import load_calibration
from mmfusion.inference.model_card import model_card
from mmfusion.inference.output_folder import check_new, new_folder
from mmfusion.objectives import Task
from mmfusion.training.calibration import Calibration
from mmfusion.training.restore import Run, open_run

FORMAT = 1  # of preprocessing.json
PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = Path(__file__).with_name("load_example.py")

Arrays = dict[str, jax.Array]


def export(workdir: str | Path, output: str | Path) -> list[str]:
    """Exports a run's best checkpoint to a folder, whole or not at all.

    The program takes (weights, inputs, mask, present), each a dict of arrays: the weights by name, and per modality the
    decoded input `[B, ...]`, its mask `[B, N]` and its presence `[B]` of a batch of any size. It normalises the inputs,
    and returns per task a dict of `logits` `[B, C]` and calibrated `probabilities` `[B, C]`, or `value` `[B]` in the
    units of the data.

    Args:
      workdir: the run's directory, local or in a bucket.
      output: the folder to write: `model.stablehlo` (`jax.export.Exported.serialize`), `weights.safetensors`,
        `preprocessing.json`, `tokenizer.MODALITY.json` per text, `README.md` and `load_example.py`.

    Returns:
      The platforms that the program runs on.

    Raises:
      UserError: no such run, or the folder exists and is not empty, or cannot be written.
    """
    target = Path(output)
    label = f"--output={target}"
    check_new(target, label)
    run = open_run(workdir, [], _on_one_device)
    calibration = load_calibration(run)
    path = epath.Path(workdir) / "result.json"
    result = read_json(path) if path.is_file() else None
    with new_folder(target, label) as folder:
        return _write(run, calibration, result, folder)


def _on_one_device(config: ConfigDict) -> None:
    """Changes a config so that its program names no device axis, and computes in float32 unless a dtype is set."""
    config.parallel.mode = "jit"
    config.parallel.devices = 1
    config.parallel.mesh.update({"data": -1, "fsdp": 1, "model": 1})
    if config.model.dtype == "auto":
        config.model.dtype = "float32"


def _write(run: Run, calibration: Mapping[str, Calibration], result: Mapping[str, Any] | None, folder: Path) -> list:
    weights = flat_weights(run)
    exported = lower(run, weights, calibration)
    (folder / "model.stablehlo").write_bytes(exported.serialize())
    save_file(weights, folder / "weights.safetensors")
    write_json(folder / "preprocessing.json", preprocessing(run, calibration, folder))
    platforms = list(exported.platforms)
    card = model_card(run, result, platforms, calibration)
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(LOADER, folder / LOADER.name)
    return platforms


def flat_weights(run: Run) -> dict[str, np.ndarray]:
    """Returns the parameters and batch statistics by their path, such as `params/heads_label/kernel`."""
    host = run.setup.partitioner.to_host({"params": run.state.params, "batch_stats": run.state.batch_stats})
    return {name: np.asarray(x, order="C") for name, x in traverse_util.flatten_dict(host, sep="/").items()}


def lower(run: Run, weights: Mapping[str, np.ndarray], calibration: Mapping[str, Calibration]) -> jax.export.Exported:
    """Returns the program for a batch of any size, for every platform that it lowers to without its devices."""
    (rows,) = jax.export.symbolic_shape("b")
    shapes = run.dataset.reader.shapes()
    inputs = {m: jax.ShapeDtypeStruct((rows, *shape), dtype) for m, (shape, dtype, _) in shapes.items()}
    mask = {m: jax.ShapeDtypeStruct((rows, positions), bool) for m, (_, _, positions) in shapes.items()}
    present = {m: jax.ShapeDtypeStruct((rows,), bool) for m in shapes}
    arguments = ({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}, inputs, mask, present)
    jitted = jax.jit(program(run, calibration))
    try:
        return jax.export.export(jitted, platforms=PLATFORMS)(*arguments)
    except NotImplementedError:  # an operation that is not lowered for one of them
        return jax.export.export(jitted, platforms=PLATFORMS[:1])(*arguments)


def program(
    run: Run, calibration: Mapping[str, Calibration]
) -> Callable[[Arrays, Arrays, Arrays, Arrays], dict[str, Arrays]]:
    """Returns the function that is exported; see `export`."""
    setup = run.setup

    def predict(weights: Arrays, inputs: Arrays, mask: Arrays, present: Arrays) -> dict[str, Arrays]:
        variables = {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(weights, sep="/")}
        rows = next(iter(present.values())).shape
        batch = Batch(inputs, mask, present, {}, jnp.ones(rows, jnp.float32), jnp.zeros(rows, jnp.int32))
        outputs: Any = setup.model.apply(variables, setup.preprocess(batch, None), train=False)
        return {
            task: _task_outputs(outputs.logits[task], spec, calibration[task]) for task, spec in setup.tasks.items()
        }

    return predict


def _task_outputs(logits: jax.Array, task: Task, calibration: Calibration) -> Arrays:
    if task.kind == "regression":
        value = logits[:, 0] * task.scale.std + task.scale.mean
        return {"value": jnp.exp(value) if task.scale.log else value}
    scaled = logits / calibration.temperature
    probabilities = jax.nn.softmax(scaled, axis=1) if task.kind == "classification" else jax.nn.sigmoid(scaled)
    return {"logits": logits, "probabilities": probabilities}


def preprocessing(run: Run, calibration: Mapping[str, Calibration], folder: Path) -> dict[str, Any]:
    """Returns the content of `preprocessing.json`; tokenizers are written to files of their own in `folder`."""
    reader, fitted = run.dataset.reader, run.dataset.saved()["learned"]
    modalities = {}
    for m, (shape, dtype, positions) in reader.shapes().items():
        options = dict(reader.modalities[m])
        names = feature_names(options)
        kind = options.pop("kind")
        modalities[m] = {
            "type": kind,
            "features": names,
            "options": {name: value for name, value in options.items() if name not in ("feature", "augment")},
            "shape": list(shape),
            "dtype": np.dtype(dtype).name,
            "positions": positions,
            "class_names": {name: list(reader.class_names[name]) for name in names if name in reader.class_names},
        }
        if kind == "text":
            modalities[m]["tokenizer"] = f"tokenizer.{m}.json"
            (folder / modalities[m]["tokenizer"]).write_text(fitted[m], encoding="utf-8")
        elif m in fitted:
            modalities[m]["fitted"] = _as_data(fitted[m])
    return {
        "format": FORMAT,
        "data": run.dataset.name,
        "step": run.step,
        "modalities": modalities,
        "tasks": {
            task: {
                "kind": spec.kind,
                "classes": list(run.dataset.class_names[task]),
                "scale": dataclasses.asdict(spec.scale),  # applied in the program, as is the temperature
                "temperature": calibration[task].temperature,
            }
            for task, spec in run.setup.tasks.items()
        },
    }


def _as_data(fitted: str) -> Any:
    """Returns fitted state as JSON values; as a string if it is of a type with a format of its own."""
    try:
        return json.loads(fitted)
    except ValueError:
        return fitted
