"""Rotary embeddings of Hugging Face models: the frequencies of each `rope_type`, as transformers computes them.

The formulas are those of transformers/modeling_rope_utils.py (5.23), in the same order and precision, so that the
frequencies are equal bit for bit. megatron-core's own scaling has some factors fixed, and only yarn's default attention
factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, override

import torch
from torch import Tensor

from megabridge.errors import ConfigError, listed
from megabridge.families.core.rope_types import rope_problems

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def inverse_frequencies(rope: Mapping[str, Any], dim: int, length: int = 0) -> tuple[Tensor, float]:
    """Returns the fp32 frequencies [dim / 2] on the CPU, and the factor of cosine and sine.

    `dim` is the width of the rotated part of a head, `length` that of the sequence, on which some types depend. Raises ConfigError
    where `rope_problems` finds any.
    """
    if problems := rope_problems(rope):
        raise ConfigError(listed(problems))
    kind = rope.get("rope_type", "default")
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float) / dim
    if kind == "yarn":
        return _yarn(rope, dim, exponents)
    if kind == "longrope":
        return _longrope(rope, exponents, length)
    base = rope["rope_theta"]
    if kind == "dynamic":
        positions = rope["max_position_embeddings"]
        longest = torch.tensor(length, device="cpu") if length > positions else positions  # a tensor in transformers too, so fp32
        base = base * ((rope["factor"] * longest / positions) - (rope["factor"] - 1)) ** (dim / (dim - 2))
    if kind == "alpha":
        base = base * rope["alpha"] ** (dim / (dim - 2))
    frequencies = 1.0 / (base**exponents)
    if kind == "proportional":
        frequencies[int(rope.get("partial_rotary_factor", 1.0) * dim // 2) :] = 0.0  # these channels are not rotated
        frequencies /= rope.get("factor", 1.0)
    if kind == "linear":
        frequencies /= rope["factor"]
    if kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies, 1.0


def _llama3(rope: Mapping[str, Any], frequencies: Tensor) -> Tensor:
    """Llama 3.1: long waves are divided by `factor`, short ones kept, those between interpolated."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    positions = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > positions / low, frequencies / factor, frequencies)
    smooth = (positions / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelength < positions / high) & ~(wavelength > positions / low)
    return torch.where(is_medium, smoothed, scaled)


def _longrope(rope: Mapping[str, Any], exponents: Tensor, length: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): every channel has a factor of its own, another one past the original length."""
    positions, factor, given = rope["original_max_position_embeddings"], rope["factor"], rope.get("attention_factor")
    factors = torch.tensor(rope["long_factor" if length > positions else "short_factor"], dtype=torch.float32, device="cpu")
    if given is None:
        given = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(positions))
    return 1.0 / (factors * rope["rope_theta"] ** exponents), float(given)


def _yarn(rope: Mapping[str, Any], dim: int, exponents: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation of long waves, extrapolation of short ones, and a sharper softmax."""
    base, factor, positions = rope["rope_theta"], rope["factor"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return (dim * math.log(positions / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low), 0, 1)
    extrapolated = 1 - ramp
    powers = base**exponents
    frequencies = (1.0 / (factor * powers)) * (1 - extrapolated) + (1.0 / powers) * extrapolated
    return frequencies, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    def scale(factor: float, mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    given, mscale, all_dim = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is not None:
        return float(given)
    if mscale and all_dim:
        return float(scale(rope["factor"], mscale) / scale(rope["factor"], all_dim))
    return scale(rope["factor"])


class HFRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """megatron-core's RotaryEmbedding with the frequencies of a Hugging Face `rope_parameters` dict.

    `attention_factor` is the factor of cosine and sine, which CausalLM sets on megatron-core's Attention.
    """

    def __init__(
        self, rope: Mapping[str, Any], *, kv_channels: int, rotary_percent: float, interleaved: bool, cp_group: Any
    ) -> None:
        super().__init__(
            kv_channels,
            rotary_percent,
            rotary_interleaved=interleaved,
            use_cpu_initialization=True,
            cp_group=cp_group,
        )
        self._rope, self._dim = dict(rope), int(kv_channels * rotary_percent)
        self._is_dynamic = rope.get("rope_type") in ("dynamic", "longrope")
        # Not a buffer: it stays fp32 in a bf16 model, and moves to the device at the first forward.
        self.inv_freq, self.attention_factor = inverse_frequencies(rope, self._dim)

    @override
    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """The angles [max_seq_len, 1, 1, rotated part of a head]."""
        if self._is_dynamic:
            self.inv_freq = inverse_frequencies(self._rope, self._dim, max_seq_len)[0].to(self.inv_freq.device)
        angles: Tensor = super().forward(max_seq_len, *args, **kwargs)
        return angles


class LocalAndGlobal(torch.nn.Module):
    """Two rotary embeddings of one model: row 0 of the result is for layers without a window, row 1 for those with one."""

    def __init__(self, everywhere: HFRotaryEmbedding, windowed: HFRotaryEmbedding) -> None:
        super().__init__()
        self.everywhere, self.windowed = everywhere, windowed
        self.get_rotary_seq_len = everywhere.get_rotary_seq_len

    @override
    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """The angles [2, max_seq_len, 1, 1, rotated part of a head]."""
        return torch.stack([rope(max_seq_len, *args, **kwargs) for rope in (self.everywhere, self.windowed)])
