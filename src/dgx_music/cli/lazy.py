"""Commands whose modules are imported when they are asked for: ``--help`` answers at once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class LazyCommand(TyperCommand):
    """Stands for a command in lists of commands: it has a name and one line of help.

    ``target`` says where the command itself is: a module of this package, and in it a function or a
    ``Typer``, as in ``generations:stats``.
    """

    def __init__(self, name: str, panel: str, target: str, summary: str) -> None:
        super().__init__(name=name, help=summary, rich_help_panel=panel)
        self._target = target

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: Any = None,
        **extra: Any,
    ) -> Any:
        """Return the context of the command itself, which is imported for it."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> Any:
        """Import the command itself and return it."""
        module, _, name = self._target.partition(":")
        app = getattr(import_module(f"dgx_music.cli.{module}"), name)
        if not isinstance(app, typer.Typer):
            function, app = app, typer.Typer(add_completion=False)
            app.command(self.name)(function)
        command = typer.main.get_command(app)
        _prepare(command)
        return command


def group_of(commands: Sequence[LazyCommand]) -> type[TyperGroup]:
    """Return the class of a group that has these commands."""

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes | {"commands": list(commands)})

        def get_params(self, ctx: Any) -> list[Any]:
            return _converting(super().get_params(ctx))

    return Group


class _Conversion:
    """Converts a parameter's values as typer does, with pydantic, but only values that need it.

    Importing pydantic takes longer than importing typer, and most values are absent, or text that
    is wanted as text.
    """

    def __init__(self, parameter: Any) -> None:
        self._type = parameter.type_descriptor.annotation
        self._build = parameter.get_runtime_param

    def itself(self) -> _Conversion:
        """Return this object: typer asks each parameter for its conversion."""
        return self

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value in the parameter's type; raises typer's ``BadParameter``."""
        is_single = not param.multiple and param.nargs == 1
        if value is None:
            return None if is_single else ()
        if is_single and type(value) is self._type:
            return value
        if self._type == list[str] and all(type(each) is str for each in value):
            return list(value)
        return self._build().coerce(value, param=param, ctx=ctx)


_LINE_BREAK = re.compile(r"(?<!\n)\n(?!\n|dgx-music )")
"""One within a paragraph; an example of a command keeps a line of its own."""


def _prepare(command: Any) -> None:
    """Give this command, and the commands in it, a help that flows and a ``_Conversion``.

    The help wraps at the terminal's width: typer would also break it where the docstring does.
    """
    command.help = _LINE_BREAK.sub(" ", inspect.cleandoc(command.help or ""))
    find_all = command.get_params
    command.get_params = lambda context: _converting(find_all(context))
    for each in getattr(command, "commands", {}).values():
        _prepare(each)


def _converting(parameters: list[Any]) -> list[Any]:
    for each in parameters:
        if "get_runtime_param" not in vars(each):
            each.get_runtime_param = _Conversion(each).itself
    return parameters
