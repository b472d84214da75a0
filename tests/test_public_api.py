"""The public names are a promise, and importing them costs and needs little."""

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import lightning_lora

NAMES = {
    "AdapterError",
    "AdapterMonitor",
    "BAdam",
    "CheckpointError",
    "DoRAConfig",
    "FP4Config",
    "GaLore",
    "GradientError",
    "Int8Config",
    "LoRACLI",
    "LoRACallback",
    "LoRAConfig",
    "LoRADDPStrategy",
    "LoRAError",
    "LoRAFAConfig",
    "LoRAStrategy",
    "LoadError",
    "MergeError",
    "NF2Config",
    "NF3Config",
    "NF4Config",
    "OptimizerError",
    "QuantizationError",
    "Setup",
    "TargetError",
    "UnsupportedError",
    "VeRAConfig",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state_dict",
    "chunked_cross_entropy",
    "combine",
    "delete_adapter",
    "disabled",
    "estimate",
    "export_merged",
    "initialize_eva",
    "inject",
    "load_adapter",
    "load_adapters",
    "load_base",
    "load_from_checkpoint",
    "load_quantized",
    "merge",
    "param_groups",
    "parameters_on_meta",
    "pull_adapter",
    "push_adapter",
    "quantize",
    "routed",
    "save_adapter",
    "save_adapters",
    "save_quantized",
    "summary",
}

HIDE = """
import sys, importlib.abc
import lightning.pytorch  # its torchmetrics insists on what is installed
OPTIONAL = {"bitsandbytes", "transformers", "matplotlib", "peft", "rich"}
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)
sys.meta_path.insert(0, Hidden())
for name in [name for name in sys.modules if name.partition(".")[0] in OPTIONAL]:
    del sys.modules[name]
"""


def python(code: str, *options: str, **environment: str) -> str:
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_promised_name_is_there_and_no_other():
    assert set(lightning_lora.__all__) == NAMES
    assert all(hasattr(lightning_lora, name) for name in NAMES)


def test_import_loads_neither_bitsandbytes_nor_transformers_nor_matplotlib_nor_jsonargparse():
    """Beyond what Lightning loads itself: its torchmetrics imports some of them wherever they are installed."""
    added = python(
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_lora\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not {"bitsandbytes", "transformers", "matplotlib", "peft", "rich", "jsonargparse"} & set(
        ast.literal_eval(added)
    )


def test_plain_lora_on_a_hand_written_module_needs_none_of_the_optional_packages():
    code = (
        HIDE
        + """
import torch
from torch import nn
import lightning_lora as ll
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
ll.inject(model, config=ll.LoRAConfig(r=2))
optimizer = torch.optim.SGD(ll.adapter_parameters(model), lr=0.1)
x = torch.randn(4, 8)
before = model(x).square().mean()
before.backward()
optimizer.step()
after = model(x)
assert torch.allclose(ll.merge(model)(x), after, atol=1e-6)
try:
    ll.quantize(ll.inject(model, config=ll.LoRAConfig(r=2)))
except ll.UnsupportedError as error:
    print(error)
"""
    )
    said = python(code)
    assert "quantization='nf4' needs bitsandbytes" in said
    assert "pip install" in said


def test_without_jsonargparse_only_runs_from_yaml_are_missing(tmp_path):
    """It is really absent: the environment's packages but for it, where Lightning looks for files and versions."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("jsonargparse"):
            (packages / entry.name).symlink_to(entry)
    said = python(
        """
from lightning_lora import *
from lightning_lora.cli.main import main
import sys
try:
    LoRACLI(args=["fit"])
except UnsupportedError as error:
    print(error)
sys.stderr = sys.stdout
print(main(["fit", "--config", "run.yaml"]))
""",
        "-S",
        PYTHONPATH=f"{Path(__file__).parents[1]}{os.pathsep}{packages}",
    )
    told, again, hint, code = said.splitlines()
    assert told == 'a run from YAML needs jsonargparse: pip install "lightning-lora[cli]"'
    assert again == f"lightning-lora fit: {told}"
    assert hint == "(--debug shows where)"
    assert code == "1"
