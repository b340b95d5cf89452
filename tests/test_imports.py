"""Imports go one way (the layout in the README): read from the sources, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_distill

PACKAGE = Path(lit_distill.__file__).parent
# What a package may import of lit_distill beside itself.
ALLOWED = {
    "diffusion": set(),
    "losses": {"diffusion"},
    "models": {"diffusion"},
    "methods": {"diffusion", "losses", "models"},
}
# Single files, below all packages: they import nothing of lit_distill.
PRIVATE = {path.stem for path in PACKAGE.glob("_[a-z]*.py")}
# These serve every method, so that they know none.
NO_CONCRETE_METHOD = ("datamodules", "metrics", "callbacks")
BASES = {"DistillationModule", "AlternatingDistillationModule"}


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from lit_distill; the name is "" for ``import module``."""
    here = ["lit_distill", *file.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(here[: -node.level]) + "." if node.level else ""
            module = (start + (node.module or "")).rstrip(".")
            yield from ((module, alias.name) for alias in node.names)


def reached(package: str) -> Iterator[tuple[Path, str, str]]:
    """(file, package of lit_distill, name) of each import in one package."""
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files, package
    for file in files:
        for module, name in imports(file):
            root, *parts = module.split(".")
            if root == "lit_distill":
                yield file, (parts or [name])[0], ".".join([*parts[1:], name])


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file, other, _ in reached(package)
        if other not in ALLOWED[package] | {package} | PRIVATE
    ]
    assert not wrong


def test_private_modules_stand_below_all_packages() -> None:
    assert PRIVATE
    found = {name: [module for module, _ in imports(PACKAGE / f"{name}.py")] for name in PRIVATE}
    assert not any(module.split(".")[0] == "lit_distill" for of in found.values() for module in of)


@pytest.mark.parametrize("package", NO_CONCRETE_METHOD)
def test_no_concrete_method_is_imported(package: str) -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name} of methods"
        for file, other, name in reached(package)
        if other == "methods" and not name.startswith("base.") and name not in BASES
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lit_distill.methods.dmd import DMD", ("lit_distill.methods.dmd", "DMD")),
        ("import lit_distill.methods.dmd", ("lit_distill.methods.dmd", "")),
        ("def f():\n    from ..methods import DMD", ("lit_distill.methods", "DMD")),
    ],
)
def test_the_reader_sees_every_form_of_import(
    source: str, found: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "callbacks" / "spy.py"
    file.parent.mkdir()
    file.write_text(source)
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path, raising=True)
    assert list(imports(file)) == [found]
