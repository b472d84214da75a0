"""The largest batch and sequence that fit, and what makes a setup fit."""

import pytest

from lightning_lora.estimation.budget import MOST, Fit, fit, largest
from lightning_lora.estimation.rules import rule_of_thumb
from lightning_lora.estimation.setup import Setup
from lightning_lora.model.sizes import parse_size


@pytest.mark.parametrize("known", [0, 1, 7])
@pytest.mark.parametrize(
    "size", [lambda n: 100 + 13 * n, lambda n: 5 * n * n, lambda n: max(400, 3 * n), lambda n: 64 * (n // 10)]
)
def test_the_largest_that_fits_fits_and_the_next_does_not(size, known):
    found = largest(size, 1000, known)
    assert size(found) <= 1000 < size(found + 1)


def test_few_sizes_are_asked_for_where_they_lie_on_a_line():
    asked = []
    assert largest(lambda n: asked.append(n) or 10_000 + 7 * n, 100_000, 1) == 12857
    assert len(asked) < 15  # halving would take 20 from 2^20 on


def test_what_always_fits_is_looked_for_up_to_a_limit():
    assert largest(lambda n: 1, 10, 1) == MOST


def total(setup, batch, seq):
    base = {"full": 8000, "lora": 2000, "qlora-8bit": 1000, "qlora-4bit": 500, "qlora-3bit": 400, "qlora-2bit": 300}
    return base[setup.method] + batch * seq * (1 if setup.activation_checkpointing else 4)


def test_a_setup_that_fits_is_left_as_it_is():
    found = fit(total, Setup(method="lora"), 4048, batch=1, seq=256)
    assert found == Fit(4048, Setup(method="lora"), (), batch=2, seq=512, total=3024)


def test_what_to_switch_on_begins_with_what_costs_least():
    assert fit(total, Setup(method="lora"), 2300, batch=1, seq=256).changes == ("activation checkpointing",)
    changes = fit(total, Setup(method="full", optimizer="adamw"), 800, batch=1, seq=256).changes
    assert changes == ("activation checkpointing", "optimizer paged_adamw_8bit", "method qlora-4bit")
    assert fit(total, Setup(method="lora"), 100, batch=1, seq=256).setup is None


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000)])
def test_sizes_are_read_with_their_unit(text, size):
    assert parse_size("memory", text) == size


@pytest.mark.parametrize("text", ["24", 24, "GB", "0GB", "-1GB", "24 Gb/s", "24iB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=f"^memory={text!r} is no size; write 24GB"):
        parse_size("memory", text)


def test_the_rule_of_thumb_is_llama_factorys_table():
    assert rule_of_thumb("qlora-4bit", 6_738_415_616) == ("7B", 6)
    assert rule_of_thumb("full", 13_015_864_320) == ("13B", 120)
    assert rule_of_thumb("qlora-2bit", 46_702_792_704) == ("8x7B", 18)
    assert rule_of_thumb("qlora-3bit", 6_738_415_616) is None  # the table has no such row
    assert rule_of_thumb("lora", 1_300_000_000) is None  # and no such column
