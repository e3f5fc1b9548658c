"""A program that converts a model larger than the memory it may have: `python -m tests.support.memory FOLDER GIGABYTES`.

Prints a line of JSON: bytes of the weights and of the largest tensor, and resident anonymous memory: after the imports alone, and
the peak of import and export. Pages of files, mapped or cached, are not anonymous: the kernel drops them when memory is short.
"""

from __future__ import annotations

import filecmp
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HIDDEN = 2048


def anonymous() -> int:
    """Bytes of this process's resident anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@contextmanager
def watched(peaks: dict[str, int], name: str) -> Iterator[None]:
    """Keeps the largest `anonymous()` seen during the block, sampled every 2 ms."""
    done = threading.Event()
    peaks[name] = anonymous()

    def sample() -> None:
        while not done.wait(0.002):
            peaks[name] = max(peaks[name], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_source(folder: Path, size: float) -> None:
    """A bfloat16 Llama of about `size` bytes, in the order and with the header of an export, never in memory together."""
    import torch

    from megabridge.hf.safetensors_format import build_header
    from megabridge.mapping import natural

    vocabulary = 32000 if size > 1e9 else 8000  # of the small one no tensor is a large part
    per_layer = 2 * (HIDDEN * HIDDEN * 4 + 3 * HIDDEN * 4 * HIDDEN)
    layers = max(1, round((size - 2 * 2 * vocabulary * HIDDEN) / per_layer))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": vocabulary, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "dtype": "bfloat16",
    }  # fmt: skip
    mlp, square = 4 * HIDDEN, (HIDDEN, HIDDEN)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "lm_head.weight": (vocabulary, HIDDEN)}
    shapes |= {"model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{name}_proj.weight": square for name in "qkvo"}
        shapes |= {at + f"mlp.{name}_proj.weight": (mlp, HIDDEN) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (HIDDEN, mlp)}
        shapes |= {at + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: shapes[name] for name in sorted(shapes, key=natural)}
    header, _ = build_header([(name, torch.bfloat16, shape) for name, shape in shapes.items()])
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1 << 20, generator=generator).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for number, shape in enumerate(shapes.values()):
            left, start = 2 * torch.Size(shape).numel(), number * 2
            while left:
                piece = noise[start : start + left]
                left, start = left - file.write(piece), 0


def main(folder: Path, size: float) -> None:
    from megabridge import AutoBridge
    from megabridge.hf.tensor_files import find_tensors

    source = folder / "source"
    write_source(source, size)
    infos = find_tensors(source).values()
    AutoBridge.from_hf_pretrained(source)
    import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401

    seen = {"weights": sum(info.nbytes for info in infos), "largest": max(info.nbytes for info in infos), "imports": anonymous()}
    with watched(seen, "import"):
        AutoBridge.import_ckpt(source, folder / "native", show_progress=False)
    with watched(seen, "export"):
        AutoBridge.from_auto_config(folder / "native").export_ckpt(folder / "native", folder / "out", show_progress=False)
    names = ["config.json", "model.safetensors"]
    same = filecmp.cmpfiles(source, folder / "out", names, shallow=False)[0]
    print(json.dumps({**seen, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) * 1e9)
