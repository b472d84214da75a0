"""Damaged, foreign and hostile files: each is one clear error that names file and reason, or loads the very adapter.

What concerns a single tensor, setting or file of a folder is in ``test_adapter_folder``. Here: bytes that changed in
place, headers that lie, files of other runs and bases, checkpoints, and what tries to run code or to leave the folder.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import (
    AdapterError,
    CheckpointError,
    DoRAConfig,
    LoRACallback,
    LoRAConfig,
    LoRAError,
    VeRAConfig,
    inject,
    load_adapter,
    load_from_checkpoint,
    quantize,
    save_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.nn.adapter import AdapterConfig
from tests.callbacks import conftest
from tests.conftest import Net, randomize
from tests.io.files import Bomb
from tests.runs import Module, loader

trainer = conftest.trainer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(12)[None] % 16


def base(seed: int = 0, **shape) -> nn.Module:
    torch.manual_seed(seed)
    return Net(**shape).eval()


def trained(seed: int = 1, model: nn.Module | None = None, **settings) -> nn.Module:
    model = inject(base() if model is None else model, "q_proj", LoRAConfig(r=2, alpha=4, **settings))
    torch.manual_seed(seed)
    return randomize(model)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- the adapter folder

Damage = Callable[[Path], object]


def edit_header(edit: Callable[[dict], object], *, size: int | None = None) -> Damage:
    """Change the safetensors header as JSON; the data stays."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / WEIGHTS).write_bytes((size or len(text)).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def edit_bytes(name: str, edit: Callable[[bytearray], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        edit(data)
        (folder / name).write_bytes(data)

    return damage


def flip(at: float) -> Damage:
    """Flip one bit of the weights, counted from the end of the header."""

    def damage(data: bytearray) -> None:
        start = 8 + int.from_bytes(data[:8], "little")
        data[start + int(at * (len(data) - start - 1))] ^= 16

    return edit_bytes(WEIGHTS, damage)


def edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps(settings))

    return damage


def resaved(edit: Callable[[dict], object]) -> Damage:
    """The tensors changed and saved with our header, as a script does that means well."""

    def damage(folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata)

    return damage


def foreign(edit: Callable[[dict], object]) -> Damage:
    """The tensors changed and saved without our header, which would give that away."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def names(header: dict) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def of_ours(change: Callable[[dict], object]) -> Damage:
    """Change what we wrote into the header."""

    def edit(header: dict) -> None:
        ours = json.loads(header["__metadata__"]["lightning_lora"])
        change(ours)
        header["__metadata__"]["lightning_lora"] = json.dumps(ours)

    return edit_header(edit)


def swapped_entries(header: dict) -> None:
    first, *_, last = names(header)
    header[first], header[last] = header[last], header[first]


def overlapping(header: dict) -> None:
    first, second = names(header)[:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def with_a_hole(header: dict) -> None:
    name = max(names(header), key=lambda name: header[name]["data_offsets"])
    header[name]["data_offsets"] = [offset + 8 for offset in header[name]["data_offsets"]]


def of_another_run(name: str) -> Damage:
    def damage(folder: Path) -> None:
        save_adapter(trained(seed=5, model=base(seed=7)), folder.parent / "other")
        (folder.parent / "other" / name).replace(folder / name)

    return damage


def a_huge_header(folder: Path) -> None:
    text = b" " * 101_000_000
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)


def duplicate_key(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    name = names(json.loads(text))[0]
    entry = json.dumps({name: json.loads(text)[name]})[1:-1].encode()
    text = text[:-1] + b"," + entry + b"}"
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


FIRST = "base_model.model.blocks.0.q_proj.lora_A.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "a bit flipped in the first tensor": (flip(0), rf"{WEIGHTS} is damaged: the bytes of .* \(SHA-256\)"),
    "a bit flipped in the middle": (flip(0.5), r"SHA-256.*go back to another checkpoint"),
    "a bit flipped in the last byte": (flip(1), "SHA-256"),
    "bytes added": (edit_bytes(WEIGHTS, lambda data: data.extend(b"\0" * 8)), f"{WEIGHTS} is truncated or no safeten"),
    "bytes zeroed": (edit_bytes(WEIGHTS, lambda data: data.__setitem__(slice(-64, None), bytes(64))), "SHA-256"),
    "a header of 2^63 bytes": (edit_header(lambda h: None, size=2**63), r"header would have 9,223,372,036,854,775,808"),
    "a header of 101 MB": (a_huge_header, "header would have 101,000,000 bytes"),
    "overlapping tensors": (edit_header(overlapping), WEIGHTS),
    "a hole between tensors": (edit_header(with_a_hole), WEIGHTS),
    "two entries exchanged": (edit_header(swapped_entries), "shape|SHA-256"),
    "a shape that claims terabytes": (
        edit_header(lambda h: h[FIRST].update(shape=[2**20, 2**20])),
        WEIGHTS,
    ),
    "a dtype no torch has": (edit_header(lambda h: h[FIRST].update(dtype="F4")), WEIGHTS),
    "another dtype of that size": (edit_header(lambda h: h[FIRST].update(dtype="I32")), "int32"),
    "our header of a newer format": (of_ours(lambda ours: ours.update(version=2)), "format version 2.*pip install -U"),
    "our header without a version": (of_ours(lambda ours: ours.pop("version")), "format version None"),
    "our header without checksums": (of_ours(lambda ours: ours.pop("sha256")), "lacks the checksums"),
    "our header with too few checksums": (of_ours(lambda ours: ours["sha256"].pop(FIRST)), "was changed since"),
    "our header without a fingerprint": (of_ours(lambda ours: ours.pop("base_fingerprint")), "damaged header"),
    "our header with a broken fingerprint": (
        of_ours(lambda ours: ours["base_fingerprint"].update({"blocks.0.q_proj": [1]})),
        "damaged header.*no fingerprint",
    ),
    "our header edited together with the config": (
        lambda f: (of_ours(lambda ours: ours.update(r=1))(f), edit_config(r=1)(f)),
        r"lora_A has shape \(2, 64\), expected \(1, 64\)",
    ),
    "weights of a run on another base": (of_another_run(WEIGHTS), "another one in blocks.0.q_proj"),
    "tensors halved in precision and saved again": (
        resaved(lambda t: t.update({key: value.half() for key, value in t.items()})),
        "SHA-256",
    ),
    "a tensor set to 1e30": (resaved(lambda t: t[FIRST].fill_(1e30)), "SHA-256"),
    "A transposed": (resaved(lambda t: t.update({FIRST: t[FIRST].t().contiguous()})), r"shape \(64, 2\)"),
    "all renamed": (
        resaved(lambda t: [t.update({key.replace("q_proj", "k_proj"): t.pop(key)}) for key in list(t)]),
        "k_proj|was changed since",
    ),
    "a base tensor added": (
        resaved(lambda t: t.update({"base_model.model.norm.weight": torch.zeros(64)})),
        "was changed since|overwrite the base",
    ),
    "r of ten million": (edit_config(r=10**7), "r is|more than|disagree"),
    "r as text": (edit_config(r="2"), "r must be"),
    "r of 4.5": (edit_config(r=4.5), "r must be"),
    "r of -1": (edit_config(r=-1), "r must be"),
    "the config cut by its last bytes": (
        edit_bytes(CONFIG, lambda data: data.__delitem__(slice(-2, None))),
        "not JSON",
    ),
    "a bit of the config flipped": (
        edit_bytes(CONFIG, lambda data: data.__setitem__(data.index(b"lora_alpha") + 13, ord("4") ^ 1)),
        r"disagree.*alpha",
    ),
    "the config in the place of the weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / CONFIG).read_bytes()),
        WEIGHTS,
    ),
    "the weights in the place of the config": (
        lambda f: (f / CONFIG).write_bytes((f / WEIGHTS).read_bytes()),
        f"{CONFIG}.*not JSON",
    ),
    "r null": (edit_config(r=None), "r must be"),
    "alpha of 1e30": (edit_config(lora_alpha=1e30), "alpha"),
    "alpha infinite": (edit_config(lora_alpha=float("inf")), "alpha"),
    "dropout edited": (edit_config(lora_dropout=0.5), r"disagree.*dropout"),
    "a rank pattern that never ends": (edit_config(rank_pattern={"(a|a)*" * 20 + "b": 2}), "only names of layers"),
    "targets a number": (edit_config(target_modules=3), "target_modules is 3, expected a list"),
    "another method": (edit_config(use_dora=True), "lora_magnitude_vector|disagree"),
    "another format": (edit_config(peft_type="VERA"), "vera_lambda_d has shape no such tensor"),
    "biases that are not there": (edit_config(bias="lora_only"), "has no bias of a layer"),
    "biases of every layer that are not there": (edit_config(bias="all"), r"has no .*q_proj|has no .*bias"),
    "biases no PEFT has": (edit_config(bias=["all"]), "expected one of none, all, lora_only"),
    "more targets": (edit_config(target_modules=["q_proj", "up_proj"]), "names layers that .* has no tensors for"),
}


@pytest.mark.parametrize("present", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_and_nothing_changes(damage, words, present, folder):
    damage(folder)
    model = trained(seed=9) if present else base()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, folder)
    said = str(error.value)
    assert re.search(words, said, re.DOTALL), said
    assert said.startswith(str(folder))
    assert len(said.splitlines()) <= 6
    assert re.search(r"\. (Put back|Copy it|Load |Update it|In |Go back)|; only names", said), said
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


A_BIAS = "base_model.model.blocks.0.up_proj.base_layer.bias"
VECTOR = "base_model.model.blocks.0.up_proj.lora_magnitude_vector"
D, LAMBDA = (f"base_model.model.blocks.0.up_proj.vera_lambda_{letter}" for letter in "db")
OTHER_METHODS: dict[str, tuple[AdapterConfig, Damage, str]] = {
    "DoRA called LoRA": (
        DoRAConfig(r=2),
        edit_config(use_dora=False),
        "method is 'dora' there and 'lora' here",
    ),
    "magnitudes lost": (DoRAConfig(r=2), foreign(lambda t: t.pop(VECTOR)), "has no lora_magnitude_vector"),
    "magnitudes of another size": (
        DoRAConfig(r=2),
        foreign(lambda t: t.update({VECTOR: t[VECTOR][:3].clone()})),
        r"shape \(3,\), expected \(128,\)",
    ),
    "a bias lost": (DoRAConfig(r=2), foreign(lambda t: t.pop(A_BIAS)), "has no .*up_proj.base_layer.bias"),
    "a bias of another size": (
        DoRAConfig(r=2),
        foreign(lambda t: t.update({A_BIAS: torch.ones(3)})),
        r"up_proj.bias has shape \(3,\) in the file, the model has \(128,\)",
    ),
    "biases not called for": (DoRAConfig(r=2), edit_config(bias="none"), "overwrite the base"),
    "a bias flipped": (DoRAConfig(r=2), resaved(lambda t: t[A_BIAS].add_(1)), "SHA-256"),
    "VeRA called LoRA": (VeRAConfig(r=4), edit_config(peft_type="LORA", lora_alpha=4, bias="none"), "overwrite|vera"),
    "another seed in the header": (
        VeRAConfig(r=4),
        of_ours(lambda ours: ours.update(seed=7)),
        "projections are not those that its seed draws",
    ),
    "projections changed": (
        VeRAConfig(r=4),
        foreign(lambda t: t["base_model.vera_A"].add_(1)),
        "projections are not those that its seed draws",
    ),
    "projections no matrices": (
        VeRAConfig(r=4),
        foreign(lambda t: t.update({"base_model.vera_A": torch.ones(3)})),
        "projections have shapes",
    ),
    "a vector lost": (VeRAConfig(r=4), foreign(lambda t: t.pop(D)), "vera_lambda_d has shape no such tensor"),
    "the other vector lost": (VeRAConfig(r=4), foreign(lambda t: t.pop(LAMBDA)), "only one of vera_lambda_b and"),
    "r of the header as text": (VeRAConfig(r=4), of_ours(lambda ours: ours.update(r="4")), "does not say what its Ve"),
}


@pytest.mark.parametrize("look", [False, True], ids=["load", "inspect"])
@pytest.mark.parametrize(("config", "damage", "words"), OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_damage_to_what_other_methods_and_biases_bring_is_named(config, damage, words, look, tmp_path, capsys):
    model = inject(base(), "up_proj", config, train_bias="adapted")
    save_adapter(randomize(model), tmp_path)
    damage(tmp_path)
    if look:  # which finds what can be found without the model, and never fails in another way
        code = main(["inspect", str(tmp_path)])
        said = capsys.readouterr()
        assert code in (0, 1)
        assert "Traceback" not in said.err
        assert code == 0 or str(tmp_path) in said.err
        return
    with pytest.raises(AdapterError) as error:
        load_adapter(base(), tmp_path)
    assert re.search(words, str(error.value), re.DOTALL), str(error.value)


BENIGN: dict[str, Damage] = {
    "an entry of the header twice": duplicate_key,
    "an unknown setting": edit_config(of_the_future=True),
    "another task type": edit_config(task_type="CAUSAL_LM", base_model_name_or_path="x/y", auto_mapping={"a": "b"}),
    "targets as an expression that never ends": edit_config(target_modules="(a|a)*" * 30 + "b"),
    "fan_in_fan_out null": edit_config(fan_in_fan_out=None),
    "a file beside it": lambda folder: (folder / "README.md").write_text("x"),
    "a pickle beside it": lambda folder: (folder / "adapter_model.bin").write_bytes(b"never read"),
    "a stale temporary file": lambda folder: (folder / ".lightning_lora-0-1-x.tmp").write_bytes(b"x"),
    "config with other spaces": lambda folder: (folder / CONFIG).write_text(
        json.dumps(json.loads((folder / CONFIG).read_text()))
    ),
    "the folder as a link": lambda folder: (folder.rename(folder.parent / "real"), folder.symlink_to("real")),
    "the weights as a link": lambda folder: (
        (folder / WEIGHTS).rename(folder.parent / "blob"),
        (folder / WEIGHTS).symlink_to("../blob"),
    ),
}


@pytest.mark.parametrize("damage", BENIGN.values(), ids=BENIGN)
def test_what_is_no_damage_loads_the_very_adapter(damage, folder):
    expected = trained()(TOKENS)
    damage(folder)
    assert torch.equal(load_adapter(base(), folder)(TOKENS), expected)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: base(seed=3), "another one in blocks.0.q_proj"),
        (lambda: base(depth=1), r"blocks\.1\.q_proj"),
        (lambda: base(depth=3), r"names layers that .* has no tensors for: blocks\.2\.q_proj"),
        (lambda: base(width=128), r"shape \(2, 64\), expected \(2, 128\)"),
    ],
    ids=["other weights", "fewer layers", "more layers", "wider"],
)
def test_another_base_is_refused(model, words, folder):
    with pytest.raises(AdapterError, match=words):
        load_adapter(model(), folder)


def test_a_save_killed_between_its_two_files_is_the_new_adapter(folder, tmp_path, caplog):
    old = (folder / CONFIG).read_bytes()
    model = inject(base(), ["q_proj", "up_proj"], LoRAConfig(r=4, alpha=3))
    save_adapter(randomize(model), folder)
    (folder / CONFIG).write_bytes(old)
    assert torch.equal(load_adapter(base(), folder)(TOKENS), model(TOKENS))
    assert "the last was interrupted" in caplog.text
    edit_config(lora_alpha=5)(folder)  # what is neither of the two was edited
    with pytest.raises(AdapterError, match="does not name: blocks"):
        load_adapter(base(), folder)


def test_the_same_base_in_other_bits_is_that_base(folder):
    load_adapter(quantize(trained(seed=9)), folder)


# ---- Lightning checkpoints


class Seeded(Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint of a short run."""
    from lightning.pytorch import Trainer

    folder = tmp_path_factory.mktemp("run")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = Trainer(callbacks=[LoRACallback(r=2)], max_epochs=1, default_root_dir=folder, **quiet)
    run.fit(Seeded(), loader())
    return Path(run.checkpoint_callback.best_model_path)


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    path = tmp_path / "run" / "epoch=1.ckpt"
    path.parent.mkdir()
    path.write_bytes(written.read_bytes())
    return path


def flipped_record(part: str) -> Damage:
    """Flip a bit inside a record of the archive."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            record = next(r for r in archive.infolist() if part in r.filename and r.file_size > 8)
            data = archive.read(record)
        content = bytearray(path.read_bytes())
        content[bytes(content).index(data) + len(data) // 2] ^= 16
        path.write_bytes(content)

    return damage


def load(how: str, path: Path, trainer) -> None:
    if how == "load_from_checkpoint":
        load_from_checkpoint(Seeded, path)
    else:
        getattr(trainer(LoRACallback(r=2)), how)(Seeded(), loader(), ckpt_path=path)


def cut(part: float) -> Damage:
    return lambda path: os.truncate(path, int(part * path.stat().st_size))


def saved_again(edit: Callable[[dict], object]) -> Damage:
    def damage(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        edit(found)
        torch.save(found, path)

    return damage


def first_weight(found: dict) -> torch.Tensor:
    return next(iter(found["state_dict"].values()))


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
        archive.writestr("bomb", bytes(50_000_000))


BAD_CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "missing": (lambda path: path.unlink(), "no such checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "cut in half": (cut(0.5), "is damaged"),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "is damaged"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "cut short, or no file by"),
    "a bit flipped in a tensor": (flipped_record("data/0"), r"CRC-32"),
    "a bit flipped in the pickle": (flipped_record("data.pkl"), r"CRC-32"),
    "a zip bomb": (compressed, "it is compressed"),
    "a weight changed": (saved_again(lambda c: first_weight(c).add_(1)), r"was changed since.*adapters.*SHA-256"),
    "NaN": (saved_again(lambda c: first_weight(c).fill_(float("nan"))), "NaN or infinity in net"),
    "alpha edited": (saved_again(lambda c: c["lightning_lora"].update(alpha=99.0)), "its description"),
    "a tensor lost": (saved_again(lambda c: c["state_dict"].popitem()), "lacks net"),
    "no weights": (saved_again(lambda c: c.pop("state_dict")), "no weights|state_dict"),
    "weights no tensors": (saved_again(lambda c: c["state_dict"].update(x=3)), "no weights"),
    "checksums broken": (saved_again(lambda c: c["lightning_lora"].update(sha256=[1])), "checksums cannot be read"),
    "of a newer format": (saved_again(lambda c: c["lightning_lora"].update(version=2)), "version 2.*pip install -U"),
    "no description": (saved_again(lambda c: c.pop("lightning_lora")), "was not written by LoRACallback"),
}


@pytest.mark.parametrize("how", ["fit", "load_from_checkpoint", "verify"])
@pytest.mark.parametrize(("damage", "words"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_name(damage, words, how, checkpoint, trainer, capsys):
    damage(checkpoint)
    if how == "verify":
        assert main(["verify", str(checkpoint)]) == 1
        said = capsys.readouterr().err
        words = f"{words}|no such file"
    else:
        with pytest.raises(LoRAError) as error:
            load(how, checkpoint, trainer)
        said = str(error.value)
    assert re.search(words, said, re.DOTALL), said


def test_the_newest_whole_checkpoint_is_named(checkpoint, trainer):
    for name, age in (("old", 200), ("good", 100), ("cut", 50)):
        other = checkpoint.with_name(f"{name}.ckpt")
        other.write_bytes(checkpoint.read_bytes()[: 500 if name == "cut" else None])
        os.utime(other, (1e9 - age, 1e9 - age))
    cut(0.5)(checkpoint)
    with pytest.raises(CheckpointError, match=r"The newest whole one there is .*good\.ckpt"):
        trainer(LoRACallback(r=2)).fit(Seeded(), loader(), ckpt_path=checkpoint)


def test_an_edit_that_was_meant_is_accepted_without_the_checksums(checkpoint):
    def meant(found: dict) -> None:
        first_weight(found).mul_(2)
        del found["lightning_lora"]["sha256"]

    saved_again(meant)(checkpoint)
    load_from_checkpoint(Seeded, checkpoint)


# ---- code and paths


@pytest.fixture
def ran(tmp_path):
    """A path that must not come to exist."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["lightning_lora", "state_dict", "hyper_parameters", "optimizer_states", "callbacks"])
@pytest.mark.parametrize("how", ["fit", "test", "load_from_checkpoint"])
def test_code_in_a_checkpoint_is_not_run(place, how, checkpoint, trainer, ran):
    saved_again(lambda found: found.update({place: {"x": Bomb(ran)}}))(checkpoint)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(checkpoint))}.*mkdir.*save it again"):
        load(how, checkpoint, trainer)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.ckpt", "https://127.0.0.1:9/x.ckpt"])
def test_a_checkpoint_at_a_url_is_refused_before_it_is_fetched(url, trainer):
    with pytest.raises(CheckpointError, match=r"is a URL.*Download it first"):
        trainer(LoRACallback(r=2)).fit(Seeded(), loader(), ckpt_path=url)


@pytest.mark.parametrize("key", ["_instantiator", "_class_path", "class_path", "auto_map"])
def test_a_checkpoint_cannot_name_what_builds_the_module(key, checkpoint, ran):
    settings = {key: "os.mkdir", "path": str(ran)}
    saved_again(lambda found: found.update(hyper_parameters=settings, hparams_name="kwargs"))(checkpoint)
    with suppress(Exception):  # whether Lightning refuses it or passes it over, nothing is to be made
        load_from_checkpoint(Seeded, checkpoint)


def test_hyperparameters_in_yaml_cannot_run_code(checkpoint, ran, tmp_path):
    (tmp_path / "hparams.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{ran}']\n")
    with suppress(Exception):  # it is Lightning that reads it
        load_from_checkpoint(Seeded, checkpoint, hparams_file=tmp_path / "hparams.yaml")


def test_a_config_in_a_checkpoint_builds_nothing(checkpoint, ran):
    call = {"class_path": "os.mkdir", "init_args": {"path": str(ran)}}
    saved_again(lambda found: found.update(hyper_parameters={"net": call, "optimizer": call}))(checkpoint)
    with suppress(Exception):  # a module that takes no such arguments may refuse them
        load_from_checkpoint(Seeded, checkpoint)


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_code_in_a_pickled_adapter_is_not_run(suffix, folder, ran, capsys):
    (folder / WEIGHTS).unlink()
    torch.save({"x": Bomb(ran)}, folder / f"adapter_model{suffix}")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(base(), folder)
    for command in (["inspect"], ["verify"], ["convert", "--out", str(folder.parent / "out")]):
        assert main([command[0], str(folder / f"adapter_model{suffix}"), *command[1:]]) == 1
    capsys.readouterr()


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/b", "a\\b", ".", "..", "x" * 65, "a b", "ä", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(name, folder):
    with pytest.raises(AdapterError, match="adapter name"):
        load_adapter(base(), folder, name=name)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_saving_over_a_link_replaces_the_link_and_not_what_it_leads_to(name, folder, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "precious")
    save_adapter(trained(seed=4), folder)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (folder / name).is_symlink()


def test_layers_named_like_paths_are_only_names(folder):
    edit_header(lambda h: h.update({"base_model.model.../../x.lora_A.weight": h.pop(FIRST)}))(folder)
    with pytest.raises(AdapterError):
        load_adapter(base(), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
