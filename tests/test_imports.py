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
    "sqlalchemy",
    "pydantic",
    "transformers",
    "alembic",
    "scipy",
    "pyloudnorm",
    "numpy",
    "soundfile",
    "soxr",
    "fastapi",
    "starlette",
    "uvicorn",
    "typer",
    "rich",
    "obstore",
]
ROOMS = {
    "ground": set(),
    "audio.containers": {"ground"},
    "audio": {"audio.containers", "ground"},
    "clips": {"audio"},
    "artifacts": {"ground"},
    "storage.connection": {"ground"},
    "storage": {"storage.connection", "ground"},
    "inference": {"audio", "ground"},
    "inference.musicgen": {"inference", "audio", "ground"},
    "client": {"storage", "storage.connection", "artifacts", "audio", "inference", "ground"},
    "worker": {"storage", "storage.connection", "artifacts", "audio", "inference", "ground"},
    "web": {"client", "storage", "artifacts", "ground"},
    "cli": {
        *("web", "worker", "client", "storage", "storage.connection", "artifacts", "audio"),
        *("inference", "inference.musicgen", "ground"),
    },
}
"""Each room, and the rooms that it may import from. The modules at the root of the package are the ground,
except ``clips``, which only leads to where it is now."""
CORNERS = {"web.compat"}
"""Folders that are a part of the room around them."""


def name_of(path):
    return (
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        .removesuffix("__init__")
        .removesuffix(".")
    )


def imports_of(tree):
    """Return the dotted names of all that is imported, at any depth, but for what only the type checker sees."""
    only_for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
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


IMPORTS = {
    name_of(path): {*imports_of(ast.parse(path.read_text()))} for path in SOURCE.rglob("*.py")
}
OURS = {
    name: {ours for each in imports if (ours := each.removeprefix("dgx_music.")) in IMPORTS}
    - {name, ""}
    for name, imports in IMPORTS.items()
}


def room_of(name):
    """Return the room of a module: the longest name in the table that it is in."""
    return max((room for room in ROOMS if is_in(name, room)), key=len, default="ground")


def is_in(name, package):
    return name == package or name.startswith(f"{package}.")


def test_importing_the_library_imports_nothing_heavy():
    program = f"import sys, dgx_music; print([name for name in {HEAVY} if name in sys.modules])"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_module_is_there_as_an_attribute_before_anybody_has_imported_it():
    program = "import dgx_music; print(dgx_music.errors.DgxMusicError.__name__)"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "DgxMusicError\n"


def test_a_local_output_does_without_the_object_stores_client():
    program = "import sys; from dgx_music.artifacts import open_output; open_output('x'); print('obstore' in sys.modules)"

    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_the_rooms_are_the_folders():
    folders = {name_of(path.parent / "__init__.py") for path in SOURCE.rglob("*.py")} - {""}

    assert folders - CORNERS == ROOMS.keys() - {"ground", "clips"}


def test_only_routes_know_what_others_clients_need():
    others = {name for name in IMPORTS if is_in(name, "web.compat")}
    importers = {name for name, found in OURS.items() if found & others} - others

    assert importers == {"web.app", "web.overview"}


# the package itself gathers the public names
@pytest.mark.parametrize("name", sorted({*IMPORTS} - {""}))
def test_a_module_imports_from_the_rooms_it_may(name):
    elsewhere = {other: room_of(other) for other in OURS[name] if room_of(other) != room_of(name)}

    assert {other for other, room in elsewhere.items() if room not in ROOMS[room_of(name)]} == set()


def test_no_rooms_import_each_other_in_a_circle():
    assert {*TopologicalSorter(ROOMS).static_order()} == ROOMS.keys()


def test_no_imports_go_in_a_circle():
    modules = {
        name: {other for other in others if not is_package(other)} for name, others in OURS.items()
    }

    assert len([*TopologicalSorter(modules).static_order()]) >= len(IMPORTS) - 1


def is_package(name):
    """A package's own file only gathers names from its modules; they may import each other past it."""
    return (SOURCE.joinpath(*name.split(".")) / "__init__.py").exists()


@pytest.mark.parametrize("heavy", ["torch", "transformers", "safetensors"])
def test_only_musicgen_imports_the_models_framework(heavy):
    importers = {
        name for name, imports in IMPORTS.items() if any(is_in(each, heavy) for each in imports)
    }

    assert {name for name in importers if not is_in(name, "inference.musicgen")} == set()


def test_only_storage_knows_sql():
    importers = {
        name
        for name, imports in IMPORTS.items()
        if any(is_in(each, "sqlalchemy") for each in imports)
    }

    assert {name for name in importers if not is_in(name, "storage")} == set()


def test_alembic_is_imported_by_the_migrations_alone():
    importers = {
        name for name, imports in IMPORTS.items() if any(is_in(each, "alembic") for each in imports)
    }

    assert importers == {"storage.migrations"}
