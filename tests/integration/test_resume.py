"""A run that is killed and resumed from its last checkpoint ends as the uninterrupted one, bit for bit."""

import itertools
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchdata")

from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.integration.kill_points import (
    BATCH_SIZE,
    Death,
    KilledError,
    Outcome,
    Regression,
    Scenario,
    attempt,
    batches_seen,
    differences,
    draw,
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


@pytest.mark.parametrize("number", range(10))
def test_a_run_killed_anywhere_ends_as_the_uninterrupted_one(number, tmp_path):
    """Each combination of base, optimizer and accumulation at least once; more of them in the benchmarks."""
    scenario = draw(random.Random(number), *COMBINATIONS[number % len(COMBINATIONS)])
    assert_same_end(scenario, tmp_path)


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


@pytest.mark.parametrize("batch", [4, 10, 14])
def test_items_that_draw_from_the_global_random_states_are_drawn_the_same(tmp_path, batch):
    assert_same_end(Scenario(augment=True, deaths=(Death(batch),)), tmp_path)


class Estimating(Regression):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 30
        return super().configure_optimizers()


@pytest.mark.parametrize("batch", [10, 14])
def test_the_batches_go_on_when_the_number_of_steps_was_estimated(tmp_path, batch):
    """Lightning issue 20550: estimating makes the loader's iterator before Lightning restores its state."""
    assert_same_end(Scenario(deaths=(Death(batch),)), tmp_path, kind=Estimating)


def test_batches_prepared_by_worker_processes_go_on(tmp_path):
    def loader(dataset):
        return StatefulDataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=1)

    assert_same_end(Scenario(deaths=(Death(14),), limit="steps", validate_every=None), tmp_path, loader=loader)


# At the end of an epoch


@pytest.mark.parametrize("limit", ["epochs", "steps"])
@pytest.mark.parametrize("validate_every", [None, 1.0, 5])
def test_no_epoch_is_lost_after_a_checkpoint_at_its_last_batch(tmp_path, limit, validate_every):
    scenario = Scenario(accumulation=4, deaths=(Death(10),), limit=limit, validate_every=validate_every)
    killed = assert_same_end(scenario, tmp_path)
    assert len(killed.records) == scenario.batches - 10


@pytest.mark.parametrize("limit", ["epochs", "steps"])
@pytest.mark.parametrize("writer", ["epoch", "validation"])
def test_a_stateful_loader_goes_on_shuffling_after_an_epoch(tmp_path, limit, writer):
    scenario = Scenario(writer=writer, deaths=(Death(14), Death(22, "backward")), limit=limit)
    assert assert_same_end(scenario, tmp_path).resumed_after == [10, 20]


@pytest.mark.parametrize("scenario", [Scenario(deaths=(Death(20),)), Scenario(writer="epoch", deaths=(Death(14),))])
def test_with_a_plain_loader_an_epoch_boundary_is_exact(tmp_path, scenario):
    assert_same_end(scenario, tmp_path, loader=plain_loader)


@pytest.mark.parametrize(("writer", "moment"), [("batches", "batch end"), ("none", "sigterm")])
def test_a_run_killed_after_its_last_batch_is_merged_when_it_is_resumed(tmp_path, writer, moment):
    scenario = Scenario(writer=writer, deaths=(Death(30, moment),), validate_every=None)
    killed = assert_same_end(scenario, tmp_path)
    assert killed.records == []
    assert "net.head.weight" in killed.merged
    assert not any("lora_" in name for name in killed.merged)


class DrawingInValidation(Regression):
    """Validation that is part of the run: it draws from the random state."""

    def validation_step(self, batch, _):
        torch.rand(3)
        self.log("val", self.loss(batch))


@pytest.mark.parametrize(("batch", "every"), [(15, 5), (20, 1.0), (20, 5)])
def test_validation_that_was_due_is_run_after_the_resume(tmp_path, batch, every):
    assert_same_end(Scenario(deaths=(Death(batch),), validate_every=every), tmp_path, kind=DrawingInValidation)


@pytest.mark.parametrize(("batch", "every"), [(10, None), (10, 1.0), (14, None), (15, 5)])
def test_losses_are_logged_at_the_steps_of_the_uninterrupted_run(tmp_path, batch, every):
    scenario = Scenario(deaths=(Death(batch),), validate_every=every)
    straight, killed = run_straight(scenario, tmp_path), run_killed(scenario, tmp_path)
    assert killed.logged == straight.logged[batch:]


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


# What cannot be exact is said


def resume(scenario: Scenario, folder: Path, caplog, **parts) -> str:
    caplog.set_level(logging.INFO)
    run_killed(scenario, folder, **parts)
    return caplog.text


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_plain_loader_inside_an_epoch_is_not_silent(tmp_path, caplog, accumulation):
    """Lightning warns unless the optimizer has just not stepped in this epoch; we say so always."""
    scenario = Scenario(accumulation=accumulation, deaths=(Death(14),), validate_every=None)
    seed(0)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        said = resume(scenario, tmp_path, caplog, loader=plain_loader)
    assert "the epoch starts again at its first batch: a training loader has no state_dict" in said


def test_a_plain_loader_inside_the_first_window_of_an_epoch_is_not_silent(tmp_path, caplog):
    scenario = Scenario(accumulation=4, deaths=(Death(12),), validate_every=None)
    said = resume(scenario, tmp_path, caplog, loader=plain_loader)
    assert "the epoch starts again at its first batch: a training loader has no state_dict" in said


class Stream(IterableDataset):
    """A dataset without a length that knows where it is."""

    def __init__(self, items):
        self.items, self.at = items, 0

    def __iter__(self):
        while self.at < len(self.items):
            self.at += 1
            yield self.items[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_loader_without_a_length_is_not_silent(tmp_path, caplog):
    def loader(items):
        return StatefulDataLoader(Stream(items), BATCH_SIZE)

    said = resume(Scenario(deaths=(Death(14),)), tmp_path, caplog, loader=loader)
    assert "Lightning fetches one batch ahead, which is now passed over" in said


def test_a_loader_that_lost_its_state_is_not_silent(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    seed(0)
    with pytest.raises(KilledError):
        attempt(Scenario(deaths=(Death(20),)), tmp_path)
    attempt(Scenario(deaths=()), tmp_path, last_checkpoint(tmp_path), loader=plain_loader)
    assert "the state of more stateful training loaders than there are" in caplog.text


def test_a_checkpoint_written_in_the_middle_of_a_batch_is_not_silent(tmp_path, caplog):
    said = resume(Scenario(writer="exception", deaths=(Death(14, "backward"),)), tmp_path, caplog)
    assert "written in the middle of a batch, which is passed over" in said


class OnPlateau(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}


def test_reduce_on_plateau_is_not_silent(tmp_path, caplog):
    said = resume(Scenario(deaths=(Death(14),)), tmp_path, caplog, kind=OnPlateau)
    assert "passes over the step of ReduceLROnPlateau" in said
