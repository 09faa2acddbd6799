"""Who may import whom: passes know the graph and operators, only compile.py knows the passes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PASSES = sorted((ROOT / "passes").glob("*.py"))
GRAPHC = sorted((ROOT / "graphc").rglob("*.py"))
# The only parts of graphc that passes may import.
ALLOWED = ("graphc.ir", "graphc.ops", "graphc.expr", "graphc.errors")


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(file: Path) -> set[str]:
    """Every module a file imports, at any depth; `from graphc import errors` is graphc.errors."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(file)}:{node.lineno}: relative import"
            if node.module == "graphc":
                found.update(f"graphc.{alias.name}" for alias in node.names)
            else:
                found.add(node.module or "")
    return found


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("file", PASSES, ids=relative)
def test_passes_import_only_the_graph_and_the_operators(file):
    reached = {m for m in imports(file) if below(m, "graphc")}
    wrong = sorted(m for m in reached if not any(below(m, allowed) for allowed in ALLOWED))
    assert not wrong, f"{relative(file)} imports {', '.join(wrong)}; passes may use {ALLOWED}"


@pytest.mark.parametrize("file", GRAPHC, ids=relative)
def test_only_compile_imports_passes(file):
    wrong = sorted(m for m in imports(file) if below(m, "passes"))
    if relative(file) != "graphc/compiler.py":
        assert not wrong, f"{relative(file)} imports {', '.join(wrong)}"


def test_the_graph_stands_alone():
    """ir, its parts, expr and errors need nothing of graphc at import but each other."""
    parts = {f"graphc.{name}" for name in ("errors", "node", "origins", "text", "types")}
    below_ir = (
        ("errors", set()),
        ("expr", set()),
        ("types", {"graphc.errors"}),
        ("origins", {"graphc.types"}),
        ("text", {"graphc.types"}),
        ("node", {"graphc.errors", "graphc.text", "graphc.types"}),
        ("ir", parts),
    )
    for name, allowed in below_ir:
        tree = ast.parse((ROOT / "graphc" / f"{name}.py").read_text())
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        found = set()
        for node in top:
            module = getattr(node, "module", None)
            if module == "graphc":
                found.update(f"graphc.{alias.name}" for alias in node.names)
            elif module and below(module, "graphc"):
                found.add(module)
        assert found <= allowed, f"graphc/{name}.py imports {sorted(found - allowed)}"


def test_passes_do_not_load_the_code_generator():
    """Importing every pass loads neither Numba nor graphc.codegen nor graphc.runtime."""
    names = ", ".join(f"passes.{file.stem}" for file in PASSES if file.stem != "__init__")
    # A bare `graphc` package: its __init__ offers the whole compiler.
    program = f"""
import sys, types
package = types.ModuleType("graphc")
package.__path__ = [{str(ROOT / "graphc")!r}]
sys.modules["graphc"] = package
import {names}
heavy = ("numba", "graphc.codegen", "graphc.runtime", "graphc.compiler")
print([m for m in heavy if m in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
