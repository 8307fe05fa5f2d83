"""The floors: imports go down only, siblings never import each other, heavy packages enter by one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "fastcraft_kernels": 0, "fastcraft.errors": 0,
    "fastcraft.straight_through": 1, "fastcraft.durable": 1, "fastcraft.registry": 1, "fastcraft.records": 1,
    "fastcraft.remade": 1,
    "fastcraft.memory": 2,
    "fastcraft.data": 3, "fastcraft.text": 3, "fastcraft.diffusion": 3, "fastcraft.rewards": 3,
    "fastcraft.weights": 3, "fastcraft.trained": 3,
    "fastcraft.families": 4,
    "fastcraft.objectives": 5, "fastcraft.evaluation": 5, "fastcraft.shapes": 5,
    "fastcraft.recipe": 6, "fastcraft.config": 7,
    "fastcraft.engine": 8, "fastcraft.forecast": 8,
    "fastcraft.build": 9,
    "fastcraft.evaluator": 10, "fastcraft.dry_run": 10, "fastcraft.trainer": 11,
    "fastcraft.train": 12, "fastcraft.commands": 12, "fastcraft.cli": 13,
}  # fmt: skip
DOORS = {
    "deepspeed": {"fastcraft/engine/zero2.py"},
    "diffusers": {"fastcraft/families/components.py", "fastcraft/diffusion/patch.py", "fastcraft/shapes/"},
    "xformers": {"kernels/fastcraft_kernels/attention/providers.py"},
    "triton": {
        "kernels/fastcraft_kernels/testing.py",
        *(f"kernels/fastcraft_kernels/{path.name}/kernel" for path in (ROOT / "kernels").glob("*/*")),
    },
}


def sources() -> list[Path]:
    return [*sorted((ROOT / "fastcraft").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]


def imports(path: Path) -> list[str]:
    """Every module a file imports, lazy ones too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def unit(module: str) -> str:
    """The row of `FLOORS` that a module belongs to."""
    parts = module.split(".")
    return parts[0] if parts[0] == "fastcraft_kernels" else ".".join(parts[:2])


def unit_of(path: Path) -> str:
    relative = path.relative_to(ROOT if path.is_relative_to(ROOT / "fastcraft") else ROOT / "kernels")
    return unit(".".join(relative.with_suffix("").parts))


def violations(path: Path, modules: list[str]) -> list[str]:
    own = unit_of(path)
    if own == "fastcraft.__init__":
        return [f"{path}: the package imports {name}" for name in modules]
    rows = [] if own in FLOORS else [f"{path}: unit {own} has no floor"]
    for name in modules:
        top = name.split(".")[0]
        if top in DOORS and not str(path.relative_to(ROOT)).startswith(tuple(DOORS[top])):
            rows.append(f"{path}: imports {top}, which enters by {sorted(DOORS[top])} only")
        if top not in ("fastcraft", "fastcraft_kernels") or name in ("fastcraft", "fastcraft.__version__"):
            continue
        target = unit(name)
        if target != own and not FLOORS.get(target, 99) < FLOORS.get(own, -1):
            rows.append(f"{path}: {own} imports {target}, which is not on a lower floor")
    return rows


def test_imports_go_down_only():
    rows = [row for path in sources() for row in violations(path, imports(path))]
    assert len(sources()) > 20
    assert rows == []


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("fastcraft/text/encoder.py", "fastcraft.objectives.truncation"),
        ("fastcraft/text/encoder.py", "fastcraft.diffusion.unroll"),
        ("fastcraft/weights/export.py", "diffusers"),
        ("fastcraft/rewards/mix.py", "deepspeed.comm"),
        ("fastcraft/novelty/new.py", "fastcraft.records"),
    ],
)
def test_a_planted_import_is_caught(file, module):
    assert violations(ROOT / file, [module])


def test_no_module_shadows_the_standard_library():
    """``fastcraft/train.py`` is run as a script, which puts ``fastcraft/`` first on the path."""
    import sys

    names = {path.stem for path in (ROOT / "fastcraft").iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


def test_importing_any_module_does_no_work():
    """Every module imports in a fresh process without network, GPU, or output."""
    import subprocess
    import sys

    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if path.is_relative_to(ROOT / "fastcraft") and path.name != "__main__.py"
    ]
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({name!r})\n" for name in names)
    code += "import torch; assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:fastcraft", "-c", code],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
