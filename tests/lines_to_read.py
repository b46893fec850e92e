"""Counts the lines of the modules behind the train step and the loop, and the packages and layers of the import graph.

`python -m tests.lines_to_read [FOLDER]` prints the counts for a checkout. Imports inside functions are included, and
imports under `TYPE_CHECKING` are not.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("mmfusion", "configs", "experiments")
STEP, LOOP = "mmfusion.training.step", "mmfusion.training.loop"
EXCLUDED = ("mmfusion.data",)  # the input pipeline

Graph = dict[str, set[str]]  # each module or package, and those that it imports


def modules(root: Path) -> dict[str, Path]:
    """Returns the file of every module by dotted name; the file of a package is its `__init__`."""
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
        if node in type_checking:  # not imported at run time
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
    """Returns the imports of each module, without self-imports."""
    return {name: imported(path, files) - {name} for name, path in files.items()}


def modules_to_read(start: str, graph: Graph, files: dict[str, Path]) -> set[str]:
    """Returns a module and those that it imports except `EXCLUDED`, including imports of package `__init__` files."""
    result, pending = {start}, list(graph[start])
    while pending:
        name = pending.pop()
        if name not in result and not name.startswith(EXCLUDED):
            result.add(name)
            if files[name].name == "__init__.py":
                pending += graph[name]
    return result


def count_lines(names: Iterable[str], files: dict[str, Path]) -> int:
    """Returns the number of lines of the modules, with blank lines and docstrings."""
    return sum(len(files[name].read_text().splitlines()) for name in names)


def package_of(module: str, files: dict[str, Path]) -> str:
    """Returns the package of a module at the top two levels.

    Modules beside the packages form one package, `mmfusion.*`; the bare `mmfusion`, its public API, is another.
    """
    first, *rest = module.split(".")
    if not rest:
        return first
    second = f"{first}.{rest[0]}"
    return second if files[second].name == "__init__.py" else f"{first}.*"


def package_graph(graph: Graph, files: dict[str, Path]) -> Graph:
    """Returns the imports between packages; a top-level package whose `__init__` imports nothing is left out."""
    packages: Graph = {}
    for name, others in graph.items():
        if name.count(".") or others:
            packages.setdefault(package_of(name, files), set()).update(package_of(other, files) for other in others)
    return {name: (others & packages.keys()) - {name} for name, others in packages.items()}


def layers(graph: Graph) -> list[list[str]]:
    """Returns the nodes by layer, lowest first: each is one layer above the highest node that it imports.

    Raises:
      ValueError: the imports are cyclic; the message lists the cycle.
    """
    remaining, result = dict(graph), []
    while remaining:
        lowest = sorted(name for name, others in remaining.items() if not others & remaining.keys())
        if not lowest:
            raise ValueError(f"cyclic imports: {' -> '.join(_cycle(remaining))}")
        result.append(lowest)
        remaining = {name: others for name, others in remaining.items() if name not in lowest}
    return result


def _cycle(graph: Graph) -> list[str]:
    path = [min(graph)]
    while path[-1] not in path[:-1]:
        path.append(min(graph[path[-1]] & graph.keys()))
    return path[path.index(path[-1]) :]


def main(root: Path) -> None:
    files = modules(root)
    graph = import_graph(files)
    step, loop = modules_to_read(STEP, graph, files), modules_to_read(LOOP, graph, files)
    for title, names in (("step", step), ("loop", loop), ("both", step | loop)):
        print(f"{title}: {count_lines(names, files)} lines in {len(names)} modules")
    packages = package_graph(graph, files)
    print(f"{len(packages)} packages:")
    for index, names in enumerate(layers(packages)):
        print(f"  layer {index}: {', '.join(names)}")
    print(f"modules in {len(layers(graph))} layers, no cycle")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
