"""Counts the lines to read for the train step and the loop, and the rooms and floors of the import graph.

`python -m tests.lines_to_read [FOLDER]` prints them for a checkout. All imports count, those
inside functions too, but not those for type checkers alone.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("mmfusion", "configs", "experiments")
STEP, LOOP = "mmfusion.training.step", "mmfusion.training.loop"
APART = ("mmfusion.data",)  # how examples become batches is another subject

Graph = dict[str, set[str]]  # a module or room, and those that it imports


def modules(root: Path) -> dict[str, Path]:
    """Returns the file of every module of the packages, by its dotted name; a package's is its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, files: dict[str, Path]) -> set[str]:
    """Returns the modules among `files` that a file imports."""
    names = set()
    tree = ast.parse(path.read_text())
    type_checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in type_checking:  # no import when the code runs
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= submodules & files.keys()
            if submodules - files.keys():
                names.add(node.module)
    return names & files.keys()


def import_graph(files: dict[str, Path]) -> Graph:
    """Returns the imports of each module, without itself."""
    return {name: imported(path, files) - {name} for name, path in files.items()}


def to_read(start: str, graph: Graph, files: dict[str, Path]) -> set[str]:
    """Returns a module and those that it imports, `APART` left out; for a package also what its `__init__` imports."""
    result, pending = {start}, list(graph[start])
    while pending:
        name = pending.pop()
        if name not in result and not name.startswith(APART):
            result.add(name)
            if files[name].name == "__init__.py":
                pending += graph[name]
    return result


def count_lines(names: Iterable[str], files: dict[str, Path]) -> int:
    """Returns how many lines the modules have, blank lines and docstrings included."""
    return sum(len(files[name].read_text().splitlines()) for name in names)


def room(module: str, files: dict[str, Path]) -> str:
    """Returns the package of a module at the top two levels.

    Modules beside the packages share one room, as `mmfusion.*`; the bare `mmfusion`, its public API, has another.
    """
    first, *rest = module.split(".")
    if not rest:
        return first
    second = f"{first}.{rest[0]}"
    return second if files[second].name == "__init__.py" else f"{first}.*"


def room_graph(graph: Graph, files: dict[str, Path]) -> Graph:
    """Returns which rooms import which; a package whose `__init__` imports nothing is no room of its own."""
    rooms: Graph = {}
    for name, others in graph.items():
        if name.count(".") or others:
            rooms.setdefault(room(name, files), set()).update(room(other, files) for other in others)
    return {name: (others & rooms.keys()) - {name} for name, others in rooms.items()}


def floors(graph: Graph) -> list[list[str]]:
    """Returns the nodes by floor, lowest first: each stands one above the highest that it imports.

    Raises:
      ValueError: imports run in a circle; the message names its members.
    """
    remaining, result = dict(graph), []
    while remaining:
        lowest = sorted(name for name, others in remaining.items() if not others & remaining.keys())
        if not lowest:
            raise ValueError(f"imports run in a circle: {' -> '.join(_circle(remaining))}")
        result.append(lowest)
        remaining = {name: others for name, others in remaining.items() if name not in lowest}
    return result


def _circle(graph: Graph) -> list[str]:
    path = [min(graph)]
    while path[-1] not in path[:-1]:
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :]


def main(root: Path) -> None:
    files = modules(root)
    graph = import_graph(files)
    step, loop = to_read(STEP, graph, files), to_read(LOOP, graph, files)
    for title, names in (("step", step), ("loop", loop), ("both", step | loop)):
        print(f"{title}: {count_lines(names, files)} lines in {len(names)} modules")
    rooms = room_graph(graph, files)
    print(f"{len(rooms)} rooms:")
    for number, names in enumerate(floors(rooms)):
        print(f"  floor {number}: {', '.join(names)}")
    print(f"modules on {len(floors(graph))} floors, no circle")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
