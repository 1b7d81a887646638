"""Read and write settings as text: numbers, names, true or false, and widths such as ``256x64``."""

from collections.abc import Mapping
from typing import Any

from ..cache.errors import MmcliError


def check_name(name: str, settings: Mapping[str, Any], what: str) -> None:
    """Raise an MmcliError where ``what`` (a head, stage 2) has no setting called ``name``."""
    if name not in settings:
        raise MmcliError(f"no setting of {what} is called {name!r}: choose among {', '.join(settings)}")


def parse_as(name: str, text: str, default: Any) -> Any:
    """Read the value of a setting with the type of ``default``; raise an MmcliError for a wrong value."""
    text = text.strip()
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            widths = tuple(int(part) for part in text.split("x"))
            if min(widths) < 1:
                raise ValueError
            return widths
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (ValueError, KeyError) as error:
        shapes: dict[type, str] = {bool: "true or false", tuple: "widths such as 256x64", int: "a whole number"}
        raise MmcliError(f"{name} cannot be {text!r}: it is {shapes.get(type(default), 'a number')}") from error
    return text


def setting_text(value: Any) -> str:
    """Return the text that ``parse_as`` reads as ``value``."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
