"""What the README's comparison says of others, tried on them.

They are PEFT put into a LightningModule by hand, PEFT in the Hugging Face Trainer, and Lightning's own plugin for
bitsandbytes. A version of theirs that does better fails here, and changes the table.
"""

import os
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_lora as ll
from tests.conftest import Net
from tests.io.test_peft_interop import in_4bit

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # PEFT and transformers
TARGETS = ["q_proj", "up_proj"]
TOKENS = torch.arange(32).reshape(4, 8) % 16


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def trained(model: nn.Module, size: float = 0.01) -> nn.Module:
    """Give the second factors values, as some training would: updates are a small share of the weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return model


def apart(model: nn.Module, outputs: torch.Tensor) -> float:
    return ((model(TOKENS) - outputs).norm() / outputs.norm()).item()


@torch.no_grad()
def test_over_4_bits_peft_merges_into_4_bits_again_and_we_into_what_was_trained():
    theirs = trained(peft.get_peft_model(in_4bit(net(), TARGETS), peft.LoraConfig(r=4, target_modules=TARGETS)))
    ours = trained(ll.quantize(ll.inject(net(), TARGETS, ll.LoRAConfig(r=4, alpha=8))))
    said = [theirs(TOKENS), ours(TOKENS)]
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit linear may get different generations"):
        theirs = theirs.merge_and_unload()
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False  # as in the layers that were merged: the weight, not its packing
    assert apart(theirs, said[0]) > 1e-2
    assert apart(ll.merge(ours), said[1]) < 1e-5  # float32, another order of summation


def test_peft_loads_an_adapter_on_another_base_without_a_word_and_we_refuse(tmp_path):
    model = ll.inject(net(seed=0), TARGETS, ll.LoRAConfig(r=4))
    ll.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftModel.from_pretrained(net(seed=1), str(tmp_path))
    with pytest.raises(ll.AdapterError, match=r"another one in blocks\.0\.q_proj"):
        ll.load_adapter(net(seed=1), tmp_path)


def test_peft_takes_numbers_that_are_not_finite_without_a_word_and_we_refuse(tmp_path):
    peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).merge_and_unload()
    assert any(weight.isnan().any() for weight in theirs.state_dict().values())
    with pytest.raises(ll.AdapterError, match="NaN or infinity"):
        ll.load_adapter(net(), tmp_path)


def test_peft_passes_over_a_target_that_matches_nothing_beside_one_that_does_and_we_refuse():
    typed = ["q_proj", "up_prj"]
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=typed))
    assert theirs.targeted_module_names == ["blocks.0.q_proj", "blocks.1.q_proj"]
    with pytest.raises(ll.TargetError, match="up_proj"):
        ll.inject(net(), typed)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_in_the_weight_change_the_base_of_peft_and_not_ours(init):
    before = net().blocks[0]["q_proj"].weight.clone()
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=init))
    ours = ll.inject(net(), TARGETS, ll.LoRAConfig(r=4, init=init))
    assert not torch.allclose(theirs.base_model.model.blocks[0]["q_proj"].base_layer.weight, before, rtol=0.1)
    assert torch.equal(ours.blocks[0]["q_proj"].base_layer.weight, before)


def test_peft_routes_the_rows_of_a_batch_in_evaluation_alone_and_we_in_training_too():
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules=TARGETS), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(r=4, target_modules=TARGETS))
    theirs.eval()(TOKENS, adapter_names=["one", "two", "one", "__base__"])
    with pytest.raises(ValueError, match="training mode"):
        theirs.train()(TOKENS, adapter_names=["one", "two", "one", "__base__"])
    ours = net()
    for name in ("one", "two"):
        ll.inject(ours, TARGETS, ll.LoRAConfig(r=4), name=name)
    ll.activate(ours, "one", "two")
    with ll.routed(ours.train(), ["one", "two", "one", None]):
        ours(TOKENS).square().sum().backward()
    assert ours.blocks[0]["q_proj"].adapters["two"].lora_B.grad.abs().sum() > 0


class Module(LightningModule):
    """A user's module around any model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fine_tune(by_hand: bool, folder: Path, **fit: object) -> LightningModule:
    """Two epochs with dropout and shuffling, by PEFT put in by hand or by the callback; a checkpoint after each."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.3}
    lora = ll.LoRACallback(TARGETS, r=4, alpha=8, dropout=0.3, quantization=None, optimizer=None, merge=False)
    torch.manual_seed(0)
    module = Module(peft.get_peft_model(Net(), peft.LoraConfig(**settings)) if by_hand else Net())
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), *([] if by_hand else [lora])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TOKENS.repeat(4, 1), batch_size=4, shuffle=True), **fit)
    return module


@pytest.mark.parametrize("by_hand", [True, False])
def test_by_hand_a_checkpoint_of_lightning_holds_the_base_and_ours_does_not(by_hand, tmp_path):
    module = fine_tune(by_hand, tmp_path)
    kept = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in kept) == (not by_hand)
    assert (kept.keys() == module.state_dict().keys()) == by_hand


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("by_hand", [True, False])
def test_by_hand_a_resumed_run_is_another_one_and_ours_is_the_same(by_hand, tmp_path):
    straight = fine_tune(by_hand, tmp_path)
    again = fine_tune(by_hand, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")
    pairs = zip(straight.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == (not by_hand)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("by_hand", [True, False])
def test_lightning_resumes_no_checkpoint_without_the_optimizers_state(by_hand, tmp_path):
    fine_tune(by_hand, tmp_path)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "epoch=0.ckpt")
    with pytest.raises((KeyError, ll.CheckpointError), match="optimizer"):
        fine_tune(by_hand, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")


class Rows(Dataset):
    """Twelve rows of tokens for the Hugging Face Trainer."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(8) * (index + 1)) % 32
        return {"input_ids": tokens, "labels": tokens}


def hugging_face(folder: Path) -> transformers.Trainer:
    """PEFT in the Hugging Face Trainer: dropout, shuffling, a schedule; a checkpoint at step 3 of 6."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    return transformers.Trainer(model, arguments, train_dataset=Rows())


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A run that went through: its folder, and the adapter it ended with."""
    folder = tmp_path_factory.mktemp("trainer")
    run = hugging_face(folder)
    run.train()
    return folder, peft.get_peft_model_state_dict(run.model)


def resumed(folder: Path, before: Path) -> dict[str, torch.Tensor]:
    run = hugging_face(folder)
    run.train(resume_from_checkpoint=str(before))
    return peft.get_peft_model_state_dict(run.model)


def test_the_hugging_face_trainer_saves_the_adapter_and_what_resuming_takes(a_run):
    names = {path.name for path in (a_run[0] / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert "model.safetensors" not in names


def test_the_hugging_face_trainer_resumes_bit_for_bit(a_run, tmp_path):
    folder, ended = a_run
    again = resumed(tmp_path, folder / "checkpoint-3")
    assert all(torch.equal(again[name], ended[name]) for name in ended)


def test_the_hugging_face_trainer_resumes_without_the_optimizers_state_and_does_not_say_so(a_run, tmp_path, caplog):
    folder, ended = a_run
    checkpoint = shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    os.remove(checkpoint / "optimizer.pt")
    with warnings.catch_warnings(record=True) as said, caplog.at_level("WARNING"):
        again = resumed(tmp_path, checkpoint)
    words = [str(warning.message) for warning in said] + [record.message for record in caplog.records]
    assert not any("optimizer" in sentence.lower() for sentence in words)
    assert not all(torch.equal(again[name], ended[name]) for name in ended)


def test_the_plugin_of_lightning_wants_cuda():
    with pytest.raises(RuntimeError, match="CUDA"):
        Trainer(accelerator="cpu", plugins=BitsandbytesPrecision("nf4"), logger=False, max_steps=1).fit(
            Module(net()), DataLoader(TOKENS, batch_size=4)
        )


def test_peft_has_methods_and_bases_that_we_do_not():
    assert len(peft.PeftType) > 30
    assert {"ADALORA", "IA3", "PROMPT_TUNING", "OFT", "LOKR"} <= {kind.name for kind in peft.PeftType}
    bases = ("gptq", "awq", "hqq", "aqlm", "eetq", "torchao")
    assert all((Path(peft.__file__).parent / "tuners" / "lora" / f"{base}.py").exists() for base in bases)
    with pytest.raises(ValueError, match="gptq"):
        ll.LoRACallback(quantization="gptq")


def test_the_hugging_face_trainer_takes_deepspeed_and_fsdp_settings():
    fields = transformers.TrainingArguments.__dataclass_fields__
    assert {"deepspeed", "fsdp", "fsdp_config"} <= set(fields)
