"""The Triton kernels without a GPU: interpreted, in a process of their own, and compiled to a GPU's instructions.

Neither proves a speed, nor that a driver runs them; tests/kernels/test_cuda.py does, where there is a GPU.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
triton = pytest.importorskip("triton", reason="needs Triton, which PyPI has for Linux")
ARGUMENTS = ("codes", "absmax", "nested_absmax", "offset", "nested_levels", "levels", "out", "count")
BLOCKS = {"BLOCK": 64, "NESTED": True, "NESTED_BLOCK": 256}


def test_they_pass_under_tritons_interpreter():
    """Odd sizes, all dtypes and block sizes: bit-equal to bitsandbytes or plain torch, float64 but for roundings."""
    files = [str(HERE / f"interpreted_{name}.py") for name in ("nf4", "normal_float")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    said = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "skipped" not in said.stdout


@pytest.fixture
def instructions(monkeypatch, tmp_path):
    """Compile kernels for an H100 or H200 as they are launched for double-quantized weights; count instructions."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process, and does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel, types: dict[str, str], constants: dict[str, int]) -> tuple[Counter[str], str]:
        source = ASTSource(
            fn=kernel,
            signature=types | dict.fromkeys(constants, "constexpr"),
            constexprs={(len(types) + index,): value for index, value in enumerate(constants.values())},
            attrs={(index,): [["tt.divisibility", 16]] for index in range(len(ARGUMENTS))},
        )
        options = {"num_warps": 4, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        found = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*(?:::\w+)*[\w.]*)", ptx, re.MULTILINE)
        return Counter(found), ptx

    return compiled


def of_nf4(count: str) -> tuple:
    from lightning_lora.kernels import nf4_triton as kernels

    types = dict(zip(ARGUMENTS, ("*i32", "*u8", *["*fp32"] * 4, "*bf16", count), strict=True))
    steps = {"ITEMS": 32 * kernels.WARPS, "STEPS": kernels.TILE // (32 * kernels.WARPS * kernels.WORD)}
    return kernels._dequantize, types, BLOCKS | {"PER_ITEM": kernels.WORD} | steps


def of_normal_float(count: str, bits: int) -> tuple:
    from lightning_lora.kernels import normal_float_triton as kernels

    types = dict(zip((*ARGUMENTS, "size"), ("*u8", "*u8", *["*fp32"] * 4, "*bf16", count, count), strict=True))
    steps = {"ITEMS": 32 * kernels.WARPS, "STEPS": kernels.TILE // (32 * kernels.WARPS * kernels.GROUP)}
    return kernels._dequantize, types, BLOCKS | {"BITS": bits, "GROUP": kernels.GROUP} | steps


@pytest.mark.parametrize("count", ["i32", "i64"])  # up to 2 ** 31 elements, and more
@pytest.mark.parametrize("codebook", ["nf4", "nf3", "nf2"])
def test_a_compiled_thread_stores_16_bytes_at_once_and_rounds_as_the_reference_does(instructions, codebook, count):
    launched = of_nf4(count) if codebook == "nf4" else of_normal_float(count, int(codebook[-1]))
    found, ptx = instructions(*launched)
    stores = {name: times for name, times in found.items() if name.startswith(("st.global", "st.shared"))}
    assert stores == {"st.global.v4.b32": 4}  # nothing goes through shared memory first
    assert found["cvt.rn.bf16x2.f32"] == 4 * 8 / 2  # to the nearest, two at a time
    assert not [name for name in found if name.startswith("fma")]  # product and sum round each by themselves
    assert re.search(r"(mad\.wide|mul\.wide|shl\.b64|mul\.lo\.s64)", ptx)  # offsets in 64 bits


def test_the_kernels_levels_are_bitsandbytes():
    from bitsandbytes import functional as bnb

    from lightning_lora.kernels.nf4_triton import LEVELS

    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
