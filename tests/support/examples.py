"""Runs Python of the documentation in ranks without set-up."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from megabridge.hf import byte_tokenizer
from megabridge.parallel import process_groups
from tests.support.models import TINY, write_model

SHAPE = {**TINY, "vocab_size": byte_tokenizer.VOCAB_SIZE + 3}


def make_source(folder: str) -> None:
    """A tiny model with the byte-level tokenizer."""
    byte_tokenizer.write_tokenizer(write_model(Path(folder), SHAPE))


def greedy(folder: str, prompt: str, new_tokens: int) -> str:
    """What transformers' greedy generation gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=new_tokens)
    return str(tokenizer.decode(tokens[0]))


def generated(arguments: list[str]) -> str:
    """What a rank of recipes.generate_from_hf prints."""
    from recipes import generate_from_hf

    sys.argv[1:] = arguments
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        generate_from_hf.main()
    return output.getvalue()


def blocks(code: list[str], folder: str) -> list[str]:
    """What each block prints, run in `folder` one after another; an error's type and text where it ends in one."""
    os.chdir(folder)
    outputs = []
    for block in code:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(block, {})
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        process_groups.stop(for_good=False)
        outputs.append(output.getvalue())
    return outputs
