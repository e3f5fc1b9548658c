"""What a rank makes of what its recipe returned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megabridge import worker
from megabridge.errors import ConfigError, MegabridgeError
from megabridge.worker import objective_of


def test_an_objective_is_a_number_or_none() -> None:
    for returned in (2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([2])):
        found = objective_of(returned, "a:b")
        assert found == 2.0 and type(found) is float
    assert objective_of(None, "a:b") is None and str(objective_of(float("nan"), "a:b")) == "nan"
    for returned in ("2", b"2", [2.0], {}, object(), torch.ones(2), 10**400, 2j):
        with pytest.raises(ConfigError, match=r"recipe.target=a:b must return a number or None, not such a \w+; return one\."):
            objective_of(returned, "a:b")


def test_a_full_disk_is_one_sentence_whatever_was_written() -> None:
    for error, said in (
        (OSError(28, "No space left on device", "plan.json"), r"plan\.json can't be written \(No space left on device\)"),
        (
            OSError(122, "Disk quota exceeded"),
            r"a file of the run can't be written \(Disk quota exceeded\); earlier saves are complete",
        ),
    ):
        with pytest.raises(MegabridgeError, match=said), worker._disk_errors():
            raise error
    with pytest.raises(PermissionError), worker._disk_errors():
        raise PermissionError(13, "Permission denied")
