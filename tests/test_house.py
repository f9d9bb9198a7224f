"""The house's shape: imports go down, in few levels and no circle; each room knows only what is below it; no file is long.

The import graph is ``grimp``'s: imports within functions count, those for type annotations alone do not.
"""

from __future__ import annotations

import ast
from pathlib import Path

import grimp
import networkx
import pytest

PACKAGE = "fused_resnet"
ROOT = Path(__file__).parent.parent
APPLICATIONS = ("__main__", "benchmark", "cli", "study", "testing", "training")
# From the top; those of one line know nothing of each other.
LAYERS = (
    {"cli"},
    {"benchmark", "study", "training"},
    {"testing", "_machine"},
    {"models", "cases"},
    {"nn", "fusion"},
    {"runtime"},
    {"graph", "ops"},
    {"_settings", "zero_pad", "reference"},
    {"_compat", "_extension"},
)
LEVELS, LEVELS_OF_APPLICATIONS = 9, 13  # how many files stand on one another; the latter: 12 but for imports within functions
LINES, LINES_OF_TESTS = 400, 500


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, cache_dir=None, exclude_type_checking_imports=True)


def files(graph: grimp.ImportGraph) -> networkx.DiGraph:
    """Which file imports which, a package's own ``__init__.py`` left out."""
    packages = {module for module in graph.modules if graph.find_children(module)}
    found = networkx.DiGraph()
    found.add_nodes_from(graph.modules - packages)
    for module in graph.modules - packages:
        found.add_edges_from((module, other) for other in graph.find_modules_directly_imported_by(module) - packages)
    return found


@pytest.mark.smoke
def test_rooms_know_what_is_below_them(imports: grimp.ImportGraph) -> None:
    layers = [grimp.Layer(*[f"{PACKAGE}.{name}" for name in sorted(layer)], independent=True) for layer in LAYERS]
    illegal = imports.find_illegal_dependencies_for_layers(layers=layers)
    assert not illegal, [f"{found.importer} -> {found.imported}" for found in illegal]


@pytest.mark.smoke
def test_levels(imports: grimp.ImportGraph) -> None:
    everything = files(imports)
    assert len(everything) > 80
    library = everything.subgraph([m for m in everything if m.split(".")[1] not in APPLICATIONS])
    for graph, most in ((everything, LEVELS_OF_APPLICATIONS), (library, LEVELS)):
        circles = list(networkx.simple_cycles(graph))
        assert not circles
        chain = networkx.dag_longest_path(graph)
        print(f"{len(chain)} levels: {' > '.join(chain)}")
        assert len(chain) <= most, " > ".join(chain)


@pytest.mark.smoke
def test_no_file_is_long() -> None:
    suffixes = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")
    for folders, most in (((PACKAGE, "csrc"), LINES), (("tests",), LINES_OF_TESTS)):
        sources = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
        assert len(sources) > 80
        lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
        assert not {name: lines for name, lines in lengths.items() if lines > most}


@pytest.mark.smoke
def test_no_test_reaches_into_another() -> None:
    """What several share is in a file whose name begins with an underscore."""
    files = [*(ROOT / "tests").rglob("*.py")]
    names = {file.stem for file in files if file.stem.startswith("test_")}
    assert len(names) > 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not names.intersection(str(name).rpartition(".")[2] for name in imported), f"{file.name} imports {imported}"
