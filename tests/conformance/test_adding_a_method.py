"""The method that the documentation adds works with everything, and nothing in the package knows of it."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import AdapterError, LoRAConfig, TargetError, activate, inject, merge, quantize, summary
from tests.conformance.combinations import KINDS
from tests.conftest import randomize, relative_difference

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def scale() -> types.ModuleType:
    """The page's code as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    module = types.ModuleType("documented_scale")
    sys.modules[module.__name__] = module
    exec(compile(code, str(PAGE), "exec"), vars(module))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_it_adapts_every_kind_of_layer_that_is_called_and_merges(scale, kind):
    sample = KINDS[kind]
    model, x = nn.Sequential(sample.build().double()), sample.x
    if "experts" in kind:
        with pytest.raises(TargetError, match=r"0\.up: experts can be adapted with LoRA only, not with scale"):
            inject(model, sample.paths, scale.ScaleConfig())
        return
    before = model(x)
    inject(model, sample.paths, scale.ScaleConfig())
    assert relative_difference(model(x), before) <= 1e-12  # attention computes in another order
    randomize(model, std=0.5)
    adapted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    assert summary(model).layers[0].method == "scale"
    assert relative_difference(merge(model)(x), adapted) <= 1e-12


def test_it_trains_over_a_quantized_base_and_is_refused_beside_another(scale):
    model = quantize(inject(nn.Sequential(nn.Linear(64, 32)), "0", scale.ScaleConfig()))
    model(torch.randn(3, 64)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.adapters.default.gain"}
    inject(model, "0", LoRAConfig(r=2), name="second")
    with pytest.raises(AdapterError, match="'default' is scale"):
        activate(model, "default", "second")
