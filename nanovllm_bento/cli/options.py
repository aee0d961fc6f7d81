"""Options made from the settings: one for each field of a pydantic model."""

import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from nanovllm_bento.config import ENV_PREFIX, EngineConfig, ServiceConfig

PANELS: dict[type[BaseModel], str] = {EngineConfig: "Engine", ServiceConfig: "Service"}
"""Settings that environment variables set too, and where --help shows them."""


def with_settings(
    *models: type[BaseModel], skip: Iterable[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**settings`` by one option per field of the models (None when not given)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = {name: hint for name, hint in command.__annotations__.items() if name != "settings"}
        taken = {p.name for p in parameters} | set(skip)
        for model in models:
            for name, field in model.model_fields.items():
                if name in taken:
                    continue
                kind: Any = option_type(field.annotation)
                hint: Any = Annotated[kind | None, option(model, name)]
                parameters.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
                )
                hints[name] = hint

        def call(*args: Any, **kwargs: Any) -> None:
            command(*args, **kwargs)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = hints
        return call

    return decorate


def option(model: type[BaseModel], name: str) -> Any:
    """typer's description of one setting: --its-name, its choices, its default and its environment variable."""
    field = model.model_fields[name]
    flag = "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{name.replace('_', '-')}"] if option_type(field.annotation) is bool else [flag]
    chosen = choices(field.annotation)
    text = [field.description or "", " | ".join(chosen) + "." if chosen else ""]
    default = f"Default: {'none' if field.default is None else field.default}"
    if model in PANELS:
        text.append(f"{default}; or {ENV_PREFIX}{name.upper()}.")
    elif field.default not in (None, []):
        text.append(f"{default}.")
    panel = PANELS.get(model)
    return typer.Option(*flags, help=" ".join(filter(None, text)), show_default=False, rich_help_panel=panel)


def option_type(annotation: Any) -> Any:
    """The type an option is parsed as; choices and bounds are checked by the settings themselves."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation if annotation in (bool, int, float, Path, list[str]) else str


def choices(annotation: Any) -> list[str]:
    """The values of a Literal; empty for any other type."""
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []
