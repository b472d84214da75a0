"""Runs from YAML: the same as from Python, the same again from the saved file, and refused where a key is misspelt."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file

from lightning_lora import BAdam, GaLore, LoRACallback, LoRACLI, NF4Config
from lightning_lora.cli.main import main
from tests.cli.toy import Data, Scheduled, WithSteps

ROOT = Path(__file__).parents[2]
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(autouse=True)
def _as_a_program(monkeypatch):
    """The command line is ours, not pytest's, and signal handlers and the path are left as they were."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path):
    """Write a YAML file of a small run; sections given replace or extend its own."""

    def write(**sections) -> str:
        content = {
            "seed_everything": 7,
            "lora": {"r": 4},
            "trainer": {**QUIET, "default_root_dir": str(tmp_path / "run"), **sections.pop("trainer", {})},
            "model": {"class_path": "tests.cli.toy.Scheduled"},
            "data": {"class_path": "tests.cli.toy.Data"},
            **sections,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def lora_of(trainer: Trainer) -> LoRACallback:
    (lora,) = (callback for callback in trainer.callbacks if isinstance(callback, LoRACallback))
    return lora


def assert_same_run(found, expected) -> None:
    assert found.losses == expected.losses
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ({"r": 4, "dropout": 0.1}, {"r": 4, "dropout": 0.1}),
        (
            {"r": 4, "quantization": {"block_size": 128, "double_quant": False}},
            {"r": 4, "quantization": NF4Config(block_size=128, double_quant=False)},
        ),
        ({"r": 4, "quantization": None, "optimizer": None}, {"r": 4, "quantization": None, "optimizer": None}),
        (
            {"method": "full", "optimizer": {"name": "galore_adamw", "rank": 3}},
            {"method": "full", "optimizer": GaLore(rank=3)},
        ),
        ({"method": "full", "optimizer": {"switch_every": 2}}, {"method": "full", "optimizer": BAdam(switch_every=2)}),
    ],
    ids=["nf4", "nf4 with settings", "dense", "GaLore", "BAdam"],
)
def test_one_yaml_file_gives_the_run_of_python_bit_for_bit(config, tmp_path, section, arguments):
    ran = LoRACLI(args=["fit", "--config", config(lora=section)])
    seed_everything(7, workers=True)
    module, data = Scheduled(), Data()
    trainer = Trainer(callbacks=[LoRACallback(**arguments)], default_root_dir=tmp_path / "python", **QUIET)
    trainer.fit(module, data)
    assert len(module.losses) == 8
    assert_same_run(ran.model, module)


@pytest.mark.parametrize(
    "section", [{"r": 4, "init": "eva", "eva_batches": 3}, {"r": 4, "memory": "1GB"}], ids=["EVA", "a budget"]
)
def test_what_a_run_makes_of_its_first_batches_is_named_in_yaml(config, tmp_path, section):
    ran = LoRACLI(args=["fit", "--config", config(lora=section, model={"class_path": "tests.cli.toy.WithSteps"})])
    seed_everything(7, workers=True)
    module = WithSteps()
    trainer = Trainer(callbacks=[LoRACallback(**section)], default_root_dir=tmp_path / "python", **QUIET)
    trainer.fit(module, Data())
    assert_same_run(ran.model, module)


def test_the_stock_cli_with_the_callback_gives_the_same_run(config, tmp_path):
    ran = LoRACLI(args=["fit", "--config", config()])
    callbacks = [{"class_path": "lightning_lora.LoRACallback", "init_args": {"r": 4}}]
    content = yaml.safe_load(Path(config(trainer={"callbacks": callbacks})).read_text())
    content["trainer"]["default_root_dir"] = str(tmp_path / "stock")
    del content["lora"]
    (tmp_path / "stock.yaml").write_text(yaml.safe_dump(content))
    stock = LightningCLI(args=["fit", "--config", str(tmp_path / "stock.yaml")])
    assert_same_run(stock.model, ran.model)


@pytest.mark.parametrize(
    "section",
    [
        {"targets": "q_proj"},
        {"targets": ["q_proj", "up_proj"], "exclude": "*.[0-0].up_proj", "train": ["head"], "train_bias": "all"},
        {"targets": {"all-linear": {}, "*.q_proj": {"r": 8, "alpha": 4}}, "quantization": None},
        {"quantization": {"block_size": 32, "double_quant": False, "compute_dtype": "torch.bfloat16"}},
    ],
    ids=["a name", "lists", "a mapping", "storage with settings"],
)
def test_the_saved_config_repeats_the_run(config, tmp_path, section):
    first = LoRACLI(args=["fit", "--config", config(lora={"r": 4, "dropout": 0.1, **section})])
    saved = tmp_path / "run" / "config.yaml"
    again = LoRACLI(args=["fit", "--config", str(saved), "--trainer.default_root_dir", str(tmp_path / "again")])
    ours, theirs = lora_of(again.trainer), lora_of(first.trainer)
    for name in ("settings", "swap", "merge"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert_same_run(again.model, first.model)
    resaved = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert resaved["lora"] == yaml.safe_load(saved.read_text())["lora"]


def test_a_run_without_a_seed_saves_the_one_it_drew(config, tmp_path):
    first = LoRACLI(args=["fit", "--config", config(), "--seed_everything", "true"])
    again = ["--trainer.default_root_dir", str(tmp_path / "again")]
    second = LoRACLI(args=["fit", "--config", str(tmp_path / "run" / "config.yaml"), *again])
    assert_same_run(second.model, first.model)


@pytest.mark.parametrize(
    ("options", "attribute", "value"),
    [
        (["--targets", "q_proj"], "targets", "q_proj"),
        (["--targets", "[q_proj, '*.up_proj']"], "targets", ("q_proj", "*.up_proj")),
        (["--targets+", "head"], "targets", ("all-linear", "head")),
        (["--quantization", "null"], "quantization", None),
        (["--quantization", "{block_size: 128}"], "quantization", NF4Config(block_size=128)),
        (["--quantization.block_size", "128"], "quantization", NF4Config(block_size=128)),
        (["--optimizer", "null"], "swap", None),
        (["--memory", "24GB"], "memory", 24 * 10**9),
        (["--train", "head"], "train", ("head",)),
        (["--merge", "false"], "merge", False),
        (["--output_dir", "null"], "output_dir", None),
        (["--output_dir", "out"], "output_dir", "out"),
    ],
    ids=str,
)
def test_every_value_can_be_set_on_the_command_line(options, attribute, value):
    option, given = options
    arguments = [f"--lora.{option[2:]}", given]
    made = LoRACLI(Scheduled, Data, run=False, args=[*arguments, "--trainer.logger=false"], seed_everything_default=1)
    lora = lora_of(made.trainer)
    assert getattr(lora if hasattr(lora, attribute) else lora.settings, attribute) == value


@pytest.mark.parametrize(
    ("section", "trained_by"),
    [({"r": 4}, "FlatPagedAdamW8bit"), ({"r": 4, "quantization": None, "optimizer": None}, "AdamW")],
    ids=["qlora", "lora"],
)
def test_the_optimizer_section_trains_the_adapters_on_its_schedule(config, section, trained_by):
    """It is built with the model, before there are adapters."""
    path = config(lora=section, model={"class_path": "tests.cli.toy.Toy"})
    optimizer = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01"]
    schedule = ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    ran = LoRACLI(args=["fit", "--config", path, *optimizer, *schedule])
    assert ran.model.losses[-1] < ran.model.losses[0]
    assert ran.model.rates == pytest.approx([0.01] * 4 + [0.005] * 4)
    assert type(ran.trainer.optimizers[0]).__name__ == trained_by


def test_an_optimizer_as_an_argument_of_the_model_trains_the_adapters(config):
    arguments = {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "schedule": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}},
    }
    ran = LoRACLI(
        args=["fit", "--config", config(model={"class_path": "tests.cli.toy.Injected", "init_args": arguments})]
    )
    assert ran.model.losses[-1] < ran.model.losses[0]
    assert ran.model.rates == pytest.approx([0.01] * 4 + [0.005] * 4)


def test_short_names_work_once_imported_and_bitsandbytes_does_not_make_them_ambiguous(config, tmp_path):
    """In a process of its own: once bitsandbytes is imported, there are two classes called AdamW."""
    code = f"""
import sys
from lightning_lora import LoRACLI
import tests.cli.toy
assert "bitsandbytes" not in sys.modules
LoRACLI(args=["fit", "--config", {config()!r}, "--model=Toy", "--data=Data", "--optimizer=AdamW",
    "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--trainer.callbacks=LearningRateMonitor",
    "--trainer.logger=CSVLogger", "--trainer.logger.save_dir={tmp_path}", "--trainer.fast_dev_run=true"])
print("ran")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert said.stdout.strip().endswith("ran"), said.stderr


MISSPELT = [
    (["--lora.rnk", "8"], {}, "there is no option --lora.rnk. Did you mean --lora.r?"),
    (["--lora.lora_alpha", "8"], {}, "Did you mean --lora.alpha?"),
    (["--trainer.max_epoch", "2"], {}, "there is no option --trainer.max_epoch. Did you mean --trainer.max_epochs?"),
    (["--lora.drop", "0.1"], {}, "there is no option --lora.drop. Did you mean --lora.dropout?"),
    (["--trainer.max_ep=1"], {}, "there is no option --trainer.max_ep. Did you mean --trainer.max_epochs?"),
    (["--model.lrr", "1"], {}, "model: tests.cli.toy.Scheduled: there is no key lrr. Did you mean lr?"),
    (["--model.wid", "8"], {}, "model: tests.cli.toy.Scheduled: there is no key wid. Did you mean width?"),
    (["--data.cuont", "8"], {}, "data: tests.cli.toy.Data: there is no key cuont. Did you mean count?"),
    (["--model", "Schedule"], {}, "model: no imported class is called Schedule. Did you mean Scheduled?"),
    (["--trainer.callbacks", "ModelChekpoint"], {}, "Did you mean ModelCheckpoint?"),
    ([], {"lora": {"rnk": 8}}, "there is no key lora.rnk. Did you mean lora.r?"),
    ([], {"lora": {"target_modules": "q_proj"}}, "there is no key lora.target_modules. Did you mean lora.targets?"),
    ([], {"lroa": {"r": 8}}, "there is no key lroa.r. Did you mean lora.r?"),
    ([], {"r": 8}, "there is no key r. Did you mean lora.r?"),
    ([], {"trainer": {"max_epoch": 2}}, "there is no key trainer.max_epoch. Did you mean trainer.max_epochs?"),
    ([], {"lora": {"quantization": {"blok_size": 64}}}, "there is no key blok_size. Did you mean block_size?"),
    (
        [],
        {"model": {"class_path": "tests.cli.toy.Scheduled", "init_args": {"lrr": 1.0}}},
        "model: tests.cli.toy.Scheduled: there is no key lrr. Did you mean lr?",
    ),
    (
        [],
        {"model": {"class_path": "tests.cli.toy.Scheduled", "lr": 1.0}},
        "beside class_path only init_args and dict_kwargs may stand",
    ),
    (
        [],
        {"model": {"class_path": "absent.Model"}},
        "absent.Model: No module named 'absent'. Modules are looked for",
    ),
    (["--lora.r", "many"], {}, "lora.r: Expected a int. Got value: many"),
    (
        [],
        {"lora": {"quantization": "nf5"}},
        "lora: quantization must be one of auto, nf4, fp4, nf3, nf2, int8, None",
    ),
    ([], {"lora": {"quantization": {"block_size": 65}}}, "lora: block_size must be one of 32, 64, 128,"),
    ([], {"lora": {"r": 0}}, "lora: r must be at least 1, got 0. Typical ranks: 8, 16, 64"),
    ([], {"lora": {"targets": {"*.q_proj": {"rk": 8}}}}, "lora: targets['*.q_proj'] has rk; fields are r, alpha"),
    (["--zzz", "1"], {}, "there is no option --zzz. Known here: config, print_config, seed_everything, lora, trainer"),
]


@pytest.mark.parametrize(("options", "sections", "said"), MISSPELT, ids=[said for *_, said in MISSPELT])
def test_what_does_not_exist_is_refused_with_what_does(config, capsys, options, sections, said):
    arguments = ["fit", "--config", config(**sections), *options]
    with pytest.raises(SystemExit) as stop:
        LoRACLI(args=arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.replace("Seed set to 7\n", "")
    assert said in error
    assert len(error.splitlines()) == 2
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"callbacks": [{"class_path": "lightning_lora.LoRACallback"}]}, "Drop it from trainer.callbacks"),
        ({"callbacks": {"class_path": "LoRACallback", "init_args": {"r": 2}}}, "Drop it from trainer.callbacks"),
        ({"strategy": "qlora"}, "trainer.strategy qlora adapts the model, and so does the section lora:"),
    ],
)
def test_a_second_lora_beside_the_section_is_refused(config, capsys, trainer, said):
    assert main(["fit", "--config", config(trainer=trainer)]) == 2
    assert said in capsys.readouterr().err


def test_a_callback_that_the_program_always_adds_is_refused_too(config, capsys):
    with pytest.raises(SystemExit):
        LoRACLI(args=["fit", "--config", config()], trainer_defaults={"callbacks": LoRACallback()})
    assert "Drop it from trainer.callbacks" in capsys.readouterr().err


def test_a_subclass_that_adds_arguments_keeps_the_section(config):
    class WithLinks(LoRACLI):
        def add_arguments_to_parser(self, parser):
            parser.add_argument("--size", type=int, default=16)
            parser.link_arguments("size", "lora.r")

    made = WithLinks(args=["fit", "--config", config(lora={}), "--size=2", "--trainer.fast_dev_run=true"])
    assert lora_of(made.trainer).settings.config.r == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoints_of_a_run_are_tested_and_predicted_from(config, tmp_path):
    path = config(trainer={"enable_checkpointing": True})
    assert main(["fit", "--config", path]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert all("lora_" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])
    for command in ("validate", "test", "predict"):
        elsewhere = ["--trainer.default_root_dir", str(tmp_path / command)]
        assert main([command, "--config", path, "--ckpt_path", str(checkpoint), *elsewhere]) == 0


def test_help_of_the_command_names_the_four_and_theirs_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in ("fit", "validate", "test", "predict"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example: lightning-lora fit --config run.yaml" in said
    assert "--lora.r R Rank of the adapters. (type: int, default: 16)" in said
    assert said.index("--lora.targets") < said.index("--trainer.accelerator")


def test_an_error_in_training_is_told_in_two_lines_and_a_code(config, capsys):
    arguments = ["fit", "--config", config(model={"class_path": "tests.cli.toy.Failing"})]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "lightning-lora fit: RuntimeError: the data ran out of numbers\n(--debug shows where)\n" in error
    assert "Traceback" not in error
    assert main([*arguments, "--trainer.default_root_dir=.", "--trainer.fast_dev_run=true", "--debug"]) == 1
    assert "in training_step" in capsys.readouterr().err


def test_a_model_that_does_not_fit_the_targets_is_told_in_two_lines(config, capsys):
    assert main(["fit", "--config", config(lora={"targets": "qq_proj"})]) == 1
    assert "lightning-lora fit: target 'qq_proj' matches no linear layer" in capsys.readouterr().err


def test_an_interrupt_is_no_success(config):
    model = {"class_path": "tests.cli.toy.Failing", "init_args": {"how": "interrupt"}}
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config(model=model)])
    assert stop.value.code == 1


def test_the_command_finds_models_in_the_current_folder_and_a_sigterm_is_no_success(config, tmp_path):
    """As the console script runs it: with no folder but the installed ones to import from."""
    (tmp_path / "my_model.py").write_text("from tests.cli.toy import Failing as MyModel")
    path = config(model={"class_path": "my_model.MyModel", "init_args": {"how": "sigterm"}})
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from lightning_lora.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "fit", "--config", path]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert said.returncode == 128 + signal.SIGTERM, said.stderr


RECIPES = {path.stem: path for path in (ROOT / "examples" / "configs").glob("*.yaml")}
QUICK = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_parse(monkeypatch, capsys, recipe):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(RECIPES[recipe]), "--print_config"])
    assert stop.value.code == 0
    lora = yaml.safe_load(capsys.readouterr().out)["lora"]
    assert (lora["method"] == "full") if recipe == "full" else (lora["r"] == 8)


@pytest.mark.parametrize("recipe", RECIPES.keys() - {"lora_ddp"})
def test_a_recipe_runs_on_one_device_and_writes_nothing_in_a_trial(monkeypatch, recipe):
    monkeypatch.chdir(ROOT)
    assert main(["fit", "--config", str(RECIPES[recipe]), *QUICK]) == 0
    assert [path for path in ROOT.iterdir() if path.name.endswith("_out")] == []


def test_the_recipe_for_two_processes_runs_as_it_stands(tmp_path):
    """Lightning starts the second process as the first was started, so there has to be a program."""
    program = tmp_path / "lightning-lora"
    program.write_text("from lightning_lora.cli.main import main\n\nif __name__ == '__main__':\n    main()\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), "fit", "--config", str(RECIPES["lora_ddp"]), *QUICK]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in done.stderr


def test_the_qlora_recipe_learns_a_text_of_the_users(monkeypatch, tmp_path):
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    monkeypatch.chdir(ROOT)
    out = ["--lora.output_dir", str(tmp_path / "out"), "--trainer.logger.save_dir", str(tmp_path / "out")]
    quick = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=2"]
    path = ["--data.path", str(tmp_path / "notes.txt")]
    assert main(["fit", "--config", "examples/configs/qlora.yaml", *out, *quick, *path]) == 0
    (metrics,) = (tmp_path / "out").rglob("metrics.csv")
    head, *rows = (line.split(",") for line in metrics.read_text().splitlines())
    held_out = [float(row[head.index("val_bits_per_byte")]) for row in rows if row[head.index("val_bits_per_byte")]]
    assert held_out[-1] < held_out[0]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert not any("adapters" in name for name in load_file(tmp_path / "out" / "merged" / "model.safetensors"))


@pytest.mark.parametrize("name", ["AdapterMonitor", "lightning_lora.AdapterMonitor"])
def test_the_monitor_is_named_in_yaml(config, tmp_path, name):
    monitor = {"class_path": name, "init_args": {"every_n_steps": 4, "metrics": ["update", "memory"], "tokens": "ids"}}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "logs"}}
    ran = LoRACLI(args=["fit", "--config", config(trainer={"callbacks": [monitor], "logger": logger})])
    header, *rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert "lora/update_norm" in header
    assert "lora/tokens_per_second" not in header
    assert len([row for row in rows if row]) >= 2
    assert ran.trainer.callback_metrics["lora/update_norm"] > 0
