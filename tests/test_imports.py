"""What importing costs, and which way imports point."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dgx_music

SOURCE = Path(dgx_music.__file__).parent
HEAVY = [
    "torch",
    "transformers",
    "alembic",
    "scipy",
    "pyloudnorm",
    "numpy",
    "soundfile",
    "soxr",
    "fastapi",
    "typer",
    "rich",
    "obstore",
]
LAYERS = [
    [
        *(
            "early",
            "text",
            "logs",
            "errors",
            "groups",
            "catalog",
            "validation",
            "config",
            "modes",
            "durability",
            "forecast",
        ),
        *("storage.schema", "storage.words", "storage.snapshots"),
    ],
    ["storage.models", "storage.changes", "inference.engine"],
    ["storage", "inference", "audio", "clips", "containers", "artifacts"],
    ["enqueue", "estimates", "fleet", "completions", "leases", "prune", "worker"],
    ["daemon", "cli", "web"],
]
"""Lowest first: a module imports from its own layer and those below. A package stands for all in it that is not named."""


def name_of(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports_of(tree):
    """Return the dotted names of all that is imported, at any depth, but for what only the type checker sees."""
    only_for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


IMPORTS = {name_of(path): {*imports_of(ast.parse(path.read_text()))} for path in SOURCE.rglob("*.py")}
OURS = {
    name: {ours for each in imports if (ours := each.removeprefix("dgx_music.")) in IMPORTS} - {name, ""}
    for name, imports in IMPORTS.items()
}


def layer_of(name):
    """Return the number of the module's layer; the most exact name in the table counts."""
    numbers = {each: number for number, layer in enumerate(LAYERS) for each in layer}
    while name and name not in numbers:
        name = name.rpartition(".")[0]
    return numbers.get(name)


def is_in(name, package):
    return name == package or name.startswith(f"{package}.")


def test_importing_the_library_imports_nothing_heavy():
    program = f"import sys, dgx_music; print([name for name in {HEAVY} if name in sys.modules])"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_local_output_does_without_the_object_stores_client():
    program = (
        "import sys; from dgx_music.artifacts import open_output; open_output('x'); print('obstore' in sys.modules)"
    )

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_every_module_has_a_layer(name):
    assert name == "" or layer_of(name) is not None


@pytest.mark.parametrize("name", sorted({*IMPORTS} - {""}))
def test_imports_point_one_way(name):
    upwards = {other for other in OURS[name] if layer_of(other) > layer_of(name)}

    assert upwards == set()


def test_no_imports_go_in_a_circle():
    modules = {name: {other for other in others if not is_package(other)} for name, others in OURS.items()}

    assert len([*TopologicalSorter(modules).static_order()]) >= len(IMPORTS) - 1


def is_package(name):
    """A package's own file only gathers names from its modules; they may import each other past it."""
    return (SOURCE.joinpath(*name.split(".")) / "__init__.py").exists()


def test_storage_and_inference_never_import_each_other():
    for one, other in [("storage", "inference"), ("inference", "storage")]:
        joined = {name: {each for each in OURS[name] if is_in(each, other)} for name in OURS if is_in(name, one)}
        assert {name for name, others in joined.items() if others} == set()


@pytest.mark.parametrize("heavy", ["torch", "transformers", "safetensors"])
def test_only_inference_imports_the_models_framework(heavy):
    importers = {name for name, imports in IMPORTS.items() if any(is_in(each, heavy) for each in imports)}

    assert {name for name in importers if not is_in(name, "inference")} == set()


def test_only_storage_and_enqueue_know_sql():
    importers = {name for name, imports in IMPORTS.items() if any(is_in(each, "sqlalchemy") for each in imports)}

    assert {name for name in importers if not is_in(name, "storage")} <= {"enqueue"}


def test_alembic_is_imported_by_the_migrations_alone():
    importers = {name for name, imports in IMPORTS.items() if any(is_in(each, "alembic") for each in imports)}

    assert importers == {"storage.migrations"}
