"""Reports of imports and exports, as dataclasses and as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from megabridge.hf.dtypes import Casts, name


@dataclass(frozen=True)
class Report:
    """The result of one import or export, over all ranks.

    `tensors` and `bytes` count the Hugging Face side; `bytes_copied` counts what all ranks copied out of or into files,
    `bytes_kept` what an export found written already by one that was killed. `seconds` is the time without verification.
    `mismatched` names tensors whose bits differ after the cast to the target's dtype. `rounded` has by name the tensors that an
    import rounded, or that an export has with less precision than its source: the dtype that they had, and the one that can't hold
    it. `cast` are those of an export whose parameters have more precision than the files: bits are compared after the cast.
    `dtypes` counts tensors by their dtype in the files.
    """

    tensors: int
    bytes: int
    bytes_copied: int
    seconds: float
    verify_seconds: float
    mismatched: tuple[str, ...]
    max_abs_diff: float
    is_verified: bool
    rounded: Casts = field(default_factory=dict)
    cast: Casts = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    bytes_kept: int = 0
    copied_by_rank: tuple[int, ...] = ()
    """Imports only: bytes that each rank copied out of files into its parameters."""
    fetched_by_node: tuple[int, ...] = ()
    """Imports only: bytes of distinct pages (4 KiB) that each node's ranks touched, each read from storage at most once."""

    def metrics(self) -> dict[str, float]:
        """Returns figures by name, for loggers. `gb_per_s` counts 10^9 bytes of the Hugging Face side."""
        return {
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "gb_per_s": self.bytes / self.seconds / 1e9 if self.seconds else 0.0,
            "verify_seconds": self.verify_seconds,
            "mismatched_tensors": len(self.mismatched),
            "rounded_tensors": len(self.rounded),
            "cast_tensors": len(self.cast),
            "max_abs_diff": self.max_abs_diff,
        }

    def __str__(self) -> str:
        verified = (
            f"{len(self.mismatched)} mismatched{f', max abs difference {self.max_abs_diff:g}' if self.max_abs_diff else ''}"
            if self.is_verified
            else "not verified"
        )
        kept = f" ({self.bytes_kept / 1e6:.1f} MB were there already)" if self.bytes_kept else ""
        mixed = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items()) if len(self.dtypes) > 1 else ""
        rounded = f"; {len(self.rounded)} rounded" if self.rounded else ""
        kinds = Counter(self.cast.values()).most_common()
        rounded += "".join(f"; {count} cast from {name(before)} to {name(now)}" for (before, now), count in kinds)
        return (
            f"{self.tensors} tensors{f' ({mixed})' if mixed else ''}, {self.bytes / 1e6:.1f} MB{kept} in {self.seconds:.2f} s, "
            f"{verified}{rounded}"
        )
