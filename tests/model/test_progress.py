"""A bar for what takes long, and silence for what does not."""

import pytest

from lightning_lora.model import progress as module
from lightning_lora.model.progress import progress


def test_what_takes_no_time_is_silent(capfd):
    assert list(progress(range(5), "decomposing")) == [0, 1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("delay", [0.01])
def test_what_takes_long_shows_a_bar(capfd, monkeypatch, delay):
    monkeypatch.setattr(module, "DELAY", delay)
    from time import sleep

    for _ in progress(range(3), "decomposing"):
        sleep(0.15)
    out, err = capfd.readouterr()
    assert out == ""
    assert "LoRA: decomposing" in err
