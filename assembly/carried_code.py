"""The model's own source as modules of an exported folder, so that diffusers alone can run it.

Files are copied as they are; only the imports among them are rewritten to relative ones. diffusers
copies the folder's modules into one package of its cache, for all models, and keeps what is loaded:
so every name holds a hash of the source, and two exports of different versions never mix.
"""

import ast
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "assembly.inference"
CLASS = "ThermaFluxTranslator"
LICENCE = ROOT / "LICENSE"


def carried_code() -> tuple[str, dict[str, str]]:
    """Name of the module to load, and the text of every file by its name."""
    sources = _reached(ENTRY)
    digest = hashlib.sha256("\n".join(f"{n}\n{sources[n]}" for n in sorted(sources)).encode())
    main = f"thermaflux_{digest.hexdigest()[:8]}"
    flat = {n: f"{main}_{n.replace('.', '_')}" for n in sources}
    files = {f"{flat[n]}.py": _rewritten(n, text, flat) for n, text in sources.items()}
    named = [f"from .{x} import __name__ as _{i}" for i, x in enumerate(sorted(flat.values()))]
    lines = ['"""Names every module of the model: diffusers fetches what this file names."""', ""]
    lines += [*named, f"from .{flat[ENTRY]} import {CLASS}", ""]
    files[f"{main}.py"] = "\n".join(lines)
    if LICENCE.is_file():
        files["LICENSE"] = LICENCE.read_text(encoding="utf-8")  # of the code, not of the weights
    return main, files


def _path(module: str) -> Path | None:
    """The file of one of our modules; None where the name is none."""
    base = ROOT.joinpath(*module.split("."))
    found = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in found if path.is_file()), None)


def _reached(entry: str) -> dict[str, str]:
    """Module -> source, of `entry` and all of ours that it imports, directly or not."""
    sources: dict[str, str] = {}
    left = [entry]
    while left:
        name = left.pop()
        if name not in sources:
            path = _path(name)
            assert path is not None, name
            sources[name] = path.read_text(encoding="utf-8")
            left += [m for _, found in _our_imports(sources[name]) for m in found]
    return sources


def _our_imports(source: str) -> list[tuple[ast.ImportFrom, list[str]]]:
    """Each import of our modules, and the modules it needs: `from a.b import c` is a.b or a.b.c."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if _path(alias.name)]
            assert not ours, f"write `from {ours} import ...`: only that can be rewritten"
        if isinstance(node, ast.ImportFrom) and node.module and _path(node.module):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if _path(name)]
            assert len(modules) in (0, len(inside)), f"line {node.lineno} imports modules and names"
            found.append((node, modules or [node.module]))
    return found


def _rewritten(name: str, source: str, flat: dict[str, str]) -> str:
    """The source with its imports of our modules relative, under their flat names."""
    lines = source.split("\n")
    for node, modules in _our_imports(source):
        line = lines[node.lineno - 1]
        if modules == [node.module]:
            line = line.replace(f"from {node.module} import", f"from .{flat[modules[0]]} import")
        else:
            names = [f"{flat[m]} as {a.asname or a.name}" for m, a in zip(modules, node.names)]
            assert node.lineno == node.end_lineno, f"{name}: write this import on one line"
            line = f"{' ' * node.col_offset}from . import {', '.join(names)}"
        lines[node.lineno - 1] = line
    head = f"# ThermaFlux, {name.replace('.', '/')}; MIT licence, see LICENSE; only imports differ"
    return "\n".join([head, *lines])
