"""What the documents promise, where it can be checked."""

from dgx_music.config import PREFIX, SETTINGS
from tests.factories import ROOT


def shown(default):
    if default is None:
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_readme_lists_every_setting_with_its_default():
    readme = (ROOT / "README.md").read_text()
    for name, field in SETTINGS.items():
        assert f"| `{PREFIX}{name.upper()}` | {shown(field.default)} | {field.description}" in readme


def test_no_document_has_a_gap():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert "@@" not in path.read_text(), path


def test_the_documents_name_only_files_that_exist():
    for document in ("README.md", "docs/architecture.md"):
        words = (
            (ROOT / document)
            .read_text()
            .replace("`", " ")
            .replace("(", " ")
            .replace(")", " ")
            .replace(",", " ")
            .split()
        )
        for word in words:
            if word.endswith(".py") and "/" in word:
                assert any((ROOT / folder / word).exists() for folder in ("", "src/dgx_music")), word
