"""What is shipped, and that `kernels/` stays a folder, not a package."""

import ast
import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[1]


def setup_arguments() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [n.value for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def test_kernels_is_not_importable():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's package of that name


def test_only_our_packages_are_found():
    found = find_packages(str(ROOT), include=["fastcraft", "fastcraft.*"]) + find_packages(str(ROOT / "kernels"))
    assert {name.split(".")[0] for name in found} == {"fastcraft", "fastcraft_kernels"}
    folders = {path.parent for path in (ROOT / "fastcraft").rglob("*.py")}
    assert {ROOT / name.replace(".", "/") for name in found if name.startswith("fastcraft.")} | {
        ROOT / "fastcraft"
    } == folders


def test_requirements_keep_clear_of_known_traps():
    requires = ast.literal_eval(setup_arguments()["install_requires"])
    assert "torch>=2.11,<2.14" in requires  # a range that admits newer ones replaces a CPU build by gigabytes
    assert not any(name.startswith(("torchvision", "open_clip", "hpsv2", "image-reward")) for name in requires)
    assert any(name.startswith("deepspeed>=0.19.8") for name in requires)


def test_version_is_stated_once_for_both():
    import fastcraft

    assert ast.literal_eval(setup_arguments()["version"]) == fastcraft.__version__


def test_pyproject_holds_tools_only():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(table) == {"build-system", "tool"}
