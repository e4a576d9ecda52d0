"""Check that the rooms of the package import downwards only, and nothing from outside that they may not.

A room is a folder or a module directly under src/evenflow. Every import counts: at the top, inside a function, for type
checkers only, relative, or by `import_module` with a name that can be read. Usage: python tools/check_rooms.py [ROOT]
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "evenflow"
BELOW_API = {"memory", "recipes", "models"}
BELOW_CLAIMS = BELOW_API | {"media", "world", "learn", "generate", "watch", "api"}
# Each room, and the rooms it may import from.
ROOMS: dict[str, set[str]] = {
    "memory": set(),
    "recipes": {"memory"},
    "models": {"memory"},
    "media": set(),
    "world": set(),
    "learn": {"memory", "recipes", "models", "media", "world", "generate"},
    "generate": BELOW_API | {"media"},
    "watch": BELOW_API | {"media"},
    "api": BELOW_API | {"generate"},
    "claims": BELOW_CLAIMS | {"serve"},
    "serve": BELOW_API | {"media", "generate", "api"},
    "cli": BELOW_CLAIMS | {"claims", "serve"},
    "__main__": {"cli"},
}
# Rooms that may use only these of the libraries that pyproject.toml names; the others may use all of them.
LIBRARIES = {
    "memory": {"torch", "safetensors"},
    "recipes": {"torch"},
    "serve": {"torch", "numpy", "fastapi", "starlette", "pydantic", "uvicorn", "PIL", "av"},
}


def imports(tree: ast.AST, module: list[str], is_package: bool) -> Iterator[tuple[int, list[str] | None]]:
    """Line and full dotted name of everything that is imported; None for a name that cannot be read.

    module: dotted name of the module that `tree` is, in parts; relative imports start from it.
    """
    here = module if is_package else module[:-1]

    def absolute(name: str, level: int) -> list[str]:
        base = here[: len(here) - (level - 1)] if level else []
        return base + (name.split(".") if name else [])

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            for alias in node.names:
                yield node.lineno, [*base, alias.name]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                bare = name.value.lstrip(".")
                yield node.lineno, absolute(bare, len(name.value) - len(bare))
            else:
                yield node.lineno, None


def room_of(name: list[str]) -> str | None:
    """The room that an imported dotted name belongs to; None for what every room may have (the version)."""
    if len(name) > 1 and name[1] in ROOMS:
        return name[1]
    return None if name[1:] == ["__version__"] else "api"  # the package's public names are made of the api


def problems(root: Path) -> list[str]:
    """One sentence for every import that points where it must not, sorted by file and line."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project.get("optional-dependencies", {})
    named = [*project["dependencies"], *(entry for name in extras if name != "dev" for entry in extras[name])]
    declared = {re.split(r"[^\w-]", entry)[0] for entry in named}
    source = root / "src" / PACKAGE
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        room, is_package = parts[0], parts[-1] == "__init__"
        if parts == ["__init__"]:
            continue  # the front door: it names what it opens, lazily
        where = path.relative_to(root)
        if room not in ROOMS:
            found.append(f"{where}: room {room!r} is unknown; give it a place in tools/check_rooms.py")
            continue
        module = [PACKAGE, *(parts[:-1] if is_package else parts)]
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package):
            if name is None:
                found.append(f"{where}:{line}: imports a module whose name cannot be read; write the name out")
            elif name[0] == PACKAGE:
                other = room_of(name)
                if other not in ROOMS[room] | {room, None}:
                    allowed = ", ".join(sorted(ROOMS[room])) or "no other room"
                    found.append(f"{where}:{line}: {room} imports {other}; it may import {allowed}")
            elif name[0] not in sys.stdlib_module_names:
                library = name[0]
                allowed_here = LIBRARIES.get(room, declared)
                if library not in allowed_here:
                    libraries = ", ".join(sorted(allowed_here)) or "no library"
                    found.append(f"{where}:{line}: {room} imports {library}; it may import {libraries}")
    return found


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = problems(root)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
