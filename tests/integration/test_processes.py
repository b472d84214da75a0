"""Two processes on the CPU (gloo) train what one trains, on stock strategies; what would drift apart is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.multiprocessing import ProcessRaisedException

from lightning_lora import LoRACallback, UnsupportedError, load_from_checkpoint, merge
from tests.integration import workers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all scenarios of ``workers`` have left what they saw; they share one start of the processes."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.integration.workers", str(folder), *workers.SCENARIOS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    (folder / "log").write_text(run.stderr)
    assert run.returncode == 0, run.stderr[:9000]
    return folder


@pytest.fixture
def seen(folder):
    return lambda scenario: [torch.load(folder / f"{scenario}.{rank}.pt", weights_only=True) for rank in range(2)]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def one_process():
    return {
        quantization: workers.train_20_steps(SingleDeviceStrategy(), 1, quantization, None)
        for quantization in (None, "nf4")
    }


@pytest.mark.parametrize(("scenario", "quantization"), [("ddp_dense", None), ("ddp_nf4", "nf4")])
def test_ddp_trains_what_one_process_trains(seen, one_process, scenario, quantization):
    """Over 20 steps; the order in which a batch's losses are summed is all that differs."""
    first, second = seen(scenario)
    assert first["steps"] == one_process[quantization]["steps"] == 20
    assert largest_difference(first["state"], one_process[quantization]["state"]) <= 1e-6
    assert equal(first["state"], second["state"])


def test_adapters_fitted_to_their_base_are_the_same_in_all_processes(seen):
    """One thread for one process, as torchrun gives each: a decomposition rounds by their number, a code then jumps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = workers.train_20_steps(SingleDeviceStrategy(), 1, "nf4", None, "loftq")
    finally:
        torch.set_num_threads(threads)
    first, second = seen("ddp_loftq")
    assert largest_difference(first["state"], one["state"]) <= 1e-6
    assert equal(first["state"], second["state"])


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_adapters_that_start_from_data_start_where_the_first_process_says(seen, quantization):
    """Each sees another share; a decomposition rounds by the number of threads, by far less than the shares differ."""
    one = workers.start_from_data(SingleDeviceStrategy(), 1, quantization)
    first, second = (result[str(quantization)] for result in seen("ddp_from_data"))
    assert largest_difference(first["start"], one["start"]) <= 1e-4
    assert equal(first["start"], second["start"])
    assert equal(first["state"], second["state"])


def test_a_sharded_module_that_would_start_from_data_is_refused(seen):
    for result in seen("fsdp_refusals"):
        assert result["from data"].startswith("UnsupportedError: init='eva' runs the whole model on a few batches")
        assert "before fully_shard" in result["from data"]


@pytest.mark.parametrize("scenario", ["ddp_dense", "ddp_nf4", "ddp_nf4_8bit", "ddp_loftq"])
def test_ddp_exchanges_the_gradients_of_adapters_alone(seen, scenario):
    for result in seen(scenario):
        assert result["reduced"] == [result["gradient_bytes"]] * 20
        assert result["sent_buffers"] == 0


@pytest.mark.parametrize("scenario", ["ddp_dense", "ddp_nf4", "ddp_nf4_8bit"])
def test_after_ddp_every_process_holds_the_same_merged_model(seen, scenario):
    first, second = seen(scenario)
    assert equal(first["state"], second["state"])
    assert torch.equal(first["merged"], second["merged"])
    assert first["keys"] == list(workers.Module().state_dict())
    assert first["tested"] == second["tested"]


def test_the_strategy_lora_ddp_is_the_callback_over_ddp(seen):
    named, plain = seen("ddp_by_name"), seen("ddp_nf4_8bit")
    assert equal(named[0]["state"], named[1]["state"])
    assert named[0]["keys"] == plain[0]["keys"]


def test_ddp_resumes_bit_for_bit_with_each_process_drawing_its_own_dropout(seen):
    results = seen("ddp_resumed")
    for result in results:
        assert result["resumed"] == result["losses"]
        assert equal(result["resumed_state"], result["state"])
    assert results[0]["losses"] != results[1]["losses"]


def test_bases_that_differ_between_processes_are_refused_before_they_are_quantized(seen):
    for result in seen("ddp_of_unequal_bases"):
        assert result["error"].startswith("QuantizationError: the base weights of net.2 are not the same in all 2")
        assert "seed_everything" in result["error"]


def test_dense_bases_that_differ_are_those_of_the_first_process(seen):
    first, second = seen("ddp_of_unequal_dense_bases")
    assert torch.equal(first["merged"], second["merged"])
    assert equal(first["state"], second["state"])


@pytest.mark.parametrize(("kind", "quantization"), [(workers.Sharded, None), (workers.ShardedInFourBits, "nf4")])
class TestShardedByFSDP2:
    def results(self, seen, kind):
        return seen("fsdp_dense" if kind is workers.Sharded else "fsdp_nf4")

    def test_it_trains_what_one_process_trains(self, seen, one_process, kind, quantization):
        first, second = self.results(seen, kind)
        assert largest_difference(first["state"], one_process[quantization]["state"]) <= 1e-6
        assert equal(first["state"], second["state"])

    def test_each_process_holds_half_of_the_base(self, seen, kind, quantization):
        name = "net.2.base_layer." + ("codes" if quantization else "weight")
        for result in self.results(seen, kind):
            assert result["local"][name] * 2 == result["full"][name]

    def test_its_checkpoint_is_read_by_one_process(self, seen, folder, kind, quantization):
        first, _ = self.results(seen, kind)
        path = folder / f"{kind.__name__}.ckpt"
        keys = torch.load(path, weights_only=True)["state_dict"].keys()
        assert keys == first["state"].keys()
        module = load_from_checkpoint(workers.Module, path)
        assert equal({name: module.state_dict()[name] for name in keys}, first["state"])
        assert list(merge(module).state_dict()) == list(workers.Module().state_dict())

    def test_it_resumes(self, seen, kind, quantization):
        first, second = self.results(seen, kind)
        assert first["more_steps"] == 40
        assert sum(first["more_losses"]) < sum(first["losses"])
        assert equal(first["more_state"], second["more_state"])

    def test_its_checkpoint_is_refused_by_another_fine_tune(self, seen, kind, quantization):
        for result in self.results(seen, kind):
            assert "CheckpointError: this checkpoint belongs to another fine-tune" in result["of another rank"]
            assert "r is 8 there and 2 here" in result["of another rank"]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_monitor_logs_in_two_processes_what_it_logs_in_one(seen, quantization):
    """Norms, ranks and gradients to rounding. Tokens are those of both, over the time of the slower."""
    one = workers.monitor_20_steps(SingleDeviceStrategy(), 1, quantization)
    for result in seen("monitored"):
        rows = result[str(quantization)]
        assert rows.keys() == one.keys() == {4, 9, 14, 19}
        for step, row in rows.items():
            for name in ("update_norm", "effective_rank", "stable_rank", "grad_norm/lora_A", "grad_norm/lora_B"):
                assert row[f"lora/{name}"] == pytest.approx(one[step][f"lora/{name}"], rel=1e-4)
            assert row["lora/tokens_per_second"] == one[step]["lora/tokens_per_second"] / 2
    first, second = seen("monitored")
    assert first[str(quantization)][19] == second[str(quantization)][19]


def test_metrics_of_two_processes_are_those_of_all_their_updates(seen):
    one = workers.metrics_of_my_share()
    assert one.pop("throughput") == 250  # 1000 tokens in 4 s
    for result in seen("monitored"):
        found = result["metrics"]
        assert found.pop("throughput") == 250  # 300 in 2 s and 700 in 4 s, at the same time
        for name, value in one.items():
            assert torch.allclose(found[name], value, rtol=1e-12), name  # sums of float64 in another order


def test_lightnings_boring_model_runs_in_two_processes_without_a_warning(seen):
    for result in seen("boring"):
        assert result["steps"] == {
            f"{name} {quantization}": 3 for quantization in (None, "nf4") for name in ("lora_ddp", "ddp", "fsdp2")
        }


def test_what_fsdp2_would_let_drift_apart_is_refused(seen):
    for result in seen("fsdp_refusals"):
        assert "UnsupportedError: net.0, net.2 is sharded already" in result["after"]
        assert "Call inject(self, ...) in configure_model, before fully_shard" in result["after"]
        assert "2 trained parameters are not sharded" in result["in part"]
        assert "LoRACallback(merge=False), LoRACallback(optimizer=None)" in result["defaults"]


def test_processes_that_would_take_the_adapters_with_them_are_refused():
    run = workers.trainer(LoRACallback(r=4), strategy="ddp_fork", devices=2)
    with pytest.raises(ProcessRaisedException, match=r"DDPStrategy starts its processes by 'fork'.*strategy='ddp'"):
        run.fit(workers.Module(), workers.shuffled_loader())


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_strategy_for_one_device_refuses_two(name):
    with pytest.raises(UnsupportedError, match=r"train on one device, and the Trainer has 2.*'lora_ddp'"):
        Trainer(strategy=name, accelerator="cpu", devices=2)
