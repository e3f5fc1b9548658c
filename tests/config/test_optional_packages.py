"""Optional packages are named with the command that installs them."""

from __future__ import annotations

import pytest

from megabridge.config import optional_packages
from megabridge.config.optional_packages import Extra
from megabridge.errors import ConfigError


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optional_packages.EXTRAS, "not_there", Extra("not_there", "this", "pip install not-there"))  # type: ignore[arg-type]
    assert not optional_packages.is_installed("not_there") and optional_packages.is_installed("rich")
    optional_packages.require("rich")
    with pytest.raises(ConfigError, match="this needs the package not_there, which is not installed; pip install not-there"):
        optional_packages.require("not_there")
