"""The public names: what ``docs/api.md`` says of each, and how the package gives them."""

import ast
import enum
import importlib.util
import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import dgx_music
from dgx_music import enqueue, enqueue_many, enqueue_sync, storage
from dgx_music.client.requests import DEFAULTS, OPTIONS
from tests.factories import ROOT

OBJECTS = {
    name: getattr(module, name) for module in (storage, dgx_music) for name in module.__all__
}
WIDTH = 100


def sections():
    """Return the code and the prose of each section of the page, by the name in its heading."""
    page = (ROOT / "docs" / "api.md").read_text()
    found = re.findall(
        r"^### `(\w+)`\n\n```python\n(.*?)\n```\n\n(.+?)\n(?=\n#|\Z)",
        page,
        re.DOTALL | re.MULTILINE,
    )
    assert len(found) == page.count("\n### "), "a section has another form"
    return {name: (code, prose) for name, code, prose in found}


def declaration(name, value):
    """Return what the page must show of a public name: the signature, or the fields of a class."""
    if not inspect.isclass(value):
        return declared_function(name, value)
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    if isinstance(value, enum.EnumMeta):
        return lines(
            f"class {name}({bases}):", [f'{member.name} = "{member.value}"' for member in value]
        )
    if value.__bases__ == (dict,):
        fields = value.__annotations__.items() if value is not dgx_music.RequestOptions else ()
        return lines(
            f"class {name}(TypedDict, total=False):",
            [f"{key}: {shown_type(hint)}" for key, hint in fields],
        )
    if is_dataclass(value):
        return lines(
            f"class {name}:", [shown(each) for each in inspect.signature(value).parameters.values()]
        )
    if issubclass(value, storage.Base) and value is not storage.Base:
        return lines(f"class {name}({bases}):", columns_of(value))
    if getattr(value, "_is_protocol", False):
        methods = [(key, each) for key, each in vars(value).items() if not key.startswith("_")]
        return lines(
            f"class {name}({bases}):",
            [declared_function(key, each, indent=4) for key, each in methods],
        )
    if issubclass(value, Exception) or value is storage.Base:
        return f"class {name}({bases})"
    return call(f"class {name}", inspect.signature(value))


def lines(first, more):
    return "\n".join(
        [first if more else first.removesuffix(":"), *(f"    {line}" for line in more)]
    )


def columns_of(model):
    hints = {key: str(hint) for key, hint in vars(model)["__annotations__"].items()}
    return [
        f"{key}: {hint[len('Mapped[') : -1]}"
        for key, hint in hints.items()
        if hint.startswith("Mapped[")
    ]


def declared_function(name, value, indent=0):
    is_async = inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value)
    signature = inspect.signature(value)
    if value in (enqueue, enqueue_many, enqueue_sync):  # their options have a list of their own
        kept = [each for each in signature.parameters.values() if each.name not in OPTIONS]
        options = inspect.Parameter(
            "options", inspect.Parameter.VAR_KEYWORD, annotation="Unpack[RequestOptions]"
        )
        signature = signature.replace(parameters=[*kept, options])
    return call(f"{'async ' if is_async else ''}def {name}", signature, indent)


def call(start, signature, indent=0):
    parameters = [shown(each) for each in signature.parameters.values()]
    star = next(
        (
            n
            for n, each in enumerate(signature.parameters.values())
            if each.kind is each.KEYWORD_ONLY
        ),
        None,
    )
    if star is not None:
        parameters.insert(star, "*")
    result = signature.return_annotation
    end = (
        ""
        if result is signature.empty or start.startswith("class")
        else f" -> {shown_type(result)}"
    )
    line = f"{start}({', '.join(parameters)}){end}"
    if len(line) + indent <= WIDTH:
        return line
    middle = "".join(f"{' ' * indent}    {each},\n" for each in parameters)
    return f"{start}(\n{middle}{' ' * indent}){end}"


def shown(each):
    stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
    hint = "" if each.annotation is each.empty else f": {shown_type(each.annotation)}"
    default = "" if each.default is each.empty else f" = {each.default!r}"
    return f"{stars}{each.name}{hint}{default}"


def shown_type(hint):
    plain = getattr(hint, "__forward_arg__", hint)
    text = plain if isinstance(plain, str) else inspect.formatannotation(plain)
    return text.replace("typing.", "").replace("datetime.datetime", "datetime")


def test_each_public_name_is_on_the_page_and_nothing_else():
    assert sorted(sections()) == sorted(OBJECTS)


@pytest.mark.parametrize("name", OBJECTS)
def test_the_page_shows_what_the_code_declares(name):
    code, prose = sections()[name]

    assert code == declaration(name, OBJECTS[name])
    assert prose.endswith(".")


@pytest.mark.parametrize("name", OPTIONS)
def test_the_page_and_the_help_say_what_an_option_means(name):
    hint, meaning = OPTIONS[name].__origin__, OPTIONS[name].__metadata__[0]
    option = f"- `{name}: {shown_type(hint)} = {DEFAULTS[name]!r}`: {meaning}"

    assert option in re.sub(r"\n  +", " ", sections()["RequestOptions"][1]).splitlines()
    for function in (enqueue, enqueue_many, enqueue_sync):
        assert f"{name}: {meaning}" in re.sub(
            r"\n +", " ", re.sub(r"\n    (?=\w)", "\n", inspect.getdoc(function))
        )
        assert inspect.signature(function).parameters[name].default == DEFAULTS[name]


def test_the_type_checker_and_the_interpreter_see_the_same_names():
    tree = ast.parse(Path(dgx_music.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}

    assert imported == dgx_music._MODULE_OF
    assert sorted(imported) == sorted(dgx_music.__all__)


def test_the_names_are_listed_and_no_module_hides_one():
    program = """
import dgx_music, inspect, pkgutil
assert {*dgx_music.__all__} <= {*dir(dgx_music)}
from dgx_music import *
assert inspect.iscoroutinefunction(enqueue) and enqueue is dgx_music.enqueue
import dgx_music.client.enqueue, dgx_music.client.generations, dgx_music.storage
assert dgx_music.enqueue is enqueue
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in dgx_music.__all__:
        assert importlib.util.find_spec(f"dgx_music.{name}") is None


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'dgx_music' has no attribute 'submit'$"):
        dgx_music.submit  # noqa: B018
