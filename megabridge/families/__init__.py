"""Supported architectures, one small file each. Other packages add theirs through the entry-point group `megabridge.families`."""

from megabridge.families.core.family import Family, Parameters
from megabridge.families.core.registry import all_families, family_for, register, register_named

__all__ = ["Family", "Parameters", "all_families", "family_for", "register", "register_named"]
