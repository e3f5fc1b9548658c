"""Mapping algebra: rearranges whole Hugging Face tensors into Megatron parameters and cuts them for one rank.

Pure data and integers: no model, no process, no file.
"""

from megabridge.mapping.boxes import Axis, Cut, Run
from megabridge.mapping.dims import Dims
from megabridge.mapping.layout import (
    ConcatRows,
    Fuse,
    FusedSource,
    Interleave,
    InterleaveColumns,
    Layout,
    PerRow,
    Piece,
    Same,
    Select,
    Stack,
    Transpose,
    Unsqueeze,
)
from megabridge.mapping.rules import Resolved, Rule, WeightMap, block, natural, weight
from megabridge.mapping.transfer import Transfer, coalesced, coalescible, transfers, whole

__all__ = [
    "Axis",
    "ConcatRows",
    "Cut",
    "Dims",
    "Fuse",
    "FusedSource",
    "Interleave",
    "InterleaveColumns",
    "Layout",
    "PerRow",
    "Piece",
    "Resolved",
    "Rule",
    "Run",
    "Same",
    "Select",
    "Stack",
    "Transfer",
    "Transpose",
    "Unsqueeze",
    "WeightMap",
    "block",
    "coalesced",
    "coalescible",
    "natural",
    "transfers",
    "weight",
    "whole",
]
