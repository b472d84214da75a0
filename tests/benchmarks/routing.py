"""Time of one layer over a batch of 16 rows that go through 8 adapters, beside the same batch through one adapter.

A layer of 2048 -> 2048 features with adapters of rank 16, in bf16 or NF4, on rows of 32 tokens: a forward pass, as when
serving, and a training step (forward and backward). One more case is a forward pass of one token per row, as when
generating. Contenders take turns, and a ratio is the median over the rounds of a contender / one adapter.

  one adapter  activate(model, name): the floor, which computes something else for most rows
  routed       routed(model, names): rows gathered by adapter, each adapter once
  gathered     the factors gathered by row and multiplied as a batch of matrices (bmm), which asks for equal ranks and
               a linear layer; it is not in the library, but written here to compare with
  PEFT         model(x, adapter_names=names): for forward passes alone, it refuses to train so

Before anything is timed, each contender's output is compared with each row computed alone in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from parity import TOLERANCE
from report import Cell, Claim, Report, command, run
from timing import interleaved, median_ratio
from torch import Tensor, nn

from lightning_lora import LoRAConfig, activate, inject, quantize, routed
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.base import dense_weight
from lightning_lora.nn.lora import LoRA

WIDTH, R, ADAPTERS, BATCH = 2048, 16, 8, 16
SCALE = 2.0
ADAPTER_NAMES = [f"t{index}" for index in range(ADAPTERS)]
NAMES = [ADAPTER_NAMES[index * 5 % ADAPTERS] for index in range(BATCH)]
"""Each adapter has two rows, and they are far apart."""


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        base: ``"bf16"`` or ``"nf4"``.
        tokens: Per row.
        trains: Whether a backward pass follows.
    """

    base: str
    tokens: int
    trains: bool

    def __str__(self) -> str:
        what = "step" if self.trains else "forward" if self.tokens > 1 else "forward, 1 token per row"
        return f"{self.base}, {what}"


CASES = [
    Case("bf16", 32, trains=False),
    Case("bf16", 32, trains=True),
    Case("nf4", 32, trains=False),
    Case("nf4", 32, trains=True),
    Case("bf16", 1, trains=False),
]


def measure(rounds: int) -> Report:
    """Time every case."""
    rows: list[list[Cell]] = []
    claims = []
    for case in CASES:
        seconds = time_case(case, rounds)
        one = seconds["one adapter"]
        ratios = {name: median_ratio(values, one) for name, values in seconds.items()}
        others: list[Cell] = [ratios.get(name, "-") for name in ("routed", "gathered", "PEFT")]
        rows.append([str(case), 1000 * statistics.median(one), *others])
        if case.tokens > 1:
            text = f"{case}: 8 adapters in one batch cost little more than one, routed / one adapter"
            claims.append(Claim(text, ratios["routed"], 1.3))
    return Report(
        title="A batch of 16 rows through 8 adapters (2048 -> 2048, r=16, 32 tokens per row)",
        command=command(__file__, rounds),
        columns=["case", "one adapter, ms", "routed / one", "gathered / one", "PEFT / one"],
        rows=rows,
        claims=claims,
        note="*gathered* multiplies factors gathered by row as a batch of matrices. It asks for LoRA, a linear layer "
        "and equal ranks, and is within a few percent here. *PEFT* is `adapter_names=`, which does not train. With one "
        "token per row, as when generating, eight small calls are paid beside one that reads the base weight; that "
        "ratio, of times of a millisecond or two, depends on what else runs on the machine (2.2, 3.3 and 5.9 in three "
        "runs).",
    )


def time_case(case: Case, rounds: int) -> dict[str, list[float]]:
    """Build the contenders, hold each to the equation, and time them in turns."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16))
    for name in ADAPTER_NAMES:
        inject(model, "0", LoRAConfig(r=R, alpha=SCALE * R), name=name)
    for key, parameter in model.named_parameters():
        if key.endswith("lora_B"):
            nn.init.normal_(parameter, std=1 / (SCALE * R**0.5))
    theirs = None if case.base == "nf4" or case.trains else pefts(model)
    if case.base == "nf4":
        quantize(model)
    activate(model, *ADAPTER_NAMES)
    layer = model[0]
    assert isinstance(layer, AdaptedLayer)
    x = torch.randn(BATCH, case.tokens, WIDTH, dtype=torch.bfloat16, requires_grad=case.trains)
    contenders = {"routed": lambda: through_routed(model, x), "gathered": lambda: through_gathered(layer, x)}
    if theirs is not None:
        contenders["PEFT"] = lambda: theirs(x, adapter_names=NAMES)
    for name, contender in contenders.items():
        check(case, name, contender().detach(), layer, x)
    contenders = {"one adapter": lambda: through_one(layer, x), **contenders}
    trained = [x, *model.parameters()]
    return interleaved({name: timed(case, contender, trained) for name, contender in contenders.items()}, rounds)


def through_one(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """All rows through one adapter."""
    return layer.adapter("t0")(x, layer.base_layer(x), layer.base_layer)


def through_routed(model: nn.Module, x: Tensor) -> Tensor:
    """Each row through its own, context and all."""
    with routed(model, NAMES):
        return model(x)


def through_gathered(layer: AdaptedLayer, x: Tensor) -> Tensor:
    """The same by batches of matrices."""
    y = layer.base_layer(x)
    which = torch.tensor([ADAPTER_NAMES.index(name) for name in NAMES])
    adapters = loras(layer)
    downs = torch.stack([adapter.lora_A.to(y.dtype).T for adapter in adapters])[which]
    ups = torch.stack([adapter.lora_B.to(y.dtype).T for adapter in adapters])[which]
    return torch.baddbmm(y, torch.bmm(x, downs), ups, alpha=SCALE)


def pefts(model: nn.Sequential) -> nn.Module:
    """PEFT's layer with the same weights, in evaluation, which is where it takes ``adapter_names``."""
    ours = model[0]
    assert isinstance(ours, AdaptedLayer)
    layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(dense_weight(ours.base_layer, torch.bfloat16), requires_grad=False)
    config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=["0"])
    adapted = peft.get_peft_model(nn.Sequential(layer), config, adapter_name=ADAPTER_NAMES[0])
    for name in ADAPTER_NAMES[1:]:
        adapted.add_adapter(name, config)
    theirs = adapted.base_model.model[0]
    with torch.no_grad():
        for name, adapter in zip(ADAPTER_NAMES, loras(ours), strict=True):
            theirs.lora_A[name].weight.copy_(adapter.lora_A)
            theirs.lora_B[name].weight.copy_(adapter.lora_B)
    return theirs.eval()


def loras(layer: AdaptedLayer) -> list[LoRA]:
    """The adapters in the order of their names."""
    adapters = [layer.adapter(name) for name in ADAPTER_NAMES]
    return [adapter for adapter in adapters if isinstance(adapter, LoRA)]


@torch.no_grad()
def check(case: Case, name: str, found: Tensor, layer: AdaptedLayer, x: Tensor) -> None:
    """Hold an output to ``y_i = (W + s B A) x_i`` with the adapter of row ``i``, in float64."""
    W = dense_weight(layer.base_layer, torch.bfloat16).double()
    adapters = dict(zip(ADAPTER_NAMES, loras(layer), strict=True))
    for index, which in enumerate(NAMES):
        update = SCALE * adapters[which].lora_B.double() @ adapters[which].lora_A.double()
        expected = x[index].double() @ (W + update).T
        error = float((found[index].double() - expected).norm() / expected.norm())
        limit = TOLERANCE[torch.bfloat16]
        assert error <= limit, f"{case}: row {index} of {name} is off by {error:.2e} of its norm, tolerance {limit:.2e}"


def timed(case: Case, contender: Callable[[], Tensor], trained: list[Tensor]) -> Callable[[], None]:
    """Return a forward pass, and a backward pass if the case trains."""
    grad = torch.randn(BATCH, case.tokens, WIDTH, dtype=torch.bfloat16)

    def step() -> None:
        for tensor in trained:
            tensor.grad = None
        contender().backward(grad)

    def forward() -> None:
        with torch.no_grad():
            contender()

    return step if case.trains else forward


if __name__ == "__main__":
    run(__doc__, measure, repeats=60)
