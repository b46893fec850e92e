"""Every README: its links lead somewhere, its commands have the flags that they use, its Python blocks run."""

import concurrent.futures
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmfusion
from mmfusion.analysis import ablate as ablate_module
from mmfusion.analysis.ablate import AblationResult
from mmfusion.analysis.claims.claims import Claims
from mmfusion.analysis.claims.statement import Statement
from mmfusion.analysis.outcome import Outcome
from tests.processes import CONTEXT, ROOT

PAGES = sorted(
    path
    for name in ("README.md", "CONTRIBUTING.md")
    for path in ROOT.rglob(name)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LAUNCHERS = {"train": "experiments.train", "ablate": "experiments.ablate"}  # prefixes of scripts in experiments/launch
PLACEHOLDERS = re.compile(r"configs/(?:X\.py|CONFIG\b(?:\.py)?)|\bmy\.py")
QUICKSTART = "configs/quickstart.py"


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Returns the relative links of a page that lead to no file or heading."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


def command_lines(text: str) -> Iterator[str]:
    """Yields the lines of shell blocks, continued lines joined, and what is in backquotes."""
    for language, block in FENCE.findall(text):
        if language in ("bash", "sh", "shell", ""):
            yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(FENCE.sub("", text))


def commands(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the module and the arguments of each of our commands in a line; optional arguments count as given."""
    line = re.sub(r"\[:[^\]]*\]", "", line)  # optional arguments of a config file
    line = re.sub(r"\\?\|[^\s\]]*", "", line)  # all alternatives but the first
    words = shlex.split(re.sub(r"[\[\]]", " ", line), comments=True)
    for i, word in enumerate(words):
        if "python -m " in word:  # a command in quotes
            yield from commands(word.partition("=")[2] if word.startswith("--") else word)
        arguments = words[i + 1 :]
        ends = [n for n, argument in enumerate(arguments) if argument in ("&&", "||", ";", ">", "&")]
        arguments = [argument for argument in arguments[: min(ends, default=None)] if not argument.endswith("...")]
        if words[i - 2 : i] == ["python", "-m"] and re.match(r"(experiments|tests)(\.|$)", word):
            yield word, arguments
        elif word == "mmfusion" and i == 0 and arguments:
            yield f"experiments.{arguments[0]}", arguments[1:]
        elif match := re.fullmatch(r"(?:\./)?experiments/launch/(train|ablate)_\w+\.sh", word):
            assert (ROOT / word).exists(), f"{word} does not exist"
            yield LAUNCHERS[match[1]], [argument for argument in arguments if argument.startswith("--config")]


def all_wrong_commands(found: dict[str, list[list[str]]]) -> list[str]:
    """Returns the errors of each module's lines, each module with its own flags only; runs in a process of its own."""
    from absl import flags

    sys.path.insert(0, str(ROOT))
    others = set(flags.FLAGS)
    errors = []
    for module, lines in found.items():
        errors += wrong_commands(module, lines)
        for name in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, name)
        for name in [name for name in sys.modules if name.startswith("experiments")]:
            del sys.modules[name]  # the next module may import it for its flags
    return errors


def wrong_commands(module: str, lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns the errors of parsing arguments by the flags that a module defines."""
    from absl import flags

    from experiments import cli
    from mmfusion.errors import UserError

    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    importlib.import_module(name)
    errors = []
    for arguments in lines:
        arguments = [re.sub(r"^(--(?:seeds|jobs|step|tune)=)N$", r"\g<1>1", a) for a in arguments if a != "--dry-run"]
        try:
            source, rest = cli.take_flag(["", *arguments], "config")
            overrides = [a for a in rest if a.startswith("--config.") and not a.startswith("--config.key=")]
            if source is not None or overrides:
                cli.make_config(PLACEHOLDERS.sub(QUICKSTART, source or QUICKSTART), overrides)
            rest = [a for a in rest if not a.startswith("--config.")]
            flags.FLAGS.unparse_flags()
            if len(rest) > 1:  # a name alone is a mention of the command
                flags.FLAGS(rest)
        except (UserError, flags.Error, OSError) as error:
            errors.append(f"{module} {' '.join(arguments)}: {error}")
    return errors


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page: Path):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("# A b, c\n[a](#a-b-c) [b](#b) [c](none.md) [d](README.md) [e](https://example.org/none)\n")
    assert broken_links(page) == ["#b", "none.md"]


@pytest.mark.process
def test_commands_have_the_flags_that_they_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        for line in command_lines(page.read_text()):
            for module, arguments in commands(line) if re.search(r"python -m|^mmfusion |launch/\w+\.sh", line) else ():
                found.setdefault(module, []).append(arguments)
    known = {"experiments.train", "experiments.ablate", "experiments.evaluate", "experiments.predict"}
    assert known <= found.keys() and sum(map(len, found.values())) > 25
    assert {module for module in found if not exists(module)} == set()
    found.pop("experiments", None)
    found["experiments.train"].append(["--config=configs/X.py", "--wrkdir=DIR"])  # must be found
    with concurrent.futures.ProcessPoolExecutor(1, CONTEXT) as pool:
        errors = pool.submit(all_wrong_commands, found).result()
    planted = [error for error in errors if "--wrkdir" in error]
    assert len(planted) == 1 and [error for error in errors if error not in planted] == []


def exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def blocks(page: Path, heading: str) -> list[str]:
    """Returns the Python blocks of a section of a page."""
    section = re.split(r"^## ", page.read_text().partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    return [block for language, block in FENCE.findall(section) if language == "python"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with our configs and an image; classical baselines are left out."""
    from mmfusion.analysis import baselines

    first = {target: models[:1] for target, models in baselines.MODELS.items()}
    monkeypatch.setattr(baselines, "MODELS", first)  # the others take most of the time
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "scene.png")
    return tmp_path


@pytest.mark.process  # scikit-learn asks lscpu for the number of cores
@pytest.mark.usefixtures("traced_once")
def test_examples_run_block_by_block(folder: Path, data_dir: str, capsys: pytest.CaptureFixture):
    run = blocks(ROOT / "experiments" / "README.md", "Examples")
    assert len(run) >= 6
    names: dict = {}
    for block in run:
        block = block.replace("/tmp/mmfusion", str(folder)).replace('"steps": 40', '"steps": 4')
        block = block.replace('_every": 20', '_every": 4').replace("small = {", f'small = {{"data.dir": {data_dir!r}, ')
        exec(compile(block, "experiments/README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and "image attends to text" in printed and "missing.png: No such file" in printed
    assert names["predicted"].labels[2] is None
    ablation = names["ablation"]
    assert {"mean", "image alone", "text alone"} <= {row["method"] for row in ablation.table}
    scores = [row["mean"] for row in ablation.table]
    assert scores == sorted(scores, reverse=True) and ablation.errors == {}
    assert ablation.claims.none  # one seed supports no claim


@pytest.mark.thorough
@pytest.mark.loop
def test_readme_from_python_runs(folder: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch):
    (block,) = blocks(ROOT / "README.md", "From Python")
    assert len(block.splitlines()) <= 13
    small = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "batch_size": 16, "data.train": "train[:128]"}
    small |= {"data.test": "test[:32]", "data.dir": data_dir}
    block = block.replace('{"steps": 1000}', repr(small)).replace("/tmp/mmfusion", str(folder))
    ablations = []  # other tests run one

    def ablate(*args: Any, **options: Any) -> AblationResult:
        ablations.append(inspect.signature(ablate_module.ablate).bind(*args, **options))
        claims = Claims("", "", (Statement("fusion", "better", "Fusion helps."),))
        return AblationResult(folder, Outcome("accuracy", True, (), claims, {}, {}, {}, {}))

    monkeypatch.setattr(mmfusion, "ablate", ablate)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["model"].predict(names["rows"]).probabilities.shape == (1, 2)
    assert [bound.arguments["seeds"] for bound in ablations] == [6]
