"""Codecs: every stored number decodes to transformers' bits, and any box to the part of the whole tensor, out of what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megabridge.errors import CheckpointError
from megabridge.families.core.quantization import Quantization
from megabridge.hf import tensor_files
from megabridge.hf.quantised_weights import pair_scales
from megabridge.hf.safetensors_format import TensorInfo
from megabridge.hf.tensor_files import PIECE, Reader, Way, find_tensors, native_box, stored_bytes, view
from megabridge.mapping import Cut, Dims, Fuse, FusedSource, Interleave, Same, Stack, Transfer, Transpose, transfers, whole
from megabridge.mapping.layout import Layout
from tests.support.quantised import dequantised, random_fp8

BLOCK = (16, 12)
DIMS = Dims(num_layers=1, hidden_size=1, num_attention_heads=6, num_query_groups=3, vocab_size=1, tied=False)


def opened(folder: Path, tensors: dict[str, torch.Tensor], quantization: Quantization) -> dict[str, TensorInfo]:
    save_file(tensors, folder / "model.safetensors")
    return pair_scales(find_tensors(folder), quantization, folder)


def read(reader: Reader, info: TensorInfo, transfer: Transfer, target: torch.Tensor) -> int:
    """Fills the native side of `transfer` in `target`, as a walk does; returns the bytes of the file that it took."""
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    count = 0
    for part in reader.parts(info, transfer):
        assert not reader.read_into(info, part, target)
        native_box(target, part).copy_(reader.fetch(info, part, lambda: buffer).box)
        count += stored_bytes(info, part)
    return count


def all_of(info: TensorInfo, way: Way = "mapped") -> torch.Tensor:
    out = torch.full(info.shape, torch.nan, dtype=info.dtype)
    with Reader([info], way=way) as reader:
        read(reader, info, whole(info.shape), out)
    return out


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Bit for bit; a NaN is a NaN."""
    assert ours.dtype == theirs.dtype == torch.bfloat16 and ours.shape == theirs.shape
    bits = (ours.view(torch.int16), theirs.contiguous().view(torch.int16))
    return bool(((bits[0] == bits[1]) | (ours.isnan() & theirs.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_every_e4m3_is_what_transformers_makes_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(2 * 255, 1).view(torch.float8_e4m3fn)
    exponents = torch.arange(255, dtype=torch.uint8)
    scales = (torch.rand(255, 1) * 3).to(dtype) if dtype.itemsize > 1 else exponents[:, None].clone().view(dtype)
    infos = opened(tmp_path, {"a": packed, "a_scale_inv": scales}, Quantization("fp8", (2, 256), ue8m0=dtype.itemsize == 1))
    assert same(all_of(infos["a"]), Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16))


def test_every_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(256).view(1, 256, 16, 16)  # every byte, with every scale
    scales = torch.arange(256, dtype=torch.uint8)[None, :, None].repeat(1, 1, 16)
    infos = opened(tmp_path, {"a_blocks": packed, "a_scales": scales}, Quantization("mxfp4"))
    assert infos.keys() == {"a"} and infos["a"].shape == (1, 512, 256)
    ours, theirs = all_of(infos["a"]), convert_moe_packed_tensors(packed, scales)
    assert same(ours[..., :255], theirs[..., :255])
    assert ours[..., 255].isnan().all(), "OCP Microscaling Formats 5.4.1"


@pytest.mark.parametrize("shape", [(48, 36), (41, 25), (15, 11), (1, 100), (3, 32, 24), (3, 37, 29)], ids=str)
@pytest.mark.parametrize("way", ["mapped", "sequential"])
def test_blocks_at_the_edge_may_be_smaller(
    tmp_path: Path, shape: tuple[int, ...], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "DECODED", 100)
    packed, scales = random_fp8(shape, BLOCK, torch.Generator().manual_seed(1))
    info = opened(tmp_path, {"a": packed, "a_scale_inv": scales}, Quantization("fp8", BLOCK))["a"]
    assert same(all_of(info, way), dequantised(packed, scales, BLOCK))
    if shape[-2] % BLOCK[0] == shape[-1] % BLOCK[1] == 0:
        assert same(all_of(info, way), Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16))
    assert same(all_of(info, way), _dequantize_fp8_weight(packed, scales, list(BLOCK), torch.float32).to(torch.bfloat16))


def cuts(size: int, strides: tuple[int, ...] = (1, 2), dims: tuple[int, ...] = (0, 1)) -> Iterator[Cut]:
    for dim, stride, index in product(dims, strides, range(size)):
        yield Cut(dim, stride, size, index)


ROWS: list[Layout] = [Same(), Fuse(1, (1, 1)), Fuse(3, (2, 1, 1)), FusedSource(3, (2, 1, 1)), Transpose(), Interleave()]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("way", ["mapped", "sequential"])
def test_any_box_of_block_fp8(tmp_path: Path, size: int, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of rows and columns begin and end inside blocks; a rank takes its numbers, and the scales of blocks it touches."""
    monkeypatch.setattr(tensor_files, "DECODED", 300)
    native = (120, 60)
    for number, layout in enumerate(ROWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = [
            random_fp8(shape, BLOCK, torch.Generator().manual_seed(part))
            for part, shape in enumerate(layout.part_shapes(native, DIMS))
        ]
        tensors = {f"{part}": packed for part, (packed, _) in enumerate(made)}
        infos = opened(
            folder, tensors | {f"{part}_scale_inv": scales for part, (_, scales) in enumerate(made)}, Quantization("fp8", BLOCK)
        )
        wholes = [dequantised(packed, scales, BLOCK) for packed, scales in made]
        with Reader(infos.values(), way=way) as reader:
            for cut in cuts(size):
                target = torch.full(
                    tuple(length // (size if dim == cut.dim else 1) for dim, length in enumerate(native)),
                    torch.nan,
                    dtype=torch.bfloat16,
                )
                for transfer in transfers(layout, native, DIMS, (cut,)):
                    info = infos[str(transfer.part)]
                    read(reader, info, transfer, target)
                    assert same(native_box(target, transfer), view(wholes[transfer.part], transfer.hf_view()))
                    assert info.encoding is not None
                    (_, packed), (_, scales) = info.encoding.boxes(transfer)
                    assert packed.elements == transfer.elements, "its own numbers"
                    spans = [axis.hf.stop - axis.hf.start for axis in transfer.axes]
                    most = [-(-span // size) + 1 for span, size in zip(spans, BLOCK, strict=True)]
                    assert scales.elements <= most[0] * most[1], "and one block more where a border is crossed"
                assert not target.isnan().any()


@pytest.mark.parametrize("way", ["mapped", "sequential"])
def test_any_box_of_mxfp4(tmp_path: Path, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, rows and columns cut anywhere: columns inside a byte and inside a group too."""
    monkeypatch.setattr(tensor_files, "DECODED", 300)
    experts, columns, rows = 6, 96, 30
    generator = torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
    info = opened(tmp_path, {"a_blocks": packed, "a_scales": scales}, Quantization("mxfp4"))["a"]
    assert (info.shape, info.dtype) == ((experts, columns, rows), torch.bfloat16)
    expected = convert_moe_packed_tensors(packed, scales)
    with Reader([info], way=way) as reader:
        for layout, native in (
            (Stack(experts, Transpose(Interleave())), (experts, rows, columns)),  # GPT-OSS's gate_up_proj
            (Stack(experts, Transpose()), (experts, rows, columns)),  # and down_proj
            (Stack(experts, Interleave()), (experts, columns, rows)),
            (Stack(experts), (experts, columns, rows)),
        ):
            seen = 0
            for first, second in product([2, 3], [Cut(1, 1, 3, 1), Cut(1, 2, 3, 2), Cut(2, 1, 5, 3), Cut(2, 1, 3, 1)]):
                if native[second.dim] % (second.size * second.stride):
                    continue
                both = (Cut(0, 1, first, 1), second)
                shape = tuple(length // next((cut.size for cut in both if cut.dim == dim), 1) for dim, length in enumerate(native))
                target = torch.full(shape, torch.nan, dtype=torch.bfloat16)
                for transfer in transfers(layout, native, DIMS, both):
                    read(reader, info, transfer, target)
                    assert same(native_box(target, transfer), view(expected, transfer.hf_view()))
                    seen += 1
                assert not target.isnan().any()
            assert seen >= 4


def test_a_share_of_mxfp4_is_a_share_of_the_bytes(tmp_path: Path) -> None:
    """No rank copies an expert that another holds; a part is never more than what a thread decodes at once."""
    packed = torch.zeros(8, 64, 4, 16, dtype=torch.uint8)
    info = opened(tmp_path, {"a_blocks": packed, "a_scales": packed[..., 0].clone()}, Quantization("mxfp4"))["a"]
    target = torch.empty(2, 64, 128, dtype=torch.bfloat16)
    with Reader([info]) as reader:
        (transfer,) = transfers(Stack(8, Transpose()), (8, 64, 128), DIMS, (Cut(0, 1, 4, 2),))
        assert read(reader, info, transfer, target) == 2 * 64 * 4 * 17
        pages = sum(stop - start for spans in reader.fetched.values() for start, stop in spans)
        assert pages * 4096 <= 2 * 64 * 4 * 17 + 4 * 4096


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a_blocks": torch.zeros(1, 2, 3, 16).byte()}, "a_blocks lacks its scales, a_scales"),
        ({"a_scales": torch.zeros(1, 2, 3).byte()}, "a_scales has no a_blocks beside it"),
        ({"a_blocks": torch.zeros(1, 2, 3, 8).byte(), "a_scales": torch.zeros(1, 2, 3).byte()}, "must be bytes of shape"),
        ({"a_blocks": torch.zeros(1, 2, 3, 16), "a_scales": torch.zeros(1, 2, 3).byte()}, "torch.float32"),
        ({"a_blocks": torch.zeros(1, 2, 3, 16).byte(), "a_scales": torch.zeros(1, 3, 2).byte()}, r"uint8 \(1, 2, 3\), not"),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        opened(tmp_path, tensors, Quantization("mxfp4"))
