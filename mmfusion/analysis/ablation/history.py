"""The validation scores of a run during training, from its `metrics.jsonl`."""

import json
from pathlib import Path


def validations(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Returns the steps at which a run was validated, and a metric there; those where it is undefined are left out."""
    path, found = folder / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:  # an incomplete line
            continue
        if values.get("split") == "valid" and values.get(metric) is not None:
            found[values["step"]] = values[metric]
    return sorted(found.items())
