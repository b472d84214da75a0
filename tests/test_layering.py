"""Imports point one way, name the leaf module, and keep heavy packages where they belong."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_lora"
BELOW = {
    "errors": set(),
    "version": set(),
    "dependencies": {"errors"},
    "kernels": {"errors", "dependencies"},
    "nn": {"errors"},
    "model": {"errors", "nn"},
    "quantization": {"errors", "dependencies", "kernels", "nn", "model"},
    "io": {"errors", "dependencies", "nn", "model"},
    "optim": {"errors", "dependencies", "nn", "model"},
    "metrics": {"errors", "nn", "model"},
    "loading": {"errors", "nn", "model", "quantization", "io"},
    "estimation": {"errors", "nn", "model", "quantization", "optim"},
    "callbacks": {"errors", "nn", "model", "quantization", "io", "loading", "optim", "metrics", "estimation"},
    "strategies": {"errors", "callbacks"},
    "cli": {
        "errors",
        "dependencies",
        "nn",
        "model",
        "quantization",
        "io",
        "loading",
        "optim",
        "metrics",
        "estimation",
        "callbacks",
        "strategies",
    },
}
ONLY_IN = {
    "lightning": {"callbacks", "strategies", "cli"},
    "torchmetrics": {"metrics"},
    "jsonargparse": {"cli"},
    "bitsandbytes": set(),  # only by dependencies.bitsandbytes(), at run time
    "transformers": {"cli"},
    "matplotlib": {"cli"},
    "rich": {"cli"},
    "triton": {"kernels"},
    "huggingface_hub": {"io"},  # for its types; imported by dependencies.huggingface_hub(), at run time
}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def imported(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    layer = layer_of(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "lightning_lora":
            assert rest, f"{path} imports from the package root"
            assert rest[0] in BELOW[layer] | {layer}, f"{layer} must not import {name}"
        else:
            assert layer in ONLY_IN.get(top, {layer}), f"{layer} must not import {name}"


def test_package_folders_hold_no_logic():
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert not path.read_text().strip(), path
