"""The comparison with the peers runs, that on a GPU at the sizes of a toy, and times nobody who computes otherwise."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

RUN = """
import json, sys
import torch
import compare
from lightning_lora import LoRAConfig, inject
from peers import steps
from peers.by_peft import Peft
from peers.contender import Setting
from peers.decoder import Decoder
from peers.machine import Rehearsal
from peers.ours import Ours
from peers.scenario import TOY, Scenario

folder = sys.argv[1]
compare.main(["--rehearse", "--repeats=1", f"--json={folder}/cpu.json", "--only", "ViT*bf16"])
compare.main(
    ["--device=cuda", "--rehearse", "--repeats=1", f"--json={folder}/cuda.json", f"--markdown={folder}/cuda.md"]
    + ["--only", "decoder*8 tokens, nf4", "decoder*16 tokens, nf4, check*", "in place*nf4", "from the host*"]
)


class Wrong(Ours):
    name = "twice the scale"

    def inject(self, model, workload, setting, device):
        return inject(model, list(workload.targets), LoRAConfig(r=setting.r, alpha=2 * setting.alpha))


workload = Decoder(TOY, 1, 8)
model = workload.build(torch.device("cpu")).requires_grad_(False)
found = steps.measure(Scenario(workload, Setting("bf16"), (Peft(), Wrong(), Ours())), model, Rehearsal(), 1)
print(json.dumps({name: sorted(outcome) for name, outcome in found.items()}))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Where the figures are, and the last line that was printed."""
    folder = tmp_path_factory.mktemp("compare")
    path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_contender_is_measured_or_skipped_with_its_reason(ran, device):
    steps = json.loads((ran[0] / f"{device}.json").read_text())["steps"]
    names = {name for table in steps.values() for name in table["outcomes"]}
    assert {"ours", "PEFT default", "PEFT bf16 adapters", "torchtune layers", "frozen floor"} <= names
    if device == "cuda":
        assert {"PEFT compiled", "ours compiled", "ours, CUDA graph", "ours, chunked loss"} <= names
    for table in steps.values():
        for name, outcome in table["outcomes"].items():
            if name == "torchtune layers" and "skipped" in outcome:
                continue
            assert len(outcome["step"]) == 1
            assert outcome["peak"] > outcome["weights"] > 0
            assert outcome["saved"] > 0
            if name != "frozen floor":
                assert all(math.isfinite(outcome[what]) for what in ("loss off", "norm off"))
                assert len(outcome["8-bit"]) == len(outcome["fused"]) == 1


def test_the_page_names_every_claim_and_every_table(ran):
    page = (ran[0] / "cuda.md").read_text()
    for told in ("QLoRA, eager: ours / frozen floor", "merging NF4 into bf16", "## decoder", "## in place", "## from"):
        assert told in page


def test_what_computes_something_else_is_not_timed(ran):
    assert "failed" in ran[1]["twice the scale"]
    assert "step" not in ran[1]["twice the scale"]
    assert "step" in ran[1]["ours"]
