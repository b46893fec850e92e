"""The calibration of an opened run: read from its directory, or fitted to its validation split and saved there."""

import contextlib

from etils import epath

from mmfusion.checkpoints.checksums import CHECKSUM
from mmfusion.config import read_json
from mmfusion.data import dataset as datasets
from mmfusion.errors import UserError
from mmfusion.files import write_json
from mmfusion.training import calibration
from mmfusion.training.calibration import Calibration
from mmfusion.training.evaluation import collect
from mmfusion.training.restore import Run


def load_calibration(run: Run) -> dict[str, Calibration]:
    """Returns the calibration of each task at the run's checkpoint.

    A finished run has it. That of a run which has not finished is fitted with its best checkpoint so far.

    Args:
      run: an opened run.

    Raises:
      UserError: the file is damaged, or there is none and the validation split cannot be read.
    """
    path = epath.Path(run.workdir) / calibration.FILE
    content = read_json(path) if path.is_file() else {}
    try:
        if content and content["step"] == run.step:
            saved = calibration.from_json(content, run.checkpoint)
            return {task: saved[task] for task in run.setup.tasks}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "is damaged, or of another checkpoint: remove it, and it is fitted again", path=str(path)
        ) from error
    fitted = _fit(run)
    with contextlib.suppress(OSError):  # of a directory that is read-only it is fitted each time
        write_json(path, calibration.to_json(fitted, {"step": run.step, CHECKSUM: run.checkpoint}))
    return fitted


def _fit(run: Run) -> dict[str, Calibration]:
    config, setup = run.config, run.setup
    split = run.dataset.splits.get("valid")
    if split is None:
        saved = run.dataset.saved()
        split = datasets.load(config.data, seed=config.seed, splits=("valid",), saved=saved).splits["valid"]
    collected = collect(
        setup.compile_eval_step(),
        run.state,
        split,
        setup,
        batch_size=config.batch_size,
        workers=config.data.workers,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    return calibration.fit(collected, setup.tasks)
