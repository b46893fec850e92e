"""Writes the tables of config keys into `configs/README.md`: `python -m mmfusion.config.reference [FILE]`."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from mmfusion.config.choices import choice_options
from mmfusion.config.fields import RunConfig
from mmfusion.config.keys import key_of, section_of
from mmfusion.config.serialization import flat
from mmfusion.data.modalities import MODALITY_TYPES
from mmfusion.data.targets import TARGET_OPTIONS
from mmfusion.errors import UserError
from mmfusion.objectives import OBJECTIVES
from mmfusion.optim import OPTIMIZERS, SCHEDULES

BEGIN, END = "<!-- keys: python -m mmfusion.config.reference -->", "<!-- end of keys -->"
BAR = r"\|"  # a bar within a cell


def key_table(cls: type = RunConfig) -> str:
    """Returns a Markdown table of every declared key: default, unit, allowed values and meaning."""
    return "\n".join(["| key | default | unit | allowed | meaning |", "|---|---|---|---|---|", *_key_rows(cls, "")])


def options_table() -> str:
    """Returns a Markdown table of the options of modality types, targets, optimizers, schedules and objectives."""
    sections = (
        ("data.modalities.<modality>", MODALITY_TYPES), ("data.targets.<task>", TARGET_OPTIONS),
        ("optim", OPTIMIZERS), ("optim.schedule", SCHEDULES), ("objectives", OBJECTIVES),
    )  # fmt: skip
    rows = ["| section | choice | options |", "|---|---|---|"]
    for path, names in sections:
        for name in names:
            defaults = flat(choice_options(path, name)) if choice_options(path, name) else {}
            options = ", ".join(f"`{key}={default!r}`" for key, default in defaults.items())
            rows.append(f"| `{path}` | `{name}` | {options} |")
    return "\n".join(rows)


def update(text: str) -> str:
    """Returns a page's text with the tables between the markers brought up to date.

    Raises:
      UserError: the page has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{key_table()}\n\n{options_table()}\n\n{END}{after}"


def _key_rows(cls: type, path: str) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        where = f"{path}{field.name}"
        if key := key_of(field):
            meaning = f"{key.doc} (†)" if key.resume else key.doc
            cells = (f"`{where}`", f"`{field.default!r}`", key.unit, key.allowed(), meaning)
            yield f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"
        elif inner := section_of(field):
            yield from _key_rows(inner, f"{where}.")
        elif field.metadata.get("options"):
            yield f"| `{path}…` | | | | {field.metadata['doc']} |"
        else:
            entry = f"{where}.<{field.metadata['of']}>."
            if inner := field.metadata["entries"]:
                yield from _key_rows(inner, entry)
            else:
                yield f"| `{entry}…` | | | | {field.metadata['doc']} |"


def main(argv: list[str]) -> None:
    """Rewrites the tables of the file that is named, or of `configs/README.md` in the current directory."""
    page = Path(argv[1] if len(argv) > 1 else "configs/README.md")
    page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv)
