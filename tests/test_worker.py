"""What a rank makes of what its recipe returned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megabridge.errors import ConfigError
from megabridge.worker import objective_of


def test_an_objective_is_a_number_or_none() -> None:
    for returned in (2, 2.0, np.float32(2), torch.tensor(2.0), torch.tensor([2])):
        found = objective_of(returned, "a:b")
        assert found == 2.0 and type(found) is float
    assert objective_of(None, "a:b") is None and str(objective_of(float("nan"), "a:b")) == "nan"
    for returned in ("2", b"2", [2.0], {}, object(), torch.ones(2), 10**400, 2j):
        with pytest.raises(ConfigError, match=r"recipe.target=a:b must return a number or None, not such a \w+; return one\."):
            objective_of(returned, "a:b")
