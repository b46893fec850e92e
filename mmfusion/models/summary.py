"""Summary of a model: output shape, number of parameters and fraction of the FLOPs of each component."""

import math
import re
from typing import NamedTuple

import jax

from mmfusion.data.batch import Batch
from mmfusion.models.encoders.images import PerImage
from mmfusion.models.model import FusionModel


class Row(NamedTuple):
    """One component of a model.

    Attributes:
      path: `encoders.<modality>`, `fusion`, `heads.<task>` or `auxiliaries.<objective>`.
      shape: output shape: tokens `(B, N, D)`, features `(B, D)`, logits `(B, C)` or losses `(B,)`.
      parameters: number of parameters.
      flops: fraction, 0 to 1, of the forward pass's FLOPs in matrix products and convolutions.
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    flops: float


def summarize(model: FusionModel, variables: dict, batch: Batch) -> list[Row]:
    """Returns one Row per encoder, one for the fusion, and one per task and objective, without running the model.

    Args:
      model: the model.
      variables: variables of the model, arrays or shapes.
      batch: a batch, arrays or shapes, with float32 images.
    """

    def forward(variables: dict, batch: Batch):
        return model.apply(
            variables, batch, train=False, capture_intermediates=_is_top_level, mutable=["intermediates"]
        )

    closed_jaxpr, (outputs, captured_state) = jax.make_jaxpr(forward, return_shape=True)(variables, batch)
    intermediates = captured_state["intermediates"]
    shapes = {f"encoders.{m}": intermediates[f"encoders_{m}"]["__call__"][0][0].shape for m in sorted(model.encoders)}
    if model.fusion.declares.level == "feature":
        shapes["fusion"] = outputs.features.shape
    else:
        shapes["fusion"] = outputs.logits[model.tasks[0][0]].shape
    shapes |= {f"heads.{task}": outputs.logits[task].shape for task, _ in model.tasks}
    shapes |= {f"auxiliaries.{name}": outputs.auxiliary[name].shape for name in model.auxiliaries}

    flops, parameters = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, 0)
    component_of = {child: path for child in variables["params"] for path in shapes if _belongs_to(path, child, model)}
    for equation in closed_jaxpr.jaxpr.eqns:
        scopes = str(equation.source_info.name_stack).split("/")
        components = [component_of[scope] for scope in scopes if scope in component_of]
        if components:
            flops[components[0]] += _equation_flops(equation)
    for child, leaves in variables["params"].items():
        parameters[component_of.get(child, "fusion")] += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))
    total = max(sum(flops.values()), 1)
    return [Row(path, tuple(shape), parameters[path], flops[path] / total) for path, shape in shapes.items()]


def _is_top_level(module, method: str) -> bool:
    inside = isinstance(module.parent, PerImage)  # an encoder that shares the path of its wrapper
    return method == "__call__" and len(module.path) == 1 and not inside


def _belongs_to(path: str, child: str, model: FusionModel) -> bool:
    if path.startswith("heads.") and model.fusion.declares.level != "feature":
        return child in {f"{path.replace('.', '_', 1)}_{m}" for m in model.modalities}
    if path.startswith("heads.") and re.match(rf"(unimodal|probes)_{re.escape(path.partition('.')[2])}_", child):
        return True
    return child == path.replace(".", "_", 1) or (path == "fusion" and child.startswith("fusion_"))


def _equation_flops(equation) -> int:
    """Returns the FLOPs of a jaxpr equation and of the jaxprs it calls; a scan's body counts once per iteration."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        contraction_size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * contraction_size * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // out_channels)
    repeats = params["length"] if name == "scan" else 1
    called = [getattr(value, "jaxpr", value) for value in params.values()]
    return repeats * sum(_equation_flops(e) for jaxpr in called if hasattr(jaxpr, "eqns") for e in jaxpr.eqns)
