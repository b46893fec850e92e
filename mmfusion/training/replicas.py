"""Several runs that differ in seed and learning rate only, their updates taken by one compiled program.

R runs
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mmfusion.distributed.mesh import Partitioner
from mmfusion.models.convolution import as_patches
from mmfusion.training.loop import Call, Run

Result = dict[str, Any] | Exception
Around = Callable[[int], contextlib.AbstractContextManager]


def train_together(runs: Sequence[Run], around: Around = lambda _: contextlib.nullcontext()) -> list[Result]:
    """Drives runs of one model, in step, as `mmfusion.training.loop.train` drives one.

    Each sees the examples, the random numbers and the files that it would see by itself. A run that ends early, by an
    error or because it was done before, leaves the others a smaller program.

    Args:
      runs: what `mmfusion.training.loop.run` gives, for configs that differ in their seed and learning rate only.
      around: the number of a run -> a context to be in while that run works by itself.

    Returns:
      For each run its result, or the exception that ended it.

    Raises:
      jax.errors.JaxRuntimeError: the device has not the memory for all; the runs are closed and can be begun again.
    """
    results: list[Result | None] = [None] * len(runs)
    answers: dict[int, Any] = dict.fromkeys(range(len(runs)))
    compiled: dict[int, Callable[..., Any]] = {}
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(contextlib.closing(run))
        while answers:
            calls: dict[int, Call] = {}
            for i, answer in answers.items():
                try:
                    with around(i):
                        calls[i] = runs[i].send(answer)
                except StopIteration as end:
                    results[i] = end.value
                except Exception as error:
                    results[i] = error
            if not calls:
                break
            given = [tuple(getattr(call, what) for call in calls.values()) for what in ("state", "batches", "rates")]
            if len(calls) not in compiled:
                first = next(iter(calls.values()))
                compiled[len(calls)] = _compile(first.parts.partitioner, first, len(calls))
            with jax.transfer_guard("disallow"):
                answers = dict(zip(calls, compiled[len(calls)](*given), strict=True))
    return results


def _compile(partitioner: Partitioner, call: Call, replicas: int) -> Callable[..., Any]:
    step = call.parts.step(call.accumulate)

    def with_patches(*args: Any) -> Any:
        with as_patches():  # while it is traced
            return step(*args)

    return partitioner.compile_train(with_patches, replicas=replicas)
