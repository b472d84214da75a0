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


def test_they_pass_under_tritons_interpreter():
    """Odd sizes, all dtypes and block sizes: bit-equal to bitsandbytes, and float64 but for the roundings there are."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_nf4.py")]
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
    """Compile the kernel for an H100 or H200 as it is launched for a double-quantized weight; count instructions."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process, and does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_lora.kernels import nf4_triton as kernels

    def compiled(out: str, count: str) -> tuple[Counter[str], str]:
        types = ("*i32", "*u8", *["*fp32"] * 4, out, count)
        constants = {"BLOCK": 64, "NESTED": True, "NESTED_BLOCK": 256, "PER_ITEM": kernels.WORD}
        constants |= {"ITEMS": 32 * kernels.WARPS, "STEPS": kernels.TILE // (32 * kernels.WARPS * kernels.WORD)}
        source = ASTSource(
            fn=kernels._dequantize,
            signature=dict(zip(ARGUMENTS, types, strict=True)) | dict.fromkeys(constants, "constexpr"),
            constexprs={(8 + index,): value for index, value in enumerate(constants.values())},
            attrs={(index,): [["tt.divisibility", 16]] for index in range(8)},
        )
        options = {"num_warps": kernels.WARPS, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        found = re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*(?:::\w+)*[\w.]*)", ptx, re.MULTILINE)
        return Counter(found), ptx

    return compiled


@pytest.mark.parametrize("count", ["i32", "i64"])  # up to 2 ** 31 elements, and more
def test_a_compiled_thread_stores_16_bytes_at_once_and_rounds_as_bitsandbytes_does(instructions, count):
    found, ptx = instructions("*bf16", count)
    stores = {name: times for name, times in found.items() if name.startswith(("st.global", "st.shared"))}
    assert stores == {"st.global.v4.b32": 4}  # nothing goes through shared memory first
    assert found["cvt.rn.bf16x2.f32"] == 4 * 8 / 2  # to the nearest, two at a time
    assert not [name for name in found if name.startswith("fma")]  # product and sum round each by themselves
    assert re.search(r"(mad\.wide|mul\.wide|shl\.b64|mul\.lo\.s64)", ptx)  # offsets in 64 bits


def test_the_kernels_levels_are_bitsandbytes():
    from bitsandbytes import functional as bnb

    from lightning_lora.kernels.nf4_triton import LEVELS

    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))
