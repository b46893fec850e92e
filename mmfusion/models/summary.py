"""Summary of a model: output shape, parameters and share of the floating-point operations of each part."""

import math
import re
from typing import NamedTuple

import jax

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel


class Row(NamedTuple):
    """One part of a model.

    Attributes:
      path: `encoders.<modality>`, `fusion`, `heads.<task>` or `auxiliaries.<objective>`.
      shape: shape of its output: tokens `(B, N, D)`, features `(B, D)`, logits `(B, C)` or losses `(B,)`.
      parameters: number of parameters.
      flops: its share, 0 to 1, of the forward pass's floating-point operations in matrix products and convolutions.
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    flops: float


def summarize(model: FusionModel, variables: dict, batch: Batch) -> list[Row]:
    """Returns a Row per encoder, one for the fusion, and one per task and objective; the model is only traced.

    Args:
      model: the model.
      variables: its variables, arrays or shapes.
      batch: a batch, arrays or shapes, with images as float32.
    """

    def forward(variables: dict, batch: Batch):
        return model.apply(variables, batch, train=False, capture_intermediates=_is_part, mutable=["intermediates"])

    closed, (outputs, captured) = jax.make_jaxpr(forward, return_shape=True)(variables, batch)
    intermediates = captured["intermediates"]
    shapes = {f"encoders.{m}": intermediates[f"encoders_{m}"]["__call__"][0][0].shape for m in sorted(model.encoders)}
    if model.fusion.declares.level == "feature":
        shapes["fusion"] = outputs.features.shape
    else:
        shapes["fusion"] = outputs.logits[model.tasks[0][0]].shape
    shapes |= {f"heads.{task}": outputs.logits[task].shape for task, _ in model.tasks}
    shapes |= {f"auxiliaries.{name}": outputs.auxiliary[name].shape for name in model.auxiliaries}

    flops, parameters = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    owner = {child: path for child in variables["params"] for path in shapes if _owns(path, child, model)}
    for equation in closed.jaxpr.eqns:
        scopes = str(equation.source_info.name_stack).split("/")
        owners = [owner[scope] for scope in scopes if scope in owner]
        if owners:
            flops[owners[0]] += _equation_flops(equation)
    for child, leaves in variables["params"].items():
        parameters[owner.get(child, "fusion")] += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))
    total = max(sum(flops.values()), 1)
    return [Row(path, tuple(shape), parameters[path], flops[path] / total) for path, shape in shapes.items()]


def _is_part(module, method: str) -> bool:
    return method == "__call__" and len(module.path) == 1


def _owns(path: str, child: str, model: FusionModel) -> bool:
    if path.startswith("heads.") and model.fusion.declares.level != "feature":
        return child in {f"{path.replace('.', '_', 1)}_{m}" for m in model.modalities}
    if path.startswith("heads.") and re.match(rf"(unimodal|probes)_{re.escape(path.partition('.')[2])}_", child):
        return True
    return child == path.replace(".", "_", 1) or (path == "fusion" and child.startswith("fusion_"))


def _equation_flops(equation) -> int:
    """Returns the operations of an equation of a jaxpr and of the jaxprs it calls; a scan's body counts each step."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * terms * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // outputs)
    repeats = params["length"] if name == "scan" else 1
    called = [getattr(value, "jaxpr", value) for value in params.values()]
    return repeats * sum(_equation_flops(e) for jaxpr in called if hasattr(jaxpr, "eqns") for e in jaxpr.eqns)
