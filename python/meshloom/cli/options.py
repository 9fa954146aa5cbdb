"""Options that several commands take, held in one place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def takes(holder: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command the fields of a dataclass as options.

    The command's parameter annotated with `holder` is replaced by the holder's fields, in their
    place, and the command is called with an instance.
    """
    fields = dataclasses.fields(holder)
    hints = typing.get_type_hints(holder, include_extras=True)
    offered = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        resolved = typing.get_type_hints(command, include_extras=True)
        own = inspect.signature(command).parameters.values()
        (name,) = (parameter.name for parameter in own if resolved[parameter.name] is holder)
        parameters: list[inspect.Parameter] = []
        for parameter in own:
            if parameter.name == name:
                parameters += offered
            else:
                parameters.append(
                    parameter.replace(
                        kind=inspect.Parameter.KEYWORD_ONLY, annotation=resolved[parameter.name]
                    )
                )

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            held = holder(**{field.name: given.pop(field.name) for field in fields})
            return command(**{name: held}, **given)

        # Typer reads both.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
