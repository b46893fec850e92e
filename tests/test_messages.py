"""The text of every error message, compared with a golden file.

After a change of messages, `MMFUSION_WRITE_GOLDEN=1 python -m pytest tests/test_messages.py` rewrites it.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.unit
GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
ERRORS = ("UserError", "Preempted", "Unreachable", "SystemExit")


def messages(source: str) -> Iterator[str]:
    """Yields the messages of a module in line order, with placeholders in braces."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node.func) in ERRORS]
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        enclosing = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        yield message_of(call, max(enclosing, key=lambda f: f.lineno, default=tree))


def message_of(call: ast.Call, scope: ast.AST) -> str:
    """Returns the text of one error, as formatted by `UserError`."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    message = template(call.args[0], call, scope) if call.args else ""
    location = template(keywords["path"], call, scope) if "path" in keywords else ""
    if "value" in keywords:
        location += f"={{{ast.unparse(keywords['value'])}}}"
    nearest = f"; {{nearest of {ast.unparse(keywords['choices'])}}}" if "choices" in keywords else ""
    return f"{location}: {message}{nearest}" if location else f"{message}{nearest}"


def template(node: ast.expr, call: ast.Call, scope: ast.AST) -> str:
    """Returns an expression as text with placeholders in braces; a name is replaced by its last assigned text."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.FormattedValue) else part for part in node.values)
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part)}}}" for part in parts
        )
    if isinstance(node, ast.IfExp):
        return f"{template(node.body, call, scope)} | {template(node.orelse, call, scope)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, call, scope) + template(node.right, call, scope)
    if isinstance(node, ast.Name):
        assigned = [
            statement
            for statement in ast.walk(scope)
            if isinstance(statement, ast.Assign) and statement.lineno < call.lineno
            and any(isinstance(target, ast.Name) and target.id == node.id for target in statement.targets)
        ]  # fmt: skip
        if assigned:
            last = max(assigned, key=lambda statement: statement.lineno)
            if isinstance(last.value, (ast.Constant, ast.JoinedStr, ast.IfExp)):
                return template(last.value, last, scope)  # pyright: ignore
    return f"{{{ast.unparse(node)}}}"


def name_of(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def all_messages() -> dict[str, list[str]]:
    """Returns the messages by path of the module, for modules with messages."""
    files = sorted(file for folder in ("mmfusion", "experiments") for file in (ROOT / folder).rglob("*.py"))
    found = {file.relative_to(ROOT).as_posix(): list(messages(file.read_text(encoding="utf-8"))) for file in files}
    return {path: lines for path, lines in found.items() if lines}


def test_messages_match_the_golden_file():
    text = "\n".join(f"{path}\n" + "".join(f"  {line}\n" for line in lines) for path, lines in all_messages().items())
    if os.environ.get("MMFUSION_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"see {__name__}: MMFUSION_WRITE_GOLDEN=1 rewrites it"


def test_messages_are_one_line_each():
    invalid = [line for lines in all_messages().values() for line in lines if "\n" in line or line.rstrip() != line]
    assert invalid == []


def test_messages_show_placeholders_paths_and_assigned_texts():
    source = """
def f(name):
    message = f"must be above {least}"
    if name:
        raise UserError(message, path=f"config.{name}", value=name)
    raise errors.UserError("unknown name" if name else "no name", path="--fusions", choices=FUSIONS)
raise SystemExit("it ends")
"""
    assert list(messages(source)) == [
        "config.{name}={name}: must be above {least}",
        "--fusions: unknown name | no name; {nearest of FUSIONS}",
        "it ends",
    ]
