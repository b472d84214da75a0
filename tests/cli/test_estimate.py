"""``lightning-lora estimate`` from a config alone."""

import json

import pytest

from lightning_lora.cli.main import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    ).save_pretrained(folder)
    return folder / "config.json"


def test_a_config_is_estimated_without_weights(config, capsys):
    assert main(["estimate", "--model", str(config), "--method", "lora", "--r", "4", "--seq", "64", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["trainable"] == 2 * 4 * (4 * 2 * 64 + 3 * (64 + 176))
    assert found["total"] == sum(found["parts"].values())


def test_methods_stand_side_by_side_and_what_fits_is_said(config, capsys, tmp_path):
    given = ["estimate", "--model", str(config.parent), "--r", "4", "--seq", "64", "--gpu", "2MB"]
    assert main([*given, "--method", "lora", "--method", "galore", "--out", str(tmp_path / "memory.png")]) == 0
    shown = capsys.readouterr().out
    assert "lora: fits 2MB" in shown
    assert "galore: fits 2MB" in shown
    assert (tmp_path / "memory.png").is_file()


def test_nothing_fits_is_told_by_the_exit_code(config, capsys):
    assert main(["estimate", "--model", str(config), "--r", "4", "--seq", "64", "--gpu", "1KB"]) == 1
    assert "nothing that could be switched on makes it fit 1KB" in capsys.readouterr().out


def test_a_module_by_its_path_is_estimated(capsys):
    assert main(["estimate", "--model", "tests.estimation.test_estimate:Language", "--r", "4", "--seq", "64"]) == 0
    assert "activations" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["no/such/folder", "json.nothing", "nowhere"])
def test_what_is_no_model_is_refused_without_a_look_at_a_hub(given, capsys):
    assert main(["estimate", "--model", given]) == 1
    assert "Nothing is looked up on a hub" in capsys.readouterr().err
