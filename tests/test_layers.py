"""The layering of the library: a module imports only what stands below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastmim"
# Folders and files of the package, and which others each may import; itself always.
MAY_IMPORT = {
    "ops": {"kernels"},  # kernels by name only, see test_only_the_registry_finds_kernels
    "nn": {"ops"},
    "methods": {"ops", "nn"},
    "models": {"nn"},
    "compat": {"ops", "nn", "models"},
    "data": set(),
    # One level: the trainer evaluates while it runs, so eval does not know the trainer.
    # Of interop it takes published teachers.
    "train": {"ops", "nn", "methods", "models", "data", "eval", "interop"},
    # It reads and writes the trainer's checkpoints, and makes runs that it goes on with.
    "interop": {"ops", "nn", "models", "data", "train"},
    "eval": {"ops", "nn", "methods", "models", "data"},
    "info": {"ops"},
}
# cli, __init__ and __main__ stand above everything.
TOP = {"cli", "__init__", "__main__"}


def layer(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def absolute(file: Path, node: ast.ImportFrom) -> str:
    """Module named by an import, a relative one resolved."""
    if not node.level:
        return node.module
    package = ("fastmim", *file.relative_to(PACKAGE).parts[:-1])
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def imported(file: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{absolute(file, node)}.{alias.name}" for alias in node.names}
    return names


def imported_layers(file: Path) -> set[str]:
    known = {layer(f) for f in modules()} | {"kernels"}
    names = {n.split(".")[1] for n in imported(file) if n.startswith("fastmim.")}
    return names & known


def test_every_folder_has_its_place():
    unplaced = {layer(file) for file in modules()} - MAY_IMPORT.keys() - TOP
    assert not unplaced, f"say in MAY_IMPORT what these may import: {sorted(unplaced)}"


def test_imports_point_downwards():
    wrong = [
        f"{file.relative_to(ROOT)} imports fastmim.{below}"
        for file in modules()
        if layer(file) not in TOP
        for below in sorted(imported_layers(file) - {layer(file)} - MAY_IMPORT[layer(file)])
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_below_imports_the_package_itself():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in modules()
        if layer(file) in {"ops", "nn", "methods", "models", "data"}
        for name in sorted(imported(file))
        if name == "fastmim" or (name.startswith("fastmim.") and name.split(".")[1] not in
                                 MAY_IMPORT.keys() | {"kernels", "_C"})
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_cycles_between_modules():
    names = {module_name(file): file for file in modules()}
    packages = {n for n, f in names.items() if f.name == "__init__.py"}
    # A package's __init__ gathers its modules, so naming the package counts as its modules only.
    edges = {
        name: {
            target
            for full in imported(file)
            for target in (full, full.rpartition(".")[0])
            if target in names and target not in packages and target != name
        }
        for name, file in names.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join([*path, name])
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_kernels_import_torch_triton_and_each_other():
    allowed = {"torch", "triton", "math", "typing"}
    for file in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file


def code(file: Path) -> str:
    """Source without docstrings and comments."""
    return ast.unparse(_without_docstrings(ast.parse(file.read_text())))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and len(body) > 1
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return tree


@pytest.mark.parametrize("folder", ["ops", "nn", "methods", "compat"])
def test_only_the_registry_asks_for_the_device(folder):
    question = re.compile(r"is_available\(|\.is_cuda\b|device\.type\b|find_spec|TRITON_INTERPRET")
    wrong = [
        str(file.relative_to(ROOT))
        for file in (PACKAGE / folder).rglob("*.py")
        if file.name != "_registry.py" and question.search(code(file))
    ]
    assert not wrong


def test_only_the_registry_finds_kernels():
    for file in modules():
        names = {name.split(".")[0] for name in imported(file)}
        assert "triton" not in names, file
        assert not any(name.startswith("fastmim.kernels") for name in imported(file)), file


@pytest.mark.parametrize("folder", ["nn", "methods", "compat", "models.py"])
def test_models_call_operators_by_their_public_names(folder):
    place = PACKAGE / folder
    for file in [place] if place.is_file() else place.rglob("*.py"):
        assert "torch.ops." not in code(file), file
        private = {n for n in imported(file) if n.startswith("fastmim.ops._")}
        assert not private, file
