"""A run that is killed and resumed from its last checkpoint ends as the uninterrupted one, bit for bit."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdata")

from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.integration.kill_points import (
    BATCH_SIZE,
    Death,
    KilledError,
    Outcome,
    Scenario,
    attempt,
    batches_seen,
    differences,
    last_checkpoint,
    run_killed,
    run_straight,
    seed,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 calls it in every loader
]
ROOT = Path(__file__).parents[2]
COMBINATIONS = list(itertools.product([None, "nf4"], [None, "paged_adamw_8bit"], [1, 4]))


def plain_loader(dataset):
    return DataLoader(dataset, BATCH_SIZE, shuffle=True)


def assert_same_end(scenario: Scenario, tmp_path: Path, **parts) -> Outcome:
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    straight = run_straight(scenario, tmp_path / "straight", **parts)
    killed = run_killed(scenario, tmp_path / "killed", **parts)
    assert differences(straight, killed) == []
    return killed


def test_the_optimizer_states_compared_here_are_of_8_bits(tmp_path):
    states = run_straight(Scenario(limit="steps", accumulation=4), tmp_path).optimizer
    moments = [value for name, value in states.items() if name.rsplit(".", 1)[-1] in {"state1", "state2"}]
    assert len(moments) == 12
    assert {moment.dtype for moment in moments} == {torch.uint8}


# Inside an epoch


@pytest.mark.parametrize("batch", [5, 6, 7, 19])
@pytest.mark.parametrize(("quantization", "optimizer"), [(None, None), ("nf4", "paged_adamw_8bit")])
def test_a_run_killed_inside_an_accumulation_window_loses_no_gradient(tmp_path, quantization, optimizer, batch):
    scenario = Scenario(quantization, optimizer, accumulation=4, deaths=(Death(batch),))
    assert assert_same_end(scenario, tmp_path).resumed_after == [batch]
    entry = torch.load(last_checkpoint(tmp_path / "killed"), weights_only=True)["lightning_lora"]
    assert entry["processes"][0]["gradients"] == {}  # after the last batch of all, nothing is pending


def test_a_checkpoint_inside_a_window_holds_its_gradients(tmp_path):
    seed(0)
    with pytest.raises(KilledError):
        attempt(Scenario(accumulation=4, deaths=(Death(6),)), tmp_path)
    entry = torch.load(last_checkpoint(tmp_path), weights_only=True)["lightning_lora"]
    gradients = entry["processes"][0]["gradients"]
    assert len(gradients) == 6
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_a_run_killed_twice_in_one_epoch_ends_as_the_uninterrupted_one(tmp_path):
    deaths = (Death(13, "backward"), Death(17, "batch start"))
    assert assert_same_end(Scenario(deaths=deaths, schedule="epoch"), tmp_path).resumed_after == [12, 16]


def test_batches_prepared_by_worker_processes_go_on(tmp_path):
    def loader(dataset):
        return StatefulDataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=1)

    assert_same_end(Scenario(deaths=(Death(14),), limit="steps", validate_every=None), tmp_path, loader=loader)


# SIGTERM


@pytest.mark.parametrize(("batch", "accumulation"), [(14, 1), (14, 4), (20, 1), (30, 1)])
def test_sigterm_loses_nothing_of_the_run(tmp_path, batch, accumulation):
    scenario = Scenario(writer="none", deaths=(Death(batch, "sigterm"),), accumulation=accumulation)
    assert assert_same_end(scenario, tmp_path).resumed_after == [batch]
    assert (tmp_path / "killed" / "interrupted.ckpt").exists()


def test_a_process_told_to_stop_exits_with_143_and_names_its_checkpoint(tmp_path):
    scenario = Scenario(writer="none", deaths=(Death(14, "sigterm"),))
    script = (
        "from pathlib import Path\n"
        "from tests.integration.kill_points import Death, Scenario, attempt, seed\n"
        f"seed(0)\nattempt({scenario!r}, Path({str(tmp_path)!r}))\n"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    path = tmp_path / "interrupted.ckpt"
    assert found.returncode == 143, found.stderr
    assert f"stopped by SIGTERM after step 14. Go on with ckpt_path={str(path)!r}" in found.stderr
    assert batches_seen(path) == 14
    seed(99)
    killed = attempt(scenario, tmp_path, path, number=1)
    killed.resumed_after = [14]
    (tmp_path / "straight").mkdir()
    assert differences(run_straight(scenario, tmp_path / "straight"), killed) == []
