"""The shape of the code: which package may import which, and the size budgets.

pytest tests/test_architecture.py
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"models", "losses", "data", "utils"}
SCRIPTS = sorted(ROOT.glob("*.py"))
FOLDERS = [*PACKAGES, "configs", "assembly", "baselines", "benchmarks"]
MODULES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
# every package may import them
SHARED = {"utils.labels", "utils.correlation", "utils.files", "utils.problems"}
OURS = {p.stem for p in SCRIPTS} | set(FOLDERS) | {"tests"}


def imports(path: Path) -> set[str]:
    """First names of every import of our own code in a file, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
    return names & OURS


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_nothing_of_ours_outside_themselves(path):
    package = path.relative_to(ROOT).parts[0]
    # configs compose the packages' own dataclasses; assembly joins models, data and configs;
    # baselines are other methods on the same data and loop, and know nothing of our models
    joins = {
        "configs": PACKAGES,
        "baselines": PACKAGES - {"models"} | {"configs"},
        "assembly": PACKAGES | {"configs", "baselines"},
    }
    allowed = {package} | joins.get(package, set())
    if package == "benchmarks":
        allowed |= PACKAGES | {"configs", "assembly", "baselines"}
    assert imports(path) <= allowed | ({"utils"} if modules_of_utils(path) <= SHARED else set())


def modules_of_utils(path: Path) -> set[str]:
    """Modules of utils that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("utils")}
        elif isinstance(node, ast.ImportFrom) and node.module == "utils":
            names |= {f"utils.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils."):
            names.add(node.module)
    return names


def test_what_all_packages_share_imports_nothing_of_ours():
    for name in SHARED:
        assert not imports(ROOT / f"{name.replace('.', '/')}.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_imported_by_no_package_and_stay_short(path):
    shared = {"train"} if path.stem == "finetune" else set()  # stage 3 is stage 2 and one term
    assert imports(path) <= PACKAGES | {"configs", "assembly", "baselines"} | shared
    assert len(path.read_text().splitlines()) < 200


def fast_modules(path: Path) -> set[str]:
    """Modules of models/fast that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {".".join(n.split(".")[2:3]) for n in names if n.startswith("models.fast")} - {""}


def test_models_fast_has_one_door():
    outside = [p for p in MODULES if p.parent.name not in ("fast", "benchmarks")]
    for path in [*outside, *SCRIPTS]:
        found = fast_modules(path)
        assert found <= {"plan"}, f"{path.relative_to(ROOT)} imports {found} of models/fast"
        if path.parent.name == "models":
            assert not found, f"{path.name} is the plain model; models/fast builds on it"


def test_configs_hold_a_schema_and_yaml_alone():
    assert [p.name for p in (ROOT / "configs").rglob("*.py")] == ["schema.py"]


def test_the_plain_model_is_readable_in_one_sitting():
    assert sum(len(p.read_text().splitlines()) for p in (ROOT / "models").glob("*.py")) < 2000


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 400
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "every file begins with one sentence"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            budget = 130 if node.name == "fit" else 60  # the loop is one function on purpose
            assert length <= budget, f"{node.name} has {length} lines"


def test_no_line_is_longer_than_100_columns():
    for path in [*MODULES, *SCRIPTS, *(ROOT / "tests").rglob("*.py")]:
        long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
        assert not long, f"{path.relative_to(ROOT)}: lines {long}"


def test_no_file_is_unpickled_without_weights_only():
    for path in [*MODULES, *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value for k in node.keywords), path


def test_no_large_file_is_in_git():
    try:
        names = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    large = [n for n in names if n and (ROOT / n).is_file() and (ROOT / n).stat().st_size > 2**20]
    assert not large
