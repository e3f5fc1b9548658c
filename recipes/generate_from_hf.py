"""Generates greedy text with a Hugging Face model that runs in Megatron-Core, in one process or under torchrun:

    python -m recipes.generate_from_hf --prompt "The capital of France is"
    torchrun --nproc-per-node=2 -m recipes.generate_from_hf --hf_model_path meta-llama/Llama-3.2-1B --tp 2

The text is that of transformers' greedy generation. Every new token runs the whole sequence again, without a cache of keys and
values: this is a check of a conversion, not a server.
"""

from __future__ import annotations

import argparse
import os

import torch
from transformers import AutoTokenizer

from megabridge import AutoBridge
from megabridge.errors import MegabridgeError
from megabridge.hf.assets import end_tokens
from megabridge.models.logits import gather_logits
from megabridge.parallel import process_groups


def main() -> None:
    """Every rank runs it; rank 0 prints the text."""
    arguments = parsed()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    pp = arguments.pp or max(1, processes // arguments.tp)
    bridge = AutoBridge.from_hf_pretrained(
        arguments.hf_model_path, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
    )
    assert bridge.source.folder is not None  # the bridge was made from a folder or the hub
    model = bridge.to_megatron_model(tp=arguments.tp, pp=pp)
    tokenizer = AutoTokenizer.from_pretrained(bridge.source.folder, trust_remote_code=arguments.trust_remote_code)
    tokens = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
    ends = end_tokens(bridge.source.folder, bridge.source.config)
    text = tokenizer.decode(generate(model, tokens, arguments.max_new_tokens, ends=ends)[0])
    if torch.distributed.get_rank() == 0:
        print(text)
    process_groups.stop()


def generate(model: list[torch.nn.Module], tokens: torch.Tensor, new_tokens: int, *, ends: set[int]) -> torch.Tensor:
    """Returns `tokens` [1, s] and up to `new_tokens` most likely next ones, ending after one of `ends`. Every rank calls it."""
    for _ in range(new_tokens):
        chosen = gather_logits(model, tokens)[:, -1].argmax(-1, keepdim=True).cpu()
        tokens = torch.cat((tokens, chosen), dim=1)
        if int(chosen) in ends:
            break
    return tokens


def parsed() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.generate_from_hf", description="Greedy text through Megatron-Core.")
    parser.add_argument("--hf_model_path", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a folder or a hub id")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each matrix")
    parser.add_argument("--pp", type=int, help="ranks that share the layers; by default all that tp leaves")
    parser.add_argument("--dtype", help="float32 or bfloat16; by default the config's")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the tokenizer's own code run")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except MegabridgeError as error:
        raise SystemExit(str(error)) from None
