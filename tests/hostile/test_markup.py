"""Names with rich's markup, which are shown as they are."""

import io
import re

import pytest
from rich.console import Console

from experiments import cli, progress_table
from mmfusion.analysis.ablation.budget import Match
from mmfusion.analysis.table_summary import columns_table
from mmfusion.config import defaults
from mmfusion.config.from_table import propose
from mmfusion.tracking.logger import Logger
from mmfusion.tracking.tables import model_table, results_table

NAMES = ("[red]x[/red]", "[/]", "[bold", ":smile:", "[link=https://example.org]x[/link]", "\\[a]")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_show_table_prints_names_as_they_are(name, tmp_path, capsys):
    cli.show_table((name, "b"), [(name, "1")], f"caption {name}", tmp_path / "table.md")
    assert capsys.readouterr().out.count(name) == 3 and (tmp_path / "table.md").read_text().count(name) == 3


def test_matched_prints_names_as_they_are(name, capsys):
    fields = dict.fromkeys(Match.__dataclass_fields__, 1)
    progress_table.matched({name: Match(**fields)}, name, 1)
    assert capsys.readouterr().out.count(name) == 3


@pytest.mark.parametrize("terminal", [False, True])
def test_logger_prints_names_as_they_are(name, terminal, tmp_path):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=200, legacy_windows=False)
    with Logger(tmp_path, total_steps=3, console=console) as log:
        log.print(f"data   {name}")
        log.print(model_table([(name, name, 1, None)]))
        log.print(results_table({name: {name: 1.0}}))
        log.log(1, {"loss": 1.0, f"{name}/loss": 2.0}, "valid")
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert plain.count(name) >= 5


def test_inspect_prints_names_as_they_are(name, tmp_path, capsys):
    folder = tmp_path / name.replace("/", "_")
    folder.mkdir()
    path = folder / "a.csv"
    path.write_text(f"{name},label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    config, _ = defaults.begin("", "concat")
    Console(markup=False, emoji=False, width=300).print(columns_table(propose(config, str(path), "", (), "")))
    out = capsys.readouterr().out.replace("\n", "")
    assert name in out and folder.name in out
