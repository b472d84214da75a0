"""The public names are a promise, and importing them costs and needs little."""

import ast
import subprocess
import sys

import lightning_lora

NAMES = {
    "AdapterError",
    "CheckpointError",
    "GradientError",
    "LoRACallback",
    "LoRAConfig",
    "LoRADDPStrategy",
    "LoRAError",
    "LoRAStrategy",
    "MergeError",
    "NF4Config",
    "OptimizerError",
    "QuantizationError",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state_dict",
    "combine",
    "delete_adapter",
    "disabled",
    "inject",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "quantize",
    "routed",
    "save_adapter",
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


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_promised_name_is_there_and_no_other():
    assert set(lightning_lora.__all__) == NAMES
    assert all(hasattr(lightning_lora, name) for name in NAMES)


def test_import_loads_neither_bitsandbytes_nor_transformers_nor_matplotlib():
    """Beyond what Lightning loads itself: its torchmetrics imports some of them wherever they are installed."""
    added = python(
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_lora\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert not {"bitsandbytes", "transformers", "matplotlib", "peft", "rich"} & set(ast.literal_eval(added))


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
