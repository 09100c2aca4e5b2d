"""What the documents promise, as far as it can be checked."""

import ast
import importlib
import re
from urllib.parse import unquote

import pytest

from dgx_music.config import PREFIX, SETTINGS
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from tests.factories import ROOT

PATHS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in PATHS)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PYTHON_FILE = re.compile(r"[\w./-]+/[\w.-]+\.py\b")
NAMES_FILES = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/inference.md"]
FOLDERS = ["", "src/dgx_music", "src/dgx_music/inference", "src/dgx_music/inference/musicgen"]


def text_of(name):
    return (ROOT / name).read_text()


def shown(default):
    if default is None:
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def anchor_of(heading):
    """Return the anchor that a Markdown viewer makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors_of(path):
    return {anchor_of(heading) for heading in HEADING.findall(FENCE.sub("", path.read_text()))}


def test_the_configuration_lists_every_setting_with_its_default():
    document = text_of("docs/configuration.md")
    for name, field in SETTINGS.items():
        row = f"| `{PREFIX}{name.upper()}` | {shown(field.default)} | {field.description}"
        assert row in document


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_has_no_gap(name):
    assert "@@" not in text_of(name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_documents_links_lead_somewhere(name):
    for link in LINK.findall(FENCE.sub("", text_of(name))):
        target, _, anchor = unquote(link).partition("#")
        if "://" in link:
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


@pytest.mark.parametrize("name", NAMES_FILES)
def test_a_document_names_only_python_files_that_exist(name):
    for file in PYTHON_FILE.findall(FENCE.sub("", text_of(name))):
        assert any((ROOT / folder / file).exists() for folder in FOLDERS), file


def imports_of(code):
    """Return the module and the name of each import from the package."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dgx_music"):
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("name", ["README.md", "docs/library.md"])
def test_the_examples_import_what_exists(name):
    imported = [each for code in EXAMPLE.findall(text_of(name)) for each in imports_of(code)]

    assert imported
    assert [
        (module, each)
        for module, each in imported
        if not hasattr(importlib.import_module(module), each)
    ] == []


def test_the_readme_fits_into_180_lines():
    assert len(text_of("README.md").splitlines()) <= 180


def test_every_document_can_be_reached_from_the_readme():
    linked = {name.partition("#")[0] for name in LINK.findall(text_of("README.md"))}

    assert set(DOCUMENTS) - linked == {"README.md"}


def test_the_recipe_for_a_column_names_the_next_migration():
    assert f"--rev-id {int(SCHEMA_REVISION) + 1:04}" in text_of("CONTRIBUTING.md")
