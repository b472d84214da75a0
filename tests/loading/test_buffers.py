"""Buffers that are in no file have the values the model's code gives them, or the model is not loaded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoadError, load_base, parameters_on_meta
from tests.loading.folders import untouched, written


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", self._computed(), persistent=False)

    def _computed(self) -> Tensor:
        return 1 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)


class ResettingRotary(Rotary):
    def reset_parameters(self) -> None:
        self.inv_freq.copy_(self._computed())


class DrawnRotary(Rotary):
    def reset_parameters(self) -> None:
        self.inv_freq.normal_()


class IdleRotary(Rotary):
    def reset_parameters(self) -> None:
        self.inv_freq[1:] = 2


class BrokenRotary(Rotary):
    def reset_parameters(self) -> None:
        raise RuntimeError("not like this")


class Model(nn.Module):
    def __init__(self, rotary: type[Rotary]) -> None:
        super().__init__()
        self.rotary = rotary()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)


class InitializingModel(Model):
    """As those of transformers: the model writes the tensors of the modules in it."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Rotary):
            module.inv_freq = module._computed()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


def on_meta(kind: type[Model], rotary: type[Rotary]) -> Model:
    with torch.device("meta"):
        return kind(rotary)


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path, Model(Rotary).state_dict())


@pytest.mark.parametrize(("kind", "rotary"), [(Model, ResettingRotary), (InitializingModel, Rotary)])
def test_a_buffer_is_computed_again_by_the_code_of_the_model(kind, rotary, folder):
    before = torch.get_rng_state()
    found = load_base(on_meta(kind, rotary), folder)
    assert torch.equal(found.rotary.inv_freq, Rotary().inv_freq)
    assert "rotary.inv_freq" not in found.state_dict()
    assert torch.equal(found.norm.running_var, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rotary", [Rotary, DrawnRotary, IdleRotary, BrokenRotary])
def test_a_buffer_that_is_not_or_not_wholly_computed_is_refused_by_name(rotary, folder):
    model = on_meta(Model, rotary)
    with pytest.raises(
        LoadError, match=r"rotary.inv_freq is a buffer .* nothing computes it again.*parameters_on_meta"
    ):
        load_base(model, folder)
    assert untouched(model)
    assert model.rotary.inv_freq.is_meta


@pytest.mark.parametrize("rotary", [Rotary, DrawnRotary, IdleRotary, BrokenRotary])
def test_with_parameters_alone_on_the_meta_device_no_buffer_is_lost(rotary, folder):
    with parameters_on_meta():
        model = Model(rotary)
    assert torch.equal(load_base(model, folder).rotary.inv_freq, Rotary().inv_freq)


def test_a_buffer_that_the_files_hold_is_taken_from_there(tmp_path):
    given = torch.tensor([4.0, 3.0, 2.0, 1.0])
    folder = written(tmp_path, Model(Rotary).state_dict() | {"rotary.inv_freq": given})
    assert torch.equal(load_base(on_meta(Model, Rotary), folder).rotary.inv_freq, given)


def test_a_dtype_leaves_what_was_computed_as_it_is(folder):
    found = load_base(on_meta(Model, ResettingRotary), folder, dtype=torch.bfloat16)
    assert found.rotary.inv_freq.dtype is torch.float32
    assert found.out.weight.dtype is torch.bfloat16


def test_buffers_inside_a_module_that_is_taken_apart_are_computed_too(tmp_path):
    class Experts(ResettingRotary):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(2, 4, 4))

        def forward(self) -> Tensor:
            return self.up.sum() * self.inv_freq

    folder = written(tmp_path, {"0.up": torch.ones(2, 4, 4)})
    with torch.device("meta"):
        model = nn.Sequential(Experts())
    found = load_base(model, folder, targets="0.up")
    assert torch.allclose(found[0](), 32 * Rotary().inv_freq)


def test_a_tensor_that_is_no_buffer_is_refused_by_name(folder):
    model = on_meta(Model, ResettingRotary)
    model.norm.scale = torch.ones(2, device="meta")
    with pytest.raises(LoadError, match=r"norm.scale is a tensor on the meta device .* no buffer"):
        load_base(model, folder)
