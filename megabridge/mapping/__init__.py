"""The algebra: how whole Hugging Face tensors are rearranged into Megatron parameters and cut for one rank.

Data and integers only: no model, no process, no file.
"""

from megabridge.mapping.boxes import Axis, Cut, Run
from megabridge.mapping.dims import Dims
from megabridge.mapping.layout import (
    Below,
    Chosen,
    Fuse,
    Interleave,
    InTurn,
    Joined,
    Layout,
    Piece,
    Rows,
    Same,
    Single,
    Stack,
    Transpose,
)
from megabridge.mapping.rules import Resolved, Rule, WeightMap, block, natural, weight
from megabridge.mapping.transfer import Transfer, together, transfers, whole, woven

__all__ = [
    "Axis",
    "Below",
    "Chosen",
    "Cut",
    "Dims",
    "Fuse",
    "InTurn",
    "Interleave",
    "Joined",
    "Layout",
    "Piece",
    "Resolved",
    "Rows",
    "Rule",
    "Run",
    "Same",
    "Single",
    "Stack",
    "Transfer",
    "Transpose",
    "WeightMap",
    "block",
    "natural",
    "together",
    "transfers",
    "weight",
    "whole",
    "woven",
]
