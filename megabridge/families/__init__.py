"""The facts: one small file per architecture. A third party adds one through the entry-point group `megabridge.families`."""

from megabridge.families.core.family import Family, Parameters
from megabridge.families.core.registry import all_families, family_for, register, register_named

__all__ = ["Family", "Parameters", "all_families", "family_for", "register", "register_named"]
