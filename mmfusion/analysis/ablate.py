"""An ablation from its plan to its claims: run every cell, look closer at the chosen ones, judge, write it down."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis import baselines
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Cell, Plan, code_digest
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.claims import Claims, claims
from mmfusion.analysis.claims.selection import Row
from mmfusion.analysis.probing import pid
from mmfusion.data.dataset import load
from mmfusion.errors import UserError
from mmfusion.files import to_builtin, write_json, write_text

EXAMINED_BY = ("probing/probe", "probing/calibration", "probing/attribution", "probing/corruption", "probing/emap")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an ablation found.

    Attributes:
      metric, higher: what was compared, and whether more of it is better.
      rows: a method each.
      claims: of these.
      results, examined: cell name -> what `result.json` and its examination hold, of cells that have them.
      errors: cell name -> why it failed.
      published: name -> score that others report, to be shown beside these; nothing is claimed of them.
    """

    metric: str
    higher: bool
    rows: tuple[Row, ...]
    claims: Claims
    results: dict[str, dict[str, Any]]
    examined: dict[str, dict[str, Any]]
    errors: dict[str, str]
    published: dict[str, float]


def chosen_cells(plan: Plan, directory: Path, metric: str) -> list[Cell]:
    """Returns the cells of each strategy at the values that validation chose, those that ended in a number.

    A strategy of which a cell is still to be run is left out: nothing is chosen yet.
    """
    results, _ = read(plan, directory)
    open_ = {cell.method for cell in unfinished(plan, directory)}
    rows = [row for row in selection.rows(plan.cells, results, metric) if not row.floor and row.method not in open_]
    names = {name for row in rows for name in row.runs}
    return [cell for cell in plan.cells if cell.name in names]


def unfinished(plan: Plan, directory: Path) -> list[Cell]:
    """Returns the cells that have neither a result nor an error yet."""
    results, errors = read(plan, directory)
    return [cell for cell in plan.cells if cell.name not in results and cell.name not in errors]


def read(plan: Plan, directory: Path, name: str = runner.RESULT) -> tuple[dict[str, dict], dict[str, str]]:
    """Returns by cell name what a file of the cells holds, and the errors of those without it."""
    found, errors = {}, {}
    for cell in plan.cells:
        folder = runner.cell_directory(directory, cell)
        if (folder / name).exists():
            found[cell.name] = configs.read_json(folder / name)
        elif (folder / runner.FAILED).exists():
            errors[cell.name] = configs.read_json(folder / runner.FAILED)["error"]
    return found, errors


def classical(config: ConfigDict, metric: str, seeds: int, directory: Path) -> tuple[list[Row], dict[str, Any]]:
    """Returns what needs no network: classical baselines as rows, and the information in two modalities, in bits.

    Computed once and kept in `baselines_METRIC.json`. The baselines do not depend on a seed: each stands for all of
    them. One whose metric is another is left out.

    Args:
      config: of a cell, with all modalities.
      metric: that is compared.
      seeds: of the plan.
      directory: of the ablation.
    """
    path = directory / f"baselines_{metric.replace('/', '_')}.json"
    prefix, _, name = metric.rpartition("/")
    task = prefix or next(iter(config.data.targets))
    if not path.exists():
        dataset = load(config.data, seed=0)
        found = baselines.baselines(dataset, task, name)
        written: dict[str, Any] = {
            "rows": dataset.rows,
            "baselines": [dataclasses.asdict(one) for one in found],
            "information": {},
        }
        if len(config.data.modalities) == 2 and config.data.targets[task].kind == "classification":
            real, chance = pid.of_dataset(dataset, task)
            written["information"] = {"train": dataclasses.asdict(real), "chance": dataclasses.asdict(chance)}
        write_json(path, to_builtin(written))
    kept = configs.read_json(path)
    rows = [
        Row(
            method=f"{one['name']}, {'+'.join(one['modalities'])}" if one["modalities"] else one["name"],
            floor=len(one["modalities"]) < len(config.data.modalities),
            chosen=one["chosen"],
            runs=(),
            seeds=tuple(range(seeds)),
            lost=(),
            valid=(one["valid"],) * seeds,
            test=(one["test"],) * seeds,
            parameters=None,
        )
        for one in kept["baselines"]
        if one["metric"] == name and None not in (one["valid"], one["test"])
    ]
    return rows, kept["information"]


def conclude(
    plan: Plan,
    directory: Path,
    metric: str,
    baseline_rows: Sequence[Row],
    bits: Mapping[str, Any],
    published: Mapping[str, float],
) -> Outcome:
    """Judges the cells that are there, and writes `runs.csv` and `claims.json`.

    Args:
      plan: of the ablation in `directory`.
      directory: receives the files.
      metric: that methods are chosen and compared by.
      baseline_rows: of methods that are no cells.
      bits: what the modalities tell, as `classical` returns it.
      published: scores that others report.

    Raises:
      UserError: the data changed between two cells.
    """
    results, errors = read(plan, directory)
    _check_data(plan, results, directory)
    examined, failed = read(plan, directory, examining(metric).leaves)
    higher = selection.direction(plan.cells, metric)
    rows = tuple(selection.rows(plan.cells, results, metric))
    looked_at = {name for row in rows if not row.floor for name in row.runs}
    errors |= {name: f"examination: {error}" for name, error in failed.items() if name in looked_at}
    said = claims(rows, baseline_rows, examined, bits, metric, higher)
    _write_runs(plan, results, errors, directory / "runs.csv")
    outcome = Outcome(metric, higher, (*rows, *baseline_rows), said, results, examined, errors, dict(published))
    written = {
        "metric": metric,
        "higher_is_better": higher,
        "published": outcome.published,
        "methods": [dataclasses.asdict(row) for row in outcome.rows],
        **dataclasses.asdict(said),
    }
    write_json(directory / "claims.json", to_builtin(written))
    return outcome


def examining(metric: str) -> runner.Work:
    """Returns the work of examining a finished cell; what it leaves is named by the metric, and by the code of it."""
    leaves = f"examined_{metric.replace('/', '_')}_{code_digest(EXAMINED_BY)}.json"
    return runner.Work(functools.partial(_examine_cell, metric=metric, leaves=leaves), leaves)


def _examine_cell(cell: Cell, folder: Path, metric: str, leaves: str) -> None:
    from mmfusion.analysis.probing.probe import examine

    del cell
    write_json(folder / leaves, to_builtin(examine(folder, metric)))


def _check_data(plan: Plan, results: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Raises UserError where cells, or the baselines, were made of other rows than the first cell."""
    seen: dict[int, tuple[str, str]] = {}
    for cell in plan.cells:
        if cell.name in results:
            pairing = cell.config["seed"] if cell.config["data"]["name"].startswith("pair:") else 0
            name, rows = seen.setdefault(pairing, (cell.name, results[cell.name]["data"]["rows"]))
            if rows != results[cell.name]["data"]["rows"]:
                raise UserError(_changed(name, cell.name))
    for path in directory.glob("baselines_*.json"):
        if 0 in seen and configs.read_json(path)["rows"] != seen[0][1]:
            raise UserError(_changed(seen[0][0], path.name))


def _changed(one: str, other: str) -> str:
    return f"the data changed while the ablation ran: {one} and {other} differ; begin again in another --workdir"


def _write_runs(plan: Plan, results: Mapping[str, Mapping[str, Any]], errors: Mapping[str, str], path: Path) -> None:
    """Writes a line a cell: nothing in it depends on when or where it ran."""
    scores = sorted(
        {
            f"{split}/{name}"
            for result in results.values()
            for split in ("valid", "test")
            for name, value in result[split].items()
            if value is None or isinstance(value, int | float)
        }
    )
    tried = sorted({key for cell in plan.cells for key in cell.tried})
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["cell", "method", "seed", *tried, *scores, "parameters", "steps", "best_step", "error"])
    for cell in plan.cells:
        result = results.get(cell.name)
        numbers = [result[s.split("/", 1)[0]].get(s.split("/", 1)[1]) for s in scores] if result else [""] * len(scores)
        more = [result[key] for key in ("parameters", "steps", "best_step")] if result else [""] * 3
        values = [cell.tried.get(key, "") for key in tried]
        lines.writerow(
            [cell.name, cell.method, cell.config["seed"], *values, *numbers, *more, errors.get(cell.name, "")]
        )
    write_text(path, file.getvalue())
