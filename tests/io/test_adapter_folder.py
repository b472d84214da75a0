"""The adapter folder: what was saved comes back bit for bit; a damaged folder or a failed write changes nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterError,
    LoRAConfig,
    activate,
    adapter_state_dict,
    inject,
    load_adapter,
    quantize,
    save_adapter,
    summary,
)
from lightning_lora.model.layers import adapted_layers
from tests.conftest import Net as TiedNet
from tests.conftest import randomize

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FIRST_A, FIRST_B = f"{PREFIX}body.0.lora_A.weight", f"{PREFIX}body.0.lora_B.weight"


class Net(nn.Module):
    """Linear layers to adapt, a norm with parameters and integer statistics, and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width, bias=False))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
TARGETS = {"body.0": LoRAConfig(r=2, alpha=3), "body.2": LoRAConfig(r=4, alpha=5)}


def base(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return Net(width).eval()


def trained(model: nn.Module | None = None, *, train: list[str] | None = None, seed: int = 1) -> nn.Module:
    """A model after a training: everything that is trained has moved, also the statistics of a norm in training."""
    model = inject(model or base(), TARGETS, train=["head"] if train is None else train)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---- round trip


@pytest.mark.parametrize("train", [[], ["head"], ["head", "norm"]], ids=["adapters", "head", "norm"])
def test_a_saved_adapter_comes_back_bit_for_bit(train, tmp_path):
    model = trained(train=train)
    model.train()(X)  # moves the running statistics of the norm
    if "norm" not in train:
        model.norm.load_state_dict(base().norm.state_dict())
    save_adapter(model.eval(), tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(loaded(X), model(X))
    assert summary(loaded) == summary(model)


def test_the_file_holds_the_state_dict_of_the_adapter(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    written, state = load_file(tmp_path / WEIGHTS), adapter_state_dict(model)
    assert sorted(written) == sorted(state)
    assert all(torch.equal(written[key], state[key]) for key in state)


@pytest.mark.parametrize("alpha", [1, 7, 0.3, 1e-3, 32.0])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_config_comes_back_as_it_was(alpha, scaling, tmp_path):
    config = LoRAConfig(r=3, alpha=alpha, dropout=0.125, scaling=scaling)
    save_adapter(inject(base(), config=config), tmp_path)
    layers = adapted_layers(load_adapter(base(), tmp_path))
    assert {layer.adapter("default").config for layer in layers.values()} == {config}


def test_loading_keeps_the_mode_and_trains_what_was_trained(folder):
    loaded = load_adapter(base(), folder)
    wanted = {name for name, parameter in trained().named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == wanted
    assert not any(module.training for module in loaded.modules())


def test_loading_fills_an_adapter_that_is_there(folder):
    loaded = trained(seed=9)
    layer = loaded.body[0]
    load_adapter(loaded, folder)
    assert loaded.body[0] is layer
    assert_same_state(loaded, trained())


def test_loading_fills_an_adapter_over_nf4(tmp_path):
    model = quantize(trained())
    save_adapter(model, tmp_path)
    loaded = load_adapter(quantize(trained(seed=9)), tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(loaded(X), model(X))


def test_parameters_keep_their_identity_so_that_an_optimizer_still_holds_them(folder):
    model = trained(seed=9)
    before = dict(model.named_parameters())
    load_adapter(model, folder)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_adapter_is_kept_on_disk(dtype, tmp_path):
    model = trained(base().to(dtype), train=[])
    save_adapter(model, tmp_path)
    loaded = load_adapter(base().to(dtype), tmp_path)
    assert_same_state(loaded, model)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {expected}


def test_two_adapters_of_a_model_go_to_two_folders(tmp_path):
    model = inject(trained(train=[]), "body.2", LoRAConfig(r=1), name="second")
    with torch.no_grad():
        model.body[2].adapter("second").lora_B.normal_()
    for name in ("default", "second"):
        save_adapter(model, tmp_path / name, name=name)
    loaded = load_adapter(base(), tmp_path / "default")
    load_adapter(loaded, tmp_path / "second", name="second")
    assert_same_state(loaded, model)
    assert torch.equal(loaded(X), model(X))
    assert torch.equal(activate(loaded, "default")(X), activate(model, "default")(X))


def test_an_adapter_loads_under_any_name_beside_another(folder):
    model = load_adapter(base(), folder, name="first")
    load_adapter(model, folder, name="second")
    assert list(model.body[0].adapters) == ["first", "second"]
    assert torch.equal(model.body[0].adapter("first").lora_A, model.body[0].adapter("second").lora_A)


@pytest.mark.parametrize("named", ["top", "top.1"])
def test_a_module_trained_inside_a_container_comes_back_under_either_name(named, tmp_path):
    def wrapped() -> nn.Module:
        return nn.ModuleDict({"net": base(), "top": nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 2))})

    torch.manual_seed(5)
    model = trained(wrapped(), train=["top.1"])
    save_adapter(model, tmp_path)
    edit_config(modules_to_save=[named])(tmp_path)  # the dropout beside it has nothing to train
    for other in (wrapped(), inject(wrapped(), TARGETS, train=["top.1"]), inject(wrapped(), TARGETS, train=["top"])):
        load_adapter(other, tmp_path)
        assert torch.equal(other["top"][1].weight, model["top"][1].weight)


def test_a_compiled_model_writes_the_names_of_the_plain_one(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "plain")
    model.body = torch.compile(model.body, backend="eager")
    save_adapter(model, tmp_path / "compiled")
    assert load_file(tmp_path / "compiled" / WEIGHTS).keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()
    assert_same_state(load_adapter(base(), tmp_path / "compiled"), trained())


def test_path_may_be_a_string_and_its_parents_are_made(tmp_path):
    save_adapter(trained(), str(tmp_path / "a" / "b"))
    assert_same_state(load_adapter(base(), str(tmp_path / "a" / "b")), trained())


# ---- bad folders

Damage = Callable[[Path], object]


def edit_config(**changes: object) -> Damage:
    """Change settings of the config; None takes one out."""

    def damage(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return damage


def edit_tensors(edit: Callable[[dict[str, Tensor]], object], *, header: bool = False) -> Damage:
    """Change the tensors, by default without our header, as a file by another program has none."""

    def damage(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata if header else {"format": "pt"})

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, part: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(part * len(data))])

    return damage


def header_only(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


def both(one: Damage, other: Damage) -> Damage:
    return lambda folder: (one(folder), other(folder))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST_B][1, 1] = float("nan")


def with_infinity(tensors: dict[str, Tensor]) -> None:
    tensors[f"{PREFIX}head.weight"][0, 0] = float("inf")


NO_HEADER = edit_tensors(lambda tensors: None)
BAD_FOLDERS: dict[str, tuple[Damage, str]] = {
    # tensors
    "another shape": (edit_tensors(lambda t: t.update({FIRST_A: torch.zeros(2, 7)})), r"body\.0\.lora_A .*\(2, 7\)"),
    "another shape, transposed": (edit_tensors(lambda t: t.update({FIRST_B: t[FIRST_B].t().contiguous()})), "lora_B"),
    "another shape of the head": (
        edit_tensors(lambda t: t.update({f"{PREFIX}head.bias": torch.zeros(4)})),
        r"head\.bias .*\(4,\)",
    ),
    "another rank in the config": (both(NO_HEADER, edit_config(r=3, rank_pattern=None)), r"body\..\.lora_A .* r=3"),
    "half of a layer missing": (edit_tensors(lambda t: t.pop(FIRST_B)), r"body\.0 .*lora_B"),
    "a layer missing": (edit_tensors(lambda t: (t.pop(FIRST_A), t.pop(FIRST_B))), rf"{WEIGHTS} .*body\.0"),
    "a layer missing, with header": (
        edit_tensors(lambda t: (t.pop(FIRST_A), t.pop(FIRST_B)), header=True),
        rf"{WEIGHTS} .*body\.0",
    ),
    "part of the head missing": (edit_tensors(lambda t: t.pop(f"{PREFIX}head.bias")), r"head\.bias"),
    "all of the head missing": (
        edit_tensors(lambda t: (t.pop(f"{PREFIX}head.bias"), t.pop(f"{PREFIX}head.weight"))),
        "head",
    ),
    "no adapter at all": (edit_tensors(dict.clear), "no adapter|no tensors"),
    "an unknown tensor": (edit_tensors(lambda t: t.update({f"{PREFIX}body.0.lora_C": torch.zeros(2)})), "lora_C"),
    "a tensor without the prefix": (edit_tensors(lambda t: t.update({"body.0.x": torch.zeros(2)})), r"body\.0\.x"),
    "a layer the config does not name": (
        edit_tensors(
            lambda t: t.update(
                {
                    f"{PREFIX}extra.lora_A.weight": torch.ones(2, 8),
                    f"{PREFIX}extra.lora_B.weight": torch.ones(3, 2),
                }
            )
        ),
        "extra",
    ),
    "an adaptable layer the config does not name": (
        both(edit_config(target_modules=["body.0"]), NO_HEADER),
        r"body\.2",
    ),
    "a base weight": (
        edit_tensors(lambda t: t.update({f"{PREFIX}body.0.weight": torch.zeros(8, 6)})),
        r"body\.0\.weight",
    ),
    "a base weight under our own name": (
        edit_tensors(lambda t: t.update({f"{PREFIX}body.0.base_layer.weight": torch.zeros(8, 6)})),
        r"base_layer\.weight",
    ),
    "a base weight, declared as trained whole": (
        both(
            edit_config(modules_to_save=["body", "head"]),
            edit_tensors(
                lambda t: t.update(
                    {
                        f"{PREFIX}body.0.weight": torch.zeros(8, 6),
                        f"{PREFIX}body.0.bias": torch.zeros(8),
                        f"{PREFIX}body.2.weight": torch.zeros(8, 8),
                    }
                )
            ),
        ),
        "body",
    ),
    "NaN": (edit_tensors(with_nan), rf"{WEIGHTS} .*body\.0\.lora_B"),
    "infinity": (edit_tensors(with_infinity), rf"{WEIGHTS} .*head\.weight"),
    "integers": (edit_tensors(lambda t: t.update({FIRST_A: torch.ones(2, 6, dtype=torch.int64)})), r"body\.0\.lora_A"),
    "an 8-bit float": (edit_tensors(lambda t: t.update({FIRST_A: t[FIRST_A].to(torch.float8_e4m3fn)})), "lora_A"),
    # files
    "empty weights": (write(WEIGHTS, b""), WEIGHTS),
    "weights cut in the length": (write(WEIGHTS, b"\x10\x00\x00"), WEIGHTS),
    "weights cut in the header": (truncate(WEIGHTS, 0.1), WEIGHTS),
    "weights cut after the header": (header_only, WEIGHTS),
    "weights cut in the data": (truncate(WEIGHTS, 0.9), WEIGHTS),
    "weights cut at the last byte": (truncate(WEIGHTS, 0.9999), WEIGHTS),
    "weights with a huge header": (write(WEIGHTS, b"\xff" * 64), WEIGHTS),
    "weights that are text": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n" * 3), WEIGHTS),
    "weights missing": (remove(WEIGHTS), f"{WEIGHTS} is missing"),
    "weights as a pickle": (pickled, "pickle"),
    "config missing": (remove(CONFIG), f"{CONFIG} is missing"),
    "config empty": (write(CONFIG, b""), f"{CONFIG}.* not JSON"),
    "config truncated": (truncate(CONFIG, 0.5), f"{CONFIG}.* not JSON"),
    "config not JSON": (write(CONFIG, b"r: 8\n"), f"{CONFIG}.* not JSON"),
    "config not text": (write(CONFIG, b"\xff\xfe\x00"), f"{CONFIG}.* not JSON"),
    "config deeply nested": (write(CONFIG, b"[" * 100_000), f"{CONFIG}.* not JSON"),
    "config a list": (write(CONFIG, b"[1, 2]"), f"{CONFIG}.* list"),
    "config enormous": (write(CONFIG, b" " * 1_000_001), f"{CONFIG}.* bytes"),
    # settings
    "alpha edited": (edit_config(lora_alpha=64), r"(?s)adapter_config.*alpha"),
    "scaling edited": (edit_config(use_rslora=True), r"(?s)adapter_config.*scaling"),
    "targets edited": (edit_config(target_modules=["body.0"]), r"body\.2|targets"),
    "alpha missing": (edit_config(lora_alpha=None), "lora_alpha is missing"),
    "alpha null": (both(NO_HEADER, lambda f: set_null(f, "lora_alpha")), "alpha"),
    "alpha text": (edit_config(lora_alpha="16"), "alpha"),
    "alpha negative": (edit_config(lora_alpha=-1), "alpha"),
    "alpha NaN": (both(NO_HEADER, edit_config(lora_alpha=float("nan"), alpha_pattern=None)), "alpha"),
    "rank missing": (edit_config(r=None), "r is missing"),
    "rank 0": (edit_config(r=0), "r must be"),
    "rank true": (edit_config(r=True), "r must be"),
    "rank a list": (edit_config(r=[2]), "r must be"),
    "rank patterns a list": (edit_config(rank_pattern=["body"]), "rank_pattern"),
    "rank pattern an expression": (edit_config(rank_pattern={"(a+)+$": 2}), "rank_pattern"),
    "dropout 1": (edit_config(lora_dropout=1), "dropout"),
    "modules to save a number": (edit_config(modules_to_save=5), "modules_to_save"),
    "modules to save a list of numbers": (edit_config(modules_to_save=[5]), "modules_to_save"),
    "modules to save not named": (edit_config(modules_to_save=None), r"head\."),
    "another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "no method": (edit_config(peft_type=None), "peft_type is None"),
    "DoRA": (edit_config(use_dora=True), "method is 'lora' there and 'dora' here"),
    "trained biases": (edit_config(bias="all"), "bias='all'"),
    "a transposed base": (edit_config(fan_in_fan_out=True), "fan_in_fan_out"),
    # header
    "header damaged": (lambda f: set_header(f, "not json"), f"{WEIGHTS} has a damaged header"),
    "header deeply nested": (lambda f: set_header(f, "[" * 100_000), f"{WEIGHTS} has a damaged header"),
}


def set_null(folder: Path, key: str) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | {key: None}))


def set_header(folder: Path, text: str) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"lightning_lora": text})


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within the context nothing about ``model`` changes: its modules, every bit of its state, what is trained."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    yield
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs


@pytest.mark.parametrize("present", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize(("damage", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_name_and_changes_nothing(damage, words, present, folder):
    damage(folder)
    model = trained(seed=9) if present else base()
    with unchanged(model), pytest.raises(AdapterError, match=words) as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("present", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("part", [i / 16 for i in range(16)])
def test_a_file_cut_anywhere_is_refused(part, present, folder):
    truncate(WEIGHTS, part)(folder)
    model = trained(seed=9) if present else base()
    with unchanged(model), pytest.raises(AdapterError, match=WEIGHTS):
        load_adapter(model, folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_file_is_refused_unread(suffix, folder):
    file = folder / f"adapter_model{suffix}"
    file.write_bytes(b"never read")
    model = base()
    with unchanged(model), pytest.raises(AdapterError, match="pickle"):
        load_adapter(model, file)
    (folder / WEIGHTS).unlink()
    with unchanged(model), pytest.raises(AdapterError, match="pickle"):
        load_adapter(model, folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_of_the_folder_in_its_place_is_refused_with_the_remedy(name, folder):
    with pytest.raises(AdapterError, match="pass the folder"):
        load_adapter(base(), folder / name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere: no such folder"):
        load_adapter(base(), tmp_path / "nowhere")


def test_layers_that_the_model_lacks_are_named(folder):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    with unchanged(model), pytest.raises(AdapterError, match=r"2 of 2 adapted layers are not in Sequential: body\.0"):
        load_adapter(model, folder)


def test_one_level_too_deep_is_refused(folder):
    model = nn.ModuleDict({"net": base()})
    with unchanged(model), pytest.raises(AdapterError, match=r"body\.0.*one level up or down"):
        load_adapter(model, folder)


def test_a_model_of_another_width_is_refused(folder):
    model = base(width=10)
    with unchanged(model), pytest.raises(AdapterError, match=r"body\.0\.lora_B has shape \(8, 2\), expected \(10, 2\)"):
        load_adapter(model, folder)


def test_a_layer_that_is_no_linear_one_in_the_model_is_named(folder):
    model = base()
    model.body[2] = nn.Identity()
    with unchanged(model), pytest.raises(AdapterError, match=r"body\.2 is a Identity"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("targets", "train", "words"),
    [
        ({"body.0": LoRAConfig(r=3, alpha=3), "body.2": TARGETS["body.2"]}, ["head"], "of another kind: r is"),
        ({"body.0": LoRAConfig(r=2, alpha=4), "body.2": TARGETS["body.2"]}, ["head"], "of another kind: alpha is"),
        ({"body.0": TARGETS["body.0"]}, ["head"], "of another kind: .*body.2 only there"),
        ({**TARGETS, "head": LoRAConfig(r=1)}, [], "head"),
        (TARGETS, [], "of another kind: train: head"),
        (TARGETS, ["head", "norm"], "of another kind: train: .*norm"),
    ],
    ids=["rank", "alpha", "fewer layers", "adapted head", "head not trained", "norm trained too"],
)
def test_an_adapter_of_another_kind_is_not_overwritten(targets, train, words, folder):
    model = inject(base(), targets, train=train)
    with unchanged(model), pytest.raises(AdapterError, match=words):
        load_adapter(model, folder)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "items"])
def test_a_name_that_cannot_be_one_is_refused(name, folder):
    model = base()
    with unchanged(model), pytest.raises(AdapterError, match="adapter name"):
        load_adapter(model, folder, name=name)


# ---- writing


def other(seed: int = 7) -> nn.Module:
    return trained(seed=seed)


def test_nan_is_never_written_over_a_good_adapter(folder):
    before, model = contents(folder), trained(seed=7)
    model.body[2].adapter("default").lora_A.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"body\.2\.lora_A"):
        save_adapter(model, folder)
    assert contents(folder) == before


def test_parameters_of_no_adapter_and_no_whole_module_are_not_lost_silently(tmp_path):
    model = trained()
    model.norm.weight.requires_grad_(True)  # its bias is not
    with pytest.raises(AdapterError, match=r"norm\.weight is trained but part of no adapter"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        ({"body.0": LoRAConfig(r=2, dropout=0.1), "body.2": LoRAConfig(r=2)}, "dropout"),
        ({"body.0": LoRAConfig(r=2, scaling="rslora"), "body.2": LoRAConfig(r=2)}, "scaling"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(targets, word, tmp_path):
    with pytest.raises(AdapterError, match=f"one {word} for all layers"):
        save_adapter(inject(base(), targets), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_file_where_the_folder_should_be_is_left_alone(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(OSError, match="adapter"):
        save_adapter(trained(), path)
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_directory_where_a_file_should_be_leaves_no_litter(name, tmp_path):
    (tmp_path / name / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=name.replace(".", r"\.")):
        save_adapter(trained(), tmp_path)
    assert set(os.listdir(tmp_path)) <= {WEIGHTS, CONFIG}
    assert os.listdir(tmp_path / name) == ["inside"]


def test_a_second_save_replaces_the_first_and_leaves_no_litter(folder):
    save_adapter(other(), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    assert_same_state(load_adapter(base(), folder), other())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes: a full disk, as far as a writer can tell."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_a_full_disk_leaves_the_adapter_that_was_there(size, folder):
    before, model = contents(folder), other()
    with pytest.raises(OSError, match="large"), file_size_limit(size):
        save_adapter(model, folder)
    assert contents(folder) == before
    assert_same_state(load_adapter(base(), folder), trained())


def test_a_config_of_another_save_is_noticed(folder, tmp_path):
    save_adapter(inject(base(), TARGETS | {"body.2": LoRAConfig(r=4, alpha=50)}, train=["head"]), tmp_path / "newer")
    (tmp_path / "newer" / WEIGHTS).replace(folder / WEIGHTS)  # as a crash between the two files leaves it
    with pytest.raises(AdapterError, match="disagree, one was changed or they are of two saves"):
        load_adapter(base(), folder)


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_adapter(trained(), tmp_path / "adapter")
        save_adapter(other(), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert modes == {CONFIG: mode, WEIGHTS: mode}


def test_the_config_is_sorted_json_that_ends_in_a_newline(folder):
    text = (folder / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["target_modules"] == ["0", "2"]
    assert json.loads(text)["modules_to_save"] == ["head"]


def test_a_trained_head_that_is_tied_to_the_embedding_is_saved_and_loaded(tmp_path):
    def tied():
        torch.manual_seed(3)
        net = TiedNet(out=16)
        net.head.weight = net.embed.weight
        return net

    net = randomize(inject(tied(), "q_proj", train="head"))
    save_adapter(net, tmp_path)
    loaded = load_adapter(tied(), tmp_path)
    assert torch.equal(loaded.head.weight, net.head.weight)
    assert loaded.head.weight is loaded.embed.weight


def test_a_model_that_is_frozen_before_it_is_saved_keeps_its_trained_head(net, tmp_path):
    randomize(inject(net, train="head"))
    save_adapter(net, tmp_path / "trainable")
    save_adapter(net.eval().requires_grad_(False), tmp_path / "frozen")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("trainable", "frozen")]
    assert files[0] == files[1]
    assert b"base_model.model.head.weight" in files[0]
