"""``lightning-lora plot``: what is drawn is what was logged and saved, and the files say it in words."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lora import AdapterMonitor, LoRACallback, LoRAConfig, inject, save_adapter
from lightning_lora.cli.main import main
from lightning_lora.cli.plot import curves, memory, norms, similarity, spectra, style
from lightning_lora.cli.plot.adapters import read_adapter
from lightning_lora.cli.plot.runs import Curve, labels, read_run
from lightning_lora.errors import AdapterError, LoRAError
from lightning_lora.metrics.effective_rank import effective_rank
from lightning_lora.metrics.subspace_similarity import subspace_similarity
from lightning_lora.metrics.updates import dense_update
from lightning_lora.model.layers import adapted_layers
from tests.conftest import randomize
from tests.runs import Module, loader

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two monitored runs, of ranks 2 and 4: folders with adapter, logs and a checkpoint, and the trained modules."""
    made = {}
    for r in (2, 4):
        folder = tmp_path_factory.mktemp(f"r{r}")
        made[folder] = train(folder, r, AdapterMonitor(2, detail="layers"), output_dir=folder)
    return made


def train(folder: Path, r: int, *callbacks, **settings) -> Module:
    """Train the toy module and leave adapter, logs and a checkpoint."""
    seed_everything(0, verbose=False)
    module = Module()
    lora = LoRACallback(**{"r": r, "quantization": None, "optimizer": None, "merge": False, **settings})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[lora, ModelCheckpoint(folder, filename="last"), *callbacks],
        logger=CSVLogger(folder, name="", version="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    trainer.fit(module, loader())
    return module


def words(svg: Path) -> str:
    """All that is written in a picture."""
    root = ElementTree.parse(svg).getroot()
    return " | ".join("".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text"))


def draw(capsys, tmp_path, *arguments: str) -> str:
    """Run the command, look at both files, and return what the SVG says."""
    code = main(["plot", *map(str, arguments), "--out", str(tmp_path / "picture")])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "picture.png" in said.out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    return words(tmp_path / "picture.svg")


def logged(folder: Path, name: str) -> dict[int, float]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_curves_are_what_was_logged(runs, capsys, tmp_path):
    found = {folder.name: read_run(folder) for folder in runs}
    panels = curves.data(found, ["lora/update_norm"])
    for folder in runs:
        rows = logged(folder, "lora/update_norm")
        assert panels["lora/update_norm"][folder.name] == Curve(tuple(rows), tuple(rows.values()))
        assert list(rows) == [1, 3, 5, 7]
    said = draw(capsys, tmp_path, *runs, "--what", "curves", "--metric", "lora/update_norm")
    assert "lora/update_norm" in said
    assert "optimizer step" in said
    assert all(folder.name in said for folder in runs)


def test_unless_named_curves_are_those_of_the_whole_model_and_the_others_are_told(runs, capsys, tmp_path):
    folder = next(iter(runs))
    panels = curves.data({"run": read_run(folder)})
    assert 1 <= len(panels) <= curves.MOST
    assert not [name for name in panels if "/net." in name or "memory_MiB/base" in name]
    assert main(["plot", str(folder), "--what", "curves", "--out", str(tmp_path / "all.svg")]) == 0
    assert "also there, with --metric NAME: lora/" in capsys.readouterr().out


def test_spectra_are_those_of_the_trained_weights(runs, capsys, tmp_path):
    for folder, module in runs.items():
        drawn = spectra.data({"one": read_adapter(folder)})
        layers = adapted_layers(module)
        assert {f"net.{name}" for name in drawn.layers} == set(layers)
        for row, name in enumerate(drawn.layers):
            dense = torch.linalg.svdvals(dense_update(layers[f"net.{name}"]).detach().double())
            values = drawn.values["one"][row]
            assert torch.allclose(values, dense[: len(values)], atol=1e-6)  # weights are float32
            assert drawn.ranks["one"][row].item() == pytest.approx(effective_rank(values).item())
    said = draw(capsys, tmp_path, *runs, "--what", "spectra")
    for word in ("blocks.0.q_proj", "downs.1", "effective rank", *(folder.name for folder in runs)):
        assert word in said


def test_a_checkpoint_and_the_adapter_folder_are_the_same_adapter(runs):
    for folder in runs:
        saved, checkpointed = read_adapter(folder), read_adapter(folder / "last.ckpt")
        assert [f"net.{name}" for name in saved] == list(checkpointed)
        for (a, b), (c, d) in zip(saved.values(), checkpointed.values(), strict=True):
            assert torch.equal(b @ a, d @ c)


def test_of_a_checkpoint_that_started_in_the_weight_the_change_is_drawn(tmp_path):
    module = train(tmp_path, 2, init="pissa", quantization="nf4")
    for name, (lora_A, lora_B) in read_adapter(tmp_path / "last.ckpt").items():
        dense = dense_update(adapted_layers(module)[name]).detach()
        assert torch.allclose(lora_B @ lora_A, dense, atol=1e-6)  # differences of weights in float32


def test_similarity_is_the_mean_over_the_layers_that_are_shared(runs, capsys, tmp_path):
    first, second = map(read_adapter, runs)
    drawn = similarity.data({"r2": first, "r4": second})
    for phi, side in ((drawn.inputs, lambda pair: pair[0]), (drawn.outputs, lambda pair: pair[1].T)):
        expected = sum(subspace_similarity(side(first[layer]), side(second[layer])) for layer in first) / len(first)
        assert phi.shape == (2, 4)
        assert torch.allclose(phi, expected, rtol=1e-12)
    said = draw(capsys, tmp_path, *runs)  # what two adapters are compared by, unless told otherwise
    assert "input directions: rows of" in said
    assert "mean of 6 layers" in said
    one = draw(capsys, tmp_path, *runs, "--layers", "blocks.1.q_proj")
    assert "on blocks.1.q_proj" in one


def test_layers_of_other_ranks_are_left_out_and_told(capsys, tmp_path):
    for name, ranks in {"one": (2, 2, 3), "two": (2, 2, 2)}.items():
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        inject(model, {str(i): LoRAConfig(r=r) for i, r in enumerate(ranks)})
        save_adapter(randomize(model), tmp_path / name)
    assert "mean of 2 layers" in draw(capsys, tmp_path, tmp_path / "one", tmp_path / "two")
    assert main(["plot", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "again")]) == 0
    assert "left out, because their ranks are others: 2" in capsys.readouterr().out


def test_memory_is_what_the_monitor_told(runs, capsys, tmp_path):
    bars = memory.data({folder.name: read_run(folder) for folder in runs})
    for folder in runs:
        for part, size in bars[folder.name].items():
            (told,) = logged(folder, f"lora/memory_MiB/{part.replace('trained along', 'trained')}").values()
            assert size == told
    said = draw(capsys, tmp_path, *runs, "--what", "memory")
    assert all(part in said for part in ("base", "adapters", "gradients", "optimizer", "activations", "MiB"))
    assert f"{sum(bars[next(iter(runs)).name].values()):.3g}" in said


def test_norms_of_runs_are_relative_and_of_adapters_absolute(runs, capsys, tmp_path):
    folder, module = next(iter(runs.items()))
    relative = norms.of_runs({"run": read_run(folder)})["run"]
    absolute = norms.of_adapters({"adapter": read_adapter(folder)})["adapter"]
    for name, layer in adapted_layers(module).items():
        dense, base = dense_update(layer).norm().item(), layer.base_weight().norm().item()
        assert relative[name] == pytest.approx(dense / base, rel=1e-4)  # a difference of weights in float32
        assert absolute[name.removeprefix("net.")] == pytest.approx(dense, rel=1e-4)
    assert "at the end" in draw(capsys, tmp_path, *runs, "--what", "norms")
    save_adapter(module.net, tmp_path / "adapter")
    said = draw(capsys, tmp_path, tmp_path / "adapter", "--what", "norms")
    assert "at the end" not in said
    assert "downs.0" in said


def test_an_attention_in_peft_format_is_drawn_as_its_layers_compute(capsys, tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    inject(model, ["attn.q_proj", "attn.out_proj"], LoRAConfig(r=2, alpha=3))
    save_adapter(randomize(model), tmp_path / "adapter")
    found = norms.of_adapters({"": read_adapter(tmp_path / "adapter")})[""]
    dense = {name: dense_update(layer).norm().item() for name, layer in adapted_layers(model).items()}
    assert found["attn"] == pytest.approx(dense["attn.q_proj"], rel=1e-5)
    assert found["attn.out_proj"] == pytest.approx(dense["attn.out_proj"], rel=1e-5)


def test_convolutions_and_embeddings_are_drawn_as_matrices(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "conv": nn.Conv2d(3, 6, 3)})
    inject(model, ["embed", "conv"], LoRAConfig(r=2, alpha=3))
    save_adapter(randomize(model), tmp_path)
    found = norms.of_adapters({"": read_adapter(tmp_path)})[""]
    for name, layer in adapted_layers(model).items():
        assert found[name] == pytest.approx(dense_update(layer).norm().item(), rel=1e-5)


def test_the_demos_report_is_a_run(tmp_path):
    report = {"losses": [2.0, 1.5], "base_bytes": 2**20, "adapter_bytes": 2**19, "trainable": 2**17}
    (tmp_path / "report.json").write_text(json.dumps({**report, "optimizer": {"state_bytes": 2**20}}))
    run = read_run(tmp_path)
    assert run.curves == {"bits/byte": Curve((0, 1), (2.0, 1.5))}
    assert run.memory == {"base": 1.0, "adapters": 0.5, "gradients": 0.5, "optimizer": 1.0}
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(LoRAError, match="no report of lightning-lora demo, or of an earlier version"):
        read_run(tmp_path)


def test_a_diverged_run_is_drawn_as_far_as_it_goes(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\n1,nan\n2,\n3,2.0\n")
    assert read_run(tmp_path).curves == {"loss": Curve((0, 3), (1.0, 2.0))}
    assert "loss" in draw(capsys, tmp_path, tmp_path)


def test_the_same_input_gives_the_same_bytes(runs, tmp_path, capsys):
    for what in ("memory", "similarity"):
        for name in ("first", "second"):
            assert main(["plot", *map(str, runs), "--what", what, "--out", str(tmp_path / name)]) == 0
        for suffix in style.SUFFIXES:
            pair = [(tmp_path / f"{name}{suffix}").read_bytes() for name in ("first", "second")]
            assert pair[0] == pair[1], what
    capsys.readouterr()


def test_series_differ_without_their_colour_and_letters_are_large_enough():
    assert len({str(look["linestyle"]) for look in style.LINES}) == len(style.LINES)
    assert len({look["marker"] for look in style.LINES}) == len(style.LINES)
    from matplotlib.colors import to_rgb

    lightness = [
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(p["color"]), strict=True))
        for p in style.PARTS.values()
    ]
    hatched = [part["hatch"] for part in style.PARTS.values() if part["hatch"]]
    assert len(set(hatched)) == len(hatched)
    plain = [light for light, part in zip(lightness, style.PARTS.values(), strict=True) if not part["hatch"]]
    assert max(plain) - min(plain) > 0.5
    sizes = [size for name, size in style._SETTINGS.items() if name.endswith(("fontsize", "labelsize", "font.size"))]
    assert min(sizes) >= 8


def test_labels_are_the_ends_of_paths_that_tell_them_apart(tmp_path):
    paths = [tmp_path / "a" / "version_0", tmp_path / "b" / "version_0"]
    assert labels(paths) == ["a/version_0", "b/version_0"]
    assert labels([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent"], "absent does not exist: expected a folder with metrics.csv"),
        (["empty"], "empty holds no run: expected a folder with metrics.csv (from Trainer(logger=CSVLogger(...)))"),
        (["empty", "--what", "spectra"], "empty: holds no adapter: expected a folder with adapter_config.json"),
        (["absent", "--what", "spectra"], "absent: no such folder"),
        (["two"], "two holds 2 runs: pass two/a, two/b"),
        (["two/a", "--metric", "acc"], "no run has acc; there are: loss"),
        (["two/a", "--what", "memory"], "a told nothing of its memory; log it with AdapterMonitor"),
        (["two/a", "--what", "norms"], "a logged no norms of single layers; log them with AdapterMonitor(detail="),
        (["two/a", "--what", "memory", "--metric", "loss"], "--metric chooses among curves, and --what is memory"),
        (["two/a", "--layers", "*"], "--layers chooses layers of spectra, similarity and norms"),
        (["two/a", "--out", "x.pdf"], "--out x.pdf: write .png or .svg, or no suffix for both"),
        (["adapter", "--what", "similarity"], "similarity compares two adapters, and 1 were given"),
        (["adapter", "other"], "the adapters share no layer: adapter is on 0; other on body"),
        (["adapter", "--layers", "*.q"], "--layers *.q matches none of 0"),
    ],
)
def test_what_cannot_be_drawn_is_told_with_what_to_do(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("a", "b"):
        Path("two", name).mkdir(parents=True)
        Path("two", name, "metrics.csv").write_text("step,loss\n0,1.0\n")
    save_adapter(inject(nn.Sequential(nn.Linear(4, 4)), "0", LoRAConfig(r=2)), "adapter")
    save_adapter(inject(nn.ModuleDict({"body": nn.Linear(4, 4)}), "body", LoRAConfig(r=2)), "other")
    assert main(["plot", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 2


def test_a_method_whose_update_is_no_product_is_refused(tmp_path):
    train(tmp_path, 2, method="dora")
    with pytest.raises(AdapterError, match="holds dora, whose updates cannot be drawn without the model"):
        read_adapter(tmp_path / "last.ckpt")


def test_without_matplotlib_it_is_said_what_to_install(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["plot", str(next(iter(runs))), "--out", str(tmp_path / "x")]) == 1
    assert 'pictures need matplotlib: pip install "lightning-lora[plot]"' in capsys.readouterr().err


def test_the_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    said = capsys.readouterr().out
    assert "lightning-lora plot adapter_r8 adapter_r64 --what similarity" in said
    assert all(f"  {what}" in said for what in ("curves", "spectra", "similarity", "memory", "norms"))
