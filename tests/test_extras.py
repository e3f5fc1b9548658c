"""Optional packages are named with the command that installs them."""

from __future__ import annotations

import pytest

from megabridge import extras
from megabridge.errors import ConfigError
from megabridge.extras import Extra


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "not_there", Extra("not_there", "this", "pip install not-there"))  # type: ignore[arg-type]
    assert not extras.is_installed("not_there") and extras.is_installed("rich")
    extras.require("rich")
    with pytest.raises(ConfigError, match="this needs the package not_there, which is not installed; pip install not-there"):
        extras.require("not_there")
