"""The table of recipes, and the strings that name them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from ..memory import Composition, Memory
from ..memory.composition import Kind

Maker = Callable[..., Composition]


@dataclass(frozen=True)
class RecipeInfo:
    """What `recipes()` tells of one recipe: `verbs` and `defaults` are those of the recipe without arguments, `kind` is
    what it is built for, see `Composition`."""

    name: str
    paper: str
    summary: str
    verbs: dict[str, str]
    defaults: dict[str, Any]
    claims: tuple[str, ...]
    kind: Kind = "memory"


@dataclass(frozen=True)
class _Entry:
    make: Maker
    paper: str
    claims: tuple[str, ...]


_entries: dict[str, _Entry] = {}

# Of a recipe that is not a memory for one model's attention: what it is, and what to do with it.
WHAT: dict[Kind, str] = {
    "lanes": "two lanes, of which one reads the other",
    "linked": "two modalities of one clock",
    "mixed": "for a model whose layers differ",
    "features": "a memory of frames, not of keys and values",
    "door": "a door before a memory",
}
INSTEAD: dict[Kind, str] = {
    "lanes": "build it, and read and write in threads of your own (docs/beyond.md)",
    "linked": "build it, and step block by block (docs/beyond.md)",
    "mixed": "build it, or open a model that has such layers (docs/beyond.md)",
    "features": "build it, feed it what an encoder gives, and read (docs/beyond.md)",
    "door": "put it before one: Watching(stream, door) in evenflow.watch (docs/beyond.md)",
}


def register(name: str, *, paper: str, claims: tuple[str, ...] = ()) -> Callable[[Maker], Maker]:
    """Put a function that returns a `Composition`, a `Memory` say, into the table, under `name` (lower case, hyphens).

    paper: what to cite. claims: names of the claims that measure what the paper promised. The first line of the
    function's docstring is its summary; its keyword parameters, all with defaults, are the recipe's parameters.
    """

    def enter(make: Maker) -> Maker:
        if name in _entries:
            raise ValueError(f"a recipe named {name!r} exists already")
        for parameter in inspect.signature(make).parameters.values():
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
                raise TypeError(f"recipe {name!r}: parameter {parameter.name!r} must be keyword-only with a default")
        _entries[name] = _Entry(make, paper, claims)
        return make

    return enter


def recipe(name: str, **params: Any) -> Any:
    """The `Composition` that the recipe `name` describes: a `Memory`, or one of another kind, as `recipes()` tells.

    Raises ValueError with the nearest right name on a wrong one.
    """
    entry = _entry(name)
    known = inspect.signature(entry.make).parameters
    for wrong in params.keys() - known.keys():
        takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
        raise ValueError(f"{name} has no parameter {wrong!r}{_nearest(wrong, known)}; {takes}")
    try:
        memory = entry.make(**params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {str(error).removeprefix('memory: ')}") from error
    shown = {key: params.get(key, known[key].default) for key in known}
    return dataclasses.replace(memory, name=name, params={k: v for k, v in shown.items() if v is not None})


def recipes(kind: Kind | None = None) -> list[RecipeInfo]:
    """Every recipe, or every one of a kind, sorted by name."""
    infos = [_info(name, entry) for name, entry in sorted(_entries.items())]
    return [info for info in infos if kind in (None, info.kind)]


def documentation(name: str) -> str:
    """What a recipe says of itself, whole: its function's docstring."""
    return inspect.getdoc(_entry(name).make) or ""


def parse(spec: str) -> Memory:
    """The memory that a string names: `"streaming-llm"`, `"streaming-llm(sink=4, window=1020)"`.

    Values are Python literals. Raises ValueError that says what was expected, also for a recipe of another kind, which
    `composed` takes.
    """
    made = composed(spec)
    if not isinstance(made, Memory):
        raise ValueError(f"{made.name} is {WHAT[made.kind]}; {INSTEAD[made.kind]}")
    return made


def composed(spec: str) -> Any:
    """The composition that a string names, of whatever kind."""
    text = spec.strip()
    name, bracket, rest = text.partition("(")
    name = name.strip()
    _entry(name)
    if not bracket:
        return recipe(name)
    if not rest.endswith(")"):
        raise ValueError(f"{spec!r} does not end with a bracket; write {name}(name=value, ...)")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"cannot read {spec!r}; write {name}(name=value, ...), every parameter with its name")
    params: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        try:
            params[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            shown = ast.unparse(keyword.value)
            raise ValueError(f"{spec!r}: {keyword.arg}={shown} is not a number, a string or None") from None
    return recipe(name, **params)


def _entry(name: str) -> _Entry:
    if name not in _entries:
        raise ValueError(f"no recipe {name!r}{_nearest(name, _entries)}; there are {', '.join(sorted(_entries))}")
    return _entries[name]


def _nearest(wrong: str, names: Any) -> str:
    asked = wrong.lower().replace("_", "-")
    near = get_close_matches(asked, sorted(names), 3, 0.6)
    # Several may be equally near, as streaming-llm and streaming-vlm are to streaming-lm.
    alike = [name for name in near if _likeness(asked, name) == _likeness(asked, near[0])]
    return f" (did you mean {' or '.join(map(repr, sorted(alike)))}?)" if near else ""


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(a=b, b=a).ratio()


def _info(name: str, entry: _Entry) -> RecipeInfo:
    memory = recipe(name)
    summary = (inspect.getdoc(entry.make) or "").partition("\n")[0]
    defaults = {key: p.default for key, p in inspect.signature(entry.make).parameters.items()}
    return RecipeInfo(name, entry.paper, summary, memory.verbs(), defaults, entry.claims, memory.kind)
