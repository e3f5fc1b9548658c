"""Prints samples as the model gets them: recipe=show_data data=chat data.path=chats.jsonl.

Learned tokens are coloured and the others dimmed; without a terminal, learned tokens are in double brackets. Padding is left out.
recipe.options.samples is the number of rows shown.
"""

from __future__ import annotations

from itertools import islice

from megabridge.config.schema import Config
from megabridge.data.show import spans
from megabridge.data.text import load_tokenizer
from megabridge.loggers import Reporter
from megabridge.loggers.console import stdout
from megabridge.training import build


def main(config: Config) -> None:
    """One process calls it, without process groups."""
    bridge = build.bridge(config)
    assert bridge.source.folder is not None  # `build.bridge` makes the bridge from a folder
    config.recipe.micro_batch_size = 1
    data = build.data(config, bridge)
    tokenizer = load_tokenizer(bridge.source.folder)
    count = int(config.recipe.options.get("samples", 3))
    with Reporter(config, build.loggers(config)) as report:
        report.say(data.describe())
        for number, batch in enumerate(islice(data.train_batches(0, dp_rank=0, dp_size=1), count)):
            found = spans(batch, tokenizer)
            learned = sum(part.tokens for part in found if part.is_learned)
            report.say(f"row {number}: {sum(part.tokens for part in found)} tokens, {learned} learned")
            for part in found:
                if part.begins_document:
                    stdout.rule(style="dim")
                text = part.text if stdout.is_terminal or not part.is_learned else f"[[{part.text}]]"
                stdout.print(text, style="bold green" if part.is_learned else "dim", end="", markup=False)
            stdout.print()
