"""A chat template, and tokenizers that have it."""

from __future__ import annotations

from pathlib import Path

from megabridge.hf import byte_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say é in 2 words.\n"},
    {"role": "assistant", "content": "e acute"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "e\n\n  acute <b>!\n"},
]


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def byte_folder(folder: Path, template: str | None) -> Path:
    byte_tokenizer.write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
