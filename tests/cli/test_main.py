"""The command line: what it prints, writes and refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora import load_adapter
from lightning_lora.cli import main as cli
from lightning_lora.cli.demo import corpus, pretrain
from lightning_lora.cli.demo.model import ByteLM


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demo run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    code = cli.main(["demo", "--steps", "8", "--out", str(folder)])
    return code, folder


def test_demo_writes_adapter_merged_model_pictures_and_report(demo):
    code, folder = demo
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "memory.png",
        "merged",
        "report.json",
        "report.md",
    }


def test_demo_reports_nf4_the_paged_optimizer_and_an_exact_merge(demo):
    report = json.loads((demo[1] / "report.json").read_text())
    assert report["base_storage"] == "nf4/64 double-quantized"
    assert report["optimizer"]["name"] == "bitsandbytes.optim.PagedAdamW8bit"
    assert (
        report["base_bytes"] < 0.14 * report["base_bytes_float32"]
    )  # 4.127 of 32 bits is 0.129; small layers round up
    assert report["merged_vs_adapted"] <= 1e-5
    assert 0 < report["merged_bf16_vs_adapted"] <= 2e-3
    assert report["held_out_after"] < report["held_out_before"]


def test_demo_files_give_the_merged_model_again(demo):
    """The merged file adds the adapter to the NF4 base it was trained on, so the dense base gives nearly the same."""
    tokens = corpus.windows(corpus.english().held_out, 64, limit=4)[:, :-1]
    merged = ByteLM()
    merged.load_state_dict(load_file(demo[1] / "merged" / "model.safetensors"))
    adapted = load_adapter(pretrain.load_base(), demo[1])
    with torch.no_grad():
        difference = (merged(tokens) - adapted(tokens)).norm() / adapted(tokens).norm()
    assert 1e-6 < difference < 0.15  # the NF4 error of the weights is 0.09


def test_demo_adapts_to_a_text_of_the_users(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    assert (
        cli.main(["demo", "--steps", "4", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "notes.txt")]) == 0
    )
    assert "notes.txt" in capsys.readouterr().out


def test_demo_adapts_a_hugging_face_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "llama")
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    options = ["--model", str(tmp_path / "llama"), "--data", str(tmp_path / "notes.txt"), "--steps", "2"]
    assert cli.main(["demo", *options, "--out", str(tmp_path / "out")]) == 0
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    capsys.readouterr()


def test_doctor_says_what_works(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "NF4 base on cpu" in said
    assert "FAILED" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--data", "absent.txt"], "--data absent.txt: no such file"),
        (["demo", "--model", "./absent"], "--model ./absent"),
        (["demo", "--r", "200"], "r=200 is more than the full rank 128"),
    ],
)
def test_an_error_is_told_in_a_few_lines_and_a_code(tmp_path, capsys, arguments, said):
    assert cli.main([*arguments, *(["--out", str(tmp_path)] if arguments[0] == "demo" else [])]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 6


@pytest.mark.parametrize("arguments", [["demo", "--step", "3"], ["demo", "--steps", "0"], ["nonsense"], []])
def test_misspelt_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    capsys.readouterr()


def test_the_shipped_base_is_checked_before_it_is_used(tmp_path, monkeypatch):
    spoiled = tmp_path / "base.safetensors"
    weights = load_file(pretrain.BASE_PATH)
    weights["head.weight"][0, 0] += 1
    save_file(weights, spoiled)
    monkeypatch.setattr(pretrain, "BASE_PATH", spoiled)
    with pytest.raises(ValueError, match=r"has SHA-256 .* expected"):
        pretrain.load_base(spoiled)


def test_pretraining_makes_a_base_that_loads(tmp_path):
    pretrain.pretrain(tmp_path / "base.safetensors", steps=1)
    assert isinstance(pretrain.load_base(tmp_path / "base.safetensors"), ByteLM)


def test_held_out_english_is_never_trained_on():
    split = corpus.english()
    train, held = (bytes(part.tolist()).decode() for part in (split.train, split.held_out))
    paragraphs = [p for p in held.split("\n\n") if len(p) > 100]
    assert len(paragraphs) > 50
    assert not [p for p in paragraphs if p in train]


@pytest.mark.parametrize(("text", "said"), [("", "the file is empty"), ("hello", "takes 257. Pass a longer --data")])
def test_a_text_too_short_to_train_on_is_refused(tmp_path, capsys, text, said):
    (tmp_path / "text.txt").write_text(text)
    assert cli.main(["demo", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
