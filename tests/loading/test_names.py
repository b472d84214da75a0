"""Every tensor of the files has its place in the model and the other way round, or nothing is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import LoadError, load_base, parameters_on_meta
from tests.conftest import Net
from tests.loading.folders import untouched, written


class Shell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(width=8, depth=1)


def hollow(kind=Net) -> nn.Module:
    with parameters_on_meta():
        return kind() if kind is Shell else kind(width=8, depth=1)


def dense(model: nn.Module, path, **settings) -> nn.Module:
    return load_base(model, path, quantization=None, **settings)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return Net(width=8, depth=1).state_dict()


def test_a_prefix_that_all_names_have_too_much_is_taken_off_and_said(state, tmp_path, caplog):
    folder = written(tmp_path, {f"model.net.{name}": value for name, value in state.items()})
    assert torch.equal(dense(hollow(), folder).head.weight, state["head.weight"])
    assert "'model.net.' is taken off every name" in caplog.text


def test_a_prefix_that_all_names_lack_is_put_before_them_and_said(state, tmp_path, caplog):
    folder = written(tmp_path, state)
    assert torch.equal(dense(hollow(Shell), folder).net.head.weight, state["head.weight"])
    assert "'net.' is put before every name" in caplog.text


def test_names_that_fit_are_taken_as_they_are(state, tmp_path, caplog):
    dense(hollow(), written(tmp_path, state))
    assert caplog.text == ""


@pytest.mark.parametrize("shell", [False, True])
def test_a_prefix_is_no_way_around_missing_and_unknown_names(shell, state, tmp_path):
    state["blocks.0.k_proj.weight"] = state.pop("head.weight")
    prefix = "model." if shell else ""
    model = hollow()
    with pytest.raises(LoadError) as error:
        dense(model, written(tmp_path, {prefix + name: value for name, value in state.items()}))
    assert "does not fit Net: it lacks " in str(error.value)
    assert f"the model has no {prefix}" in str(error.value)
    assert shell or "lacks head.weight; the model has no blocks.0.k_proj.weight. Load the part" in str(error.value)
    assert untouched(model)


def test_several_prefixes_that_fit_are_refused():
    """Files without a tensor that would tell: here the prefix could be either."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Module()
            self.a.x = nn.Module()
            self.a.x.weight = nn.Parameter(torch.ones(2))

    from lightning_lora.loading.names import match, places

    model = Two()
    with pytest.raises(LoadError, match=r"fit in several ways: 'a.x.' is put before .*, 'b.x.' is put"):
        match(model, places(model), {"weight": torch.ones(2)}, None, "files")


def test_beginnings_of_names_are_replaced_the_longest_first(state, tmp_path):
    old = {name.replace("blocks.", "h.").replace("downs.0", "h.out"): value for name, value in state.items()}
    old["h.0.mask"] = torch.ones(3)
    found = dense(hollow(), written(tmp_path, old), rename={"h.": "blocks.", "h.out": "downs.0", "h.0.mask": None})
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


def test_a_function_may_rename_too_and_leave_out(state, tmp_path):
    old = {f"{name}_orig": value for name, value in state.items()} | {"rotary.inv_freq": torch.ones(2)}
    rename = {f"{name}_orig": name for name in state}.get
    found = dense(hollow(), written(tmp_path, old), rename=rename)
    assert torch.equal(found.norm.bias, state["norm.bias"])


def test_renames_that_do_nothing_or_too_much_are_refused(state, tmp_path):
    folder = written(tmp_path, state)
    with pytest.raises(ValueError, match=r"no name in the files begins with 'lm_head'; the names there are .* and"):
        dense(hollow(), folder, rename={"lm_head": "head"})
    with pytest.raises(ValueError, match=r"rename makes 'head.weight' of both"):
        dense(hollow(), folder, rename={"norm.weight": "head.weight"})


def test_tensors_of_other_shapes_or_kinds_are_refused_with_both(state, tmp_path):
    state["head.weight"] = state["head.weight"].t().contiguous()[:, :3].contiguous()
    state["norm.bias"] = state["norm.bias"].to(torch.int8)
    model = hollow()
    with pytest.raises(
        LoadError, match=r"head.weight is \(8, 3\) there and \(8, 8\) in the model, norm.bias is torch.int8"
    ):
        dense(model, written(tmp_path, state))
    assert untouched(model)


def test_a_state_that_is_no_tensor_is_refused(state, tmp_path):
    class Counting(Net):
        def get_extra_state(self) -> dict:
            return {"seen": 3}

        def set_extra_state(self, state: dict) -> None:
            pass

    with pytest.raises(LoadError, match="_extra_state is a state that is no tensor"):
        dense(hollow(Counting), written(tmp_path, state))


def test_a_compiled_part_is_loaded_by_its_own_names(state, tmp_path):
    model = hollow()
    model.head = torch.compile(model.head, backend="eager")
    assert torch.equal(dense(model, written(tmp_path, state)).head._orig_mod.weight, state["head.weight"])
