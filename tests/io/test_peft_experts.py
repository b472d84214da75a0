"""Adapters on stacked weights of experts, to and from PEFT's ``target_parameters``."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import AdapterError, LoRAConfig, activate, inject, load_adapter, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.model.layers import adapted_layers
from tests.conftest import randomize
from tests.nn.test_experts import MODELS, TARGETS, Products, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    # PEFT looks for these among modules alone when it warns, but among parameters too when it applies them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module"),
]


@pytest.fixture(params=["mixtral", "qwen3", "gpt-oss"])
def base(request):
    """Make the same model each time."""

    def make():
        torch.manual_seed(0)
        model = MODELS[request.param]().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


CASES = {
    "experts": (TARGETS, LoRAConfig(r=3, alpha=5)),
    "one stack of one layer": (["1.mlp.experts.down_proj"], LoRAConfig(r=2)),
    "attention too, ranks of their own": (
        {"q_proj": LoRAConfig(r=4), TARGETS[0]: LoRAConfig(r=2), "0.mlp.experts.down_proj": LoRAConfig(r=5, alpha=3)},
        LoRAConfig(),
    ),
}


def close(one, other) -> bool:
    return torch.allclose(logits(one.eval()), logits(other.eval()), atol=2e-5)  # fp32, another order of summation


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peft_reads_ours_and_computes_the_same(base, case, tmp_path):
    ours = randomize(inject(base(), *case), std=0.2)
    save_adapter(ours, tmp_path)
    assert not close(ours, base())
    assert close(peft.PeftModel.from_pretrained(base(), tmp_path), ours)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_was_saved_is_what_is_loaded(case, tmp_path):
    def make():
        torch.manual_seed(0)
        return MODELS["qwen3"]()

    ours = randomize(inject(make(), *case), std=0.2)
    save_adapter(ours, tmp_path / "a")
    loaded = load_adapter(make(), tmp_path / "a")
    assert torch.equal(logits(loaded.eval()), logits(ours.eval()))
    save_adapter(loaded, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"]], ids=str)
def test_we_read_peft_and_compute_the_same(base, modules, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules, target_parameters=TARGETS)
    theirs = randomize(peft.get_peft_model(base(), config), std=0.2)
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert len(adapted_layers(loaded)) == 2 * (2 + len(modules))
    assert not close(loaded, base())
    assert close(loaded, theirs)


@pytest.mark.parametrize("there", [False, True], ids=["plain", "with an adapter on the experts"])
@pytest.mark.parametrize("by_peft", [False, True])
def test_a_linear_layer_called_as_a_stack_is_not_taken_for_it(there, by_peft, tmp_path):
    """Qwen2-MoE has a ``down_proj`` in its experts and another in the one that all tokens share."""

    def make():
        torch.manual_seed(0)
        return MODELS["qwen2"]().eval()

    config = LoRAConfig(r=2, alpha=5)
    ours = inject(make(), "shared_expert.down_proj", config)
    if by_peft:
        theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["down_proj"]))
        randomize(theirs, std=0.2).save_pretrained(tmp_path)
    else:
        save_adapter(randomize(ours, std=0.2), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]
    model = inject(make(), TARGETS, config, name="other") if there else make()
    loaded = activate(load_adapter(model, tmp_path), "default")
    assert close(loaded, theirs if by_peft else ours)
    assert not close(loaded, make())


A = "base_model.model.mix.lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"target_parameters": ["mix.down"]}, None, "names mix.down, and no stack of experts here is called so"),
        ({"target_parameters": "mix.up"}, None, "expected a list of names"),
        ({}, {A: lambda t: t[:-1]}, r"shapes \(7, 16\) and \(12, 8\), which are not those of 4 experts"),
        ({}, {A: lambda t: t[:4]}, r"mix.up.lora_A has shape \(4, 1, 16\), expected \(4, 2, 16\)"),
        ({}, {A: None}, "mix.lora_A.weight is missing"),
        ({"target_parameters": None}, None, "mix is a Mix in this model|does not name: mix"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_and_changes_nothing(settings, tensors, said, tmp_path):
    save_adapter(inject(Products(), "mix.up", LoRAConfig(r=2)), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if tensors:
        held = load_file(weights)
        changed = {key: change and change(held.pop(key)) for key, change in tensors.items()}
        held = {key: t for key, t in held.items() if key not in changed}
        save_file(held | {key: t.contiguous() for key, t in changed.items() if t is not None}, weights)
    model = Products()
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, tmp_path)
    assert not adapted_layers(model)


def test_biases_of_adapted_layers_stand_beside_experts_in_one_file(tmp_path):
    def make():
        torch.manual_seed(0)
        return randomize(MODELS["gpt-oss"]().eval(), std=0.1)

    targets = [*TARGETS, "q_proj"]
    ours = randomize(inject(make(), targets, LoRAConfig(r=2), train_bias="adapted"), std=0.2)
    save_adapter(ours, tmp_path)
    loaded = load_adapter(make(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(ours.eval()))
    trained = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (ours, loaded)]
    assert trained[0] == trained[1]
    assert any(name.endswith("q_proj.base_layer.bias") for name in trained[0])
    assert close(peft.PeftModel.from_pretrained(make(), tmp_path), ours)


@pytest.mark.parametrize(
    ("changes", "said"), [({"use_dora": True}, "experts"), ({"peft_type": "VERA"}, "VeRA has not")]
)
def test_other_methods_on_experts_are_refused_by_name(changes, said, tmp_path):
    torch.manual_seed(0)
    save_adapter(inject(MODELS["mixtral"](), TARGETS, LoRAConfig(r=2)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # without our header, which would disagree
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=said):
        load_adapter(MODELS["mixtral"](), tmp_path)


@pytest.mark.parametrize("command", ["inspect", "verify", "convert", "merge"])
def test_files_alone_do_not_say_what_experts_there_are(command, tmp_path, capsys):
    adapter, model = tmp_path / "adapter", MODELS["mixtral"]()
    model.save_pretrained(tmp_path / "base")
    save_adapter(inject(model, TARGETS, LoRAConfig(r=2)), adapter)
    arguments = {
        "convert": [adapter, "--out", tmp_path / "x.ckpt"],
        "merge": ["--base", tmp_path / "base", "--adapter", adapter, "--out", tmp_path / "out"],
    }.get(command, [adapter])
    assert main([command, *map(str, arguments)]) == 1
    assert f"{adapter}: it holds adapters on stacks of experts (target_parameters)" in capsys.readouterr().err
