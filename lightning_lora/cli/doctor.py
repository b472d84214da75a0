"""``lightning-lora doctor``: tries each part on this machine for real and says what works."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from lightning_lora.cli import console
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge
from lightning_lora.model.parameters import adapter_parameters
from lightning_lora.optim.paged_adamw import paged_adamw_8bit
from lightning_lora.optim.report import optimizer_report
from lightning_lora.quantization.quantize import quantize

EXTRAS = {"rich": "cli", "matplotlib": "plot", "transformers": "hf"}


def doctor() -> int:
    """Print a table of checks and return 0 if everything that a fine-tune needs works, else 1."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    checks: list[tuple[str, Callable[[], str]]] = [("LoRA forward, backward, merge", _lora)]
    for device in devices:
        checks.append((f"NF4 base on {device}", partial(_nf4, device)))
        checks.append((f"paged 8-bit AdamW on {device}", partial(_optimizer, device)))
    rows, failed = [], 0
    for what, check in checks:
        try:
            rows.append((what, "ok", check()))
        except Exception as error:
            failed += 1
            rows.append((what, "FAILED", str(error)))
    if "cuda" not in devices:
        rows.append(("CUDA", "none", "not needed; everything runs on the CPU, more slowly"))
    for package, extra in EXTRAS.items():
        found = importlib.util.find_spec(package) is not None
        rows.append(
            (
                package,
                "ok" if found else "absent",
                _version(package) if found else f'pip install "lightning-lora[{extra}]"',
            )
        )
    console.line(console.environment())
    console.table("what works here", ("check", "result", "detail"), rows)
    return 1 if failed else 0


def _adapted(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to(device), "*", exclude=())
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.02)
    return model


def _merge_difference(model: nn.Module, device: str) -> str:
    x = torch.randn(8, 128, device=device)
    adapted = model(x)
    adapted.square().mean().backward()
    merged = merge(model)(x)
    return f"merged and adapted differ by {((merged - adapted).abs().max() / adapted.abs().max()).item():.0e}"


def _lora() -> str:
    return _merge_difference(_adapted("cpu"), "cpu")


def _nf4(device: str) -> str:
    return _merge_difference(quantize(_adapted(device)), device)


def _optimizer(device: str) -> str:
    model = _adapted(device)
    optimizer = paged_adamw_8bit(torch.optim.AdamW(adapter_parameters(model), lr=1e-3))
    model(torch.randn(8, 128, device=device)).square().mean().backward()
    optimizer.step()
    report = optimizer_report(optimizer)
    return f"{report.in_8bit} of {report.tensors} moments in 8 bits, {report.paged} paged"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "installed"
