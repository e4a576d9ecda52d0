"""Write docs/api.md from the docstrings of the public names: python tools/make_api_docs.py [FILE]"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

MODULES = (
    "evenflow",
    "evenflow.models",
    "evenflow.recipes",
    "evenflow.memory",
    "evenflow.memory.verbs",
    "evenflow.memory.routing",
    "evenflow.memory.features",
    "evenflow.memory.admission",
    "evenflow.memory.delta",
    "evenflow.memory.fast_weights",
    "evenflow.memory.time_aligned",
    "evenflow.memory.blockwise",
    "evenflow.memory.exploring",
    "evenflow.models.hybrid",
    "evenflow.generate.searching",
    "evenflow.watch",
    "evenflow.media",
    "evenflow.learn",
    "evenflow.claims",
)
# Rooms whose modules are what one calls, rather than names that the room itself gathers.
BY_MODULE = ("evenflow.learn",)

INTRO = """# API reference

Made from the docstrings by `make docs`; a test fails when it is out of date. Shapes are written in square brackets:
B rows, T or m tokens, V vocabulary, H_q and H_kv query and key heads, D channels of a head, S sinks, W window tokens.
"""


def pages() -> list[str]:
    """Dotted names of all modules that are described, in order."""
    found = []
    for path in MODULES:
        found.append(path)
        if path in BY_MODULE:
            inside = iter_modules(import_module(path).__path__)
            found += sorted(f"{path}.{module.name}" for module in inside if not module.name.startswith("_"))
    return found


def public(module: ModuleType) -> list[str]:
    """What the module offers: `__all__`, or else the functions and classes that it defines, in their order."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def entry(name: str, value: Any, level: str) -> list[str]:
    """Heading, signature and docstring of a function or class, and the same for a class's members; a constant's value."""
    lines = [f"{level} {name}", ""]
    if not callable(value) and not inspect.isdatadescriptor(value):
        return [*lines, "```python", f"{name} = {value!r}", "```", ""]
    if not inspect.isdatadescriptor(value):
        lines += ["```python", f"{name.split('.')[-1]}{_signature(value)}", "```", ""]
    lines += [inspect.getdoc(value) or "", ""]
    if inspect.isclass(value):
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        for member, what in vars(value).items():
            what = what.__func__ if isinstance(what, classmethod | staticmethod) else what
            shown = inspect.isfunction(what) or isinstance(what, property)
            if shown and not member.startswith("_") and member not in fields and inspect.getdoc(what):
                lines += entry(f"{name}.{member}", what, level + "#")
    return lines


class _Written(str):
    """An annotation as its author wrote it: without the quotes that a string has."""

    def __repr__(self) -> str:
        return str(self)


def _named(default: Any) -> Any:
    """A default that is a function by its name, and not by where it lies in memory."""
    if not inspect.isfunction(default):
        return default
    return _Written("..." if default.__name__ == "<lambda>" else default.__name__)


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(...)"

    def bare(annotation: Any) -> Any:
        return _Written(annotation) if isinstance(annotation, str) else annotation

    kept = [
        parameter.replace(annotation=bare(parameter.annotation), default=_named(parameter.default))
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    signature = signature.replace(parameters=kept, return_annotation=bare(signature.return_annotation))
    one_line = str(signature)
    if len(one_line) <= 100:
        return one_line
    result = one_line[one_line.rindex(") ->") + 1 :] if ") ->" in one_line else ""
    inside, marked = [], False
    for parameter in kept:
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            inside.append("    *,\n")
            marked = True
        marked = marked or parameter.kind is parameter.VAR_POSITIONAL
        inside.append(f"    {parameter},\n")
    return "(\n" + "".join(inside) + ")" + result


def reference() -> str:
    """The whole page."""
    lines: list[str] = [INTRO]
    shown: set[int] = set()
    for path in pages():
        module = import_module(path)
        names = [(name, getattr(module, name)) for name in public(module)]
        called = [(name, value) for name, value in names if callable(value) and not inspect.ismodule(value)]
        constants = [(name, value) for name, value in names if isinstance(value, int)]
        new = [(name, value) for name, value in called if id(value) not in shown]
        shown.update(id(value) for _, value in new)
        again = [name for name, value in names if callable(value) and (name, value) not in new]
        lines += [f"## {path}", "", inspect.getdoc(module) or "", ""]
        if again:
            lines += [
                "Also here, described elsewhere on this page: " + ", ".join(f"`{name}`" for name in again) + ".",
                "",
            ]
        for name, value in [*constants, *new]:
            lines += entry(name, value, "###")
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent / "docs" / "api.md"
    path.write_text(reference(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
