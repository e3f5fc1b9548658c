"""Dims: the sizes of a model that layouts use, from its native config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megabridge.errors import MappingError


@dataclass(frozen=True)
class Dims:
    """Sizes of one model, named as in TransformerConfig where it has them."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    tied: bool
    num_moe_experts: int | None = None
    hf_mtp_layers: int | None = None

    @classmethod
    def of(cls, native: Mapping[str, object]) -> Dims:
        """Takes the sizes from a native config (see `Family.native`)."""
        ints = {name: native.get(name) for name in cls.__dataclass_fields__ if name != "tied"}
        return cls(**ints, tied=bool(native["share_embeddings_and_output_weights"]))  # type: ignore[arg-type]

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    def size(self, name: int | str) -> int:
        """Returns `name` if it is a number, else the size of that name. Raises MappingError for an unknown one."""
        if isinstance(name, int):
            return name
        sizes: dict[str, int | None] = {**self.__dict__, "heads_per_group": self.heads_per_group}
        if name not in sizes:
            raise MappingError(f"a layout asks for the size {name!r}, which is not one of {sorted(sizes)}.")
        size = sizes[name]
        if size is None:
            raise MappingError(f"a layout asks for the size {name!r}, which this model doesn't have.")
        return size
