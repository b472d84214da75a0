"""A module and trainers for it."""

import pytest

from tests.runs import MakeTrainer, Module, fresh, trainers_in


@pytest.fixture
def module() -> Module:
    return fresh()


@pytest.fixture
def trainer(tmp_path) -> MakeTrainer:
    return trainers_in(tmp_path)
