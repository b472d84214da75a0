"""Time of NF4 dequantization on a GPU or on the CPU.

Weights are 4096 x 4096 and 11008 x 4096 (Llama-2-7B's) on a GPU, 512 x 512 and 2048 x 2048 on the CPU, quantized
doubly, to bfloat16. Speed is what has to move (codes, constants, weight) over the time, beside that of a copy:

  ours          the operator lightning_lora::dequantize_nf4: one Triton kernel on CUDA, bitsandbytes' two on the CPU
  bitsandbytes  functional.dequantize_4bit: three kernels on CUDA
  copy          one tensor to another

On the CPU nothing is claimed: the kernels are bitsandbytes', and the operator adds some 10 us of Python to each call.

Before anything is timed, ours is compared with bitsandbytes bit by bit; a difference stops the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from bitsandbytes import functional as bnb
from report import Cell, Claim, Report, command, parser
from timing import interleaved
from torch import Tensor

from lightning_lora.kernels.nf4 import dequantize_nf4
from lightning_lora.kernels.packed import Packed

SHAPES = {"cuda": ((4096, 4096), (11008, 4096)), "cpu": ((512, 512), (2048, 2048))}
DTYPE = torch.bfloat16
BEFORE = ", first"


def measure(device: str, rounds: int) -> Report:
    """Time every shape, against the speed of a copy."""
    rows: list[list[Cell]] = []
    claims = []
    for shape in SHAPES[device]:
        times = timed(contenders(shape, device), rounds)
        seconds = {name: statistics.median(each) for name, each in times.items() if not name.endswith(BEFORE)}
        speed = {name: gigabytes(shape, name) / time for name, time in seconds.items()}
        cells: list[Cell] = [f"{1e6 * seconds[name]:.0f} us, {speed[name]:.0f} GB/s" for name in seconds]
        rows.append([f"{shape[0]} x {shape[1]}", *cells, speed["ours"] / speed["copy"]])
        if device == "cuda":
            claims.append(
                Claim(
                    f"{shape[0]} x {shape[1]}: no slower than bitsandbytes' function, ours / theirs",
                    seconds["ours"] / seconds["bitsandbytes"],
                    1.0,
                )
            )
            claims.append(
                Claim(
                    f"{shape[0]} x {shape[1]}: at least 80% of a copy's speed, copy / ours",
                    speed["copy"] / speed["ours"],
                    1.25,
                )
            )
    return Report(
        title=f"NF4 to bfloat16 on {where(device)}",
        command=f"{command(__file__, rounds)} --device {device}",
        columns=["weight", "ours", "bitsandbytes", "copy", "ours / copy"],
        rows=rows,
        claims=claims,
    )


def contenders(shape: tuple[int, int], device: str) -> dict[str, Callable[[], object]]:
    """What is timed, after a check that all of it computes the same."""
    packed, codes, state = packed_weight(shape, device)
    buffer = torch.empty(shape, dtype=DTYPE, device=device)
    source = torch.empty_like(buffer)
    expected = bnb.dequantize_4bit(codes, state)
    if not torch.equal(dequantize_nf4(packed, shape, DTYPE), expected):
        raise SystemExit(f"{shape}: ours is not bitsandbytes' weight")
    return {
        "ours": lambda: dequantize_nf4(packed, shape, DTYPE),
        "bitsandbytes": lambda: bnb.dequantize_4bit(codes, state),
        "copy": lambda: buffer.copy_(source),
    }


def packed_weight(shape: tuple[int, int], device: str) -> tuple[Packed, Tensor, bnb.QuantState]:
    """A normal weight as we hold it and as bitsandbytes does."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, DTYPE)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = Packed(codes.reshape(-1), state.absmax, state.state2.absmax, state.offset.reshape(1), 64)
    return packed, codes, state


def gigabytes(shape: tuple[int, int], name: str) -> float:
    """What has to be read and written: codes, an 8-bit maximum for 64 weights, and the weight; a copy moves two."""
    count = shape[0] * shape[1]
    return 1e-9 * count * (4 if name == "copy" else 0.5 + 1 / 64 + 2)


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round: on a GPU those the device took, between two of its own events.

    On the CPU each runs twice and the second run counts: the first finds the caches, and the memory that is given back
    between two runs, as the one before has left them.
    """
    if not torch.cuda.is_available():
        return interleaved({f"{name}{after}": way for name, way in ways.items() for after in (BEFORE, "")}, rounds)
    evicting = torch.empty(2**27, dtype=torch.uint8, device="cuda")  # more than the second cache holds
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(-3, rounds):
        for name, way in ways.items():
            evicting.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # the host gets ahead, so that no launch is waited for between the events
            start.record()
            way()
            end.record()
            end.synchronize()
            if index >= 0:
                seconds[name].append(1e-3 * start.elapsed_time(end))
    return seconds


def where(device: str) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else "the CPU"


def main() -> None:
    """Read the command line, measure and print."""
    arguments = parser(__doc__, repeats=50)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = arguments.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device, and torch finds none")
    report = measure(chosen.device, chosen.repeats)
    print(report.text())
    if chosen.json is not None:
        with chosen.json.open("a") as file:
            file.write(report.markdown())


if __name__ == "__main__":
    main()
