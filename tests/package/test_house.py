"""The packages stand in one order, and nothing imports in circles; annotations and late imports count."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ORDER = re.findall(
    r"\S+",
    """trees routers
specdec.errors specdec.stages specdec.hf specdec.model_options specdec.suites specdec.disk_cache specdec.kernels
specdec.text
specdec.streaming specdec.tree_model specdec.cuda specdec.acceptance specdec.decoding specdec.options
specdec.control specdec.exits specdec.drafters specdec.routing specdec.specs specdec.models specdec.generation specdec
specdec.testing specdec.training specdec.bench specdec.engine specdec.server specdec.audit specdec.batch specdec.cli
bench""",
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("trees", "routers", "specdec", "bench")
    for path in (ROOT / package).rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full & FILES.keys() | ({node.module or ""} if full - FILES.keys() else set())
    return found & FILES.keys()


IMPORTS = {module: imports(path) for module, path in FILES.items()}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def rank(module: str) -> int:
    return ORDER.index(".".join(module.split(".")[: 2 if module.startswith("specdec.") else 1]))


def test_nothing_imports_in_circles():
    TopologicalSorter(IMPORTS).prepare()


def test_packages_import_those_below_them():
    upwards = [(module, other) for module, others in IMPORTS.items() for other in others if rank(other) > rank(module)]
    assert not upwards


def test_few_modules_are_loose():
    assert len(list((ROOT / "specdec").glob("*.py"))) - 1 <= 8  # without __init__.py


def names_imported(path: Path) -> set[str]:
    """Modules that a file imports, as it writes them, and `module.name` for every name it takes from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_test_module_imports_another():
    """What several of them need is in tests/support."""
    taken = {path: names_imported(path) for path in (ROOT / "tests").rglob("*.py")}
    across = [(path, name) for path, names in taken.items() for name in names if re.search(r"\b(test_|conftest)", name)]
    assert taken
    assert not across


def test_every_test_stands_in_the_folder_of_a_package():
    """`generation` is the whole call; `package` is what is shipped and said about it."""
    known = {*(module.split(".")[-1] for module in ORDER), "chat", "generation", "package"}
    folders = {folder for path in TESTS for folder in path.relative_to(ROOT / "tests").parts[:-1]}
    assert all(len(path.relative_to(ROOT / "tests").parts) > 1 for path in TESTS)
    assert folders <= known
