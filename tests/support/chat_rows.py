"""Rows of conversations, and data made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megabridge.data.finetuning import Finetuning


def chat(number: int) -> dict[str, Any]:
    """A conversation of two turns, longer for greater numbers."""
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}" + "!" * (number % 7)},
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "content": f"é more of {number}\n"},
        ]
    }


def jsonl(file: Path, rows: list[Any]) -> Path:
    """Rows that are bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def made(path: Path | str, tokenizer: Path, *, length: int = 400, rows: int = 2, **settings: Any) -> Finetuning:
    data = Finetuning(path=str(path), **settings)
    data.setup(tokenizer, seq_length=length, micro_batch_size=1, global_batch_size=rows, seed=3)
    return data


BAD = {
    "missing field": [
        {"text": "no messages"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": None, "content": "a"}]},
    ],
    "content that is not text": [
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}]}
        for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 1}, "text", None)
    ],
    "empty": [{"messages": []}, {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]}],
    "too long": [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 500}]}],
    "bad encoding": [b'{"messages": "\xff"}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}'],
    "not readable": [
        b"{",
        b"[1]",
        b"null",
        b"\x00",
        b'{"messages": [], "messages": []}',
        b"[" * 5000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        {"messages": "text"},
        {"messages": 1},
        {"messages": {"role": "user"}},
        {"messages": [1]},
        {"messages": [[]]},
        *(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
            for content in (1, 0.5, True, {})
        ),
        *(
            {"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}
            for role in (1, ["user"], {"a": 1})
        ),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": "call"}]},
    ],
    "role order": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "b"}]},
        {"messages": [{"role": "wizard", "content": "b"}, {"role": "assistant", "content": "c"}]},
        {"messages": [*chat(1)["messages"], {"role": "system", "content": "late"}]},
    ],
}
