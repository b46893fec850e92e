"""The tables of `configs/README.md`."""

import pytest

from mmfusion.config import keys, reference
from mmfusion.config.fields import RunConfig
from mmfusion.errors import UserError


def test_readme_tables_are_up_to_date(pytestconfig):
    page = (pytestconfig.rootpath / "configs" / "README.md").read_text(encoding="utf-8")
    assert reference.update(page) == page, "run python -m mmfusion.config.reference"


def test_reference_has_a_row_for_every_key():
    table = reference.key_table()
    for path, field in keys.declared_keys(RunConfig):
        key = keys.key_of(field)
        shown_path = path.replace("modalities.*", "modalities.<modality>").replace("encoders.*", "encoders.<modality>")
        row = next(line for line in table.splitlines() if f"| `{shown_path.replace('*', '<task>')}` |" in line)
        assert key and f"`{field.default!r}`" in row and key.allowed() in row
        assert key.doc.replace("|", r"\|") in row and ("(†)" in row) == bool(key.resume)


def test_reference_rewrites_only_the_text_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n")
    reference.main(["reference", str(page)])
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("\nafter\n")
        and "| `seed` | `0` |" in text
        and "\nold\n" not in text
    )
    with pytest.raises(UserError, match="has no lines"):
        reference.update("nothing")
