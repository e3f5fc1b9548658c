"""Makes indexed data for pretraining: recipe=prepare_data prepare.paths=[corpus.jsonl] prepare.output=corpus.

Uses the model's tokenizer. Run it once, in one process, which starts others; data=indexed reads the result.
"""

from __future__ import annotations

import os
from pathlib import Path

from megabridge.config.schema import Config
from megabridge.data import prepare
from megabridge.errors import ConfigError
from megabridge.loggers import Reporter
from megabridge.loggers.bars import bytes_bar
from megabridge.training import build


def main(config: Config) -> None:
    """One process calls it, without process groups."""
    wanted = config.prepare
    workers = len(os.sched_getaffinity(0)) if wanted.workers is None else wanted.workers
    if workers < 1:
        raise ConfigError(f"prepare.workers={workers} must be at least 1.")
    bridge = build.bridge(config)
    assert bridge.source.folder is not None  # `build.bridge` makes the bridge from a folder
    output = wanted.output or str(Path(config.run_dir) / "data")
    vocab_size = int(bridge.source.native["vocab_size"])
    rules = prepare.Rules(bridge.source.folder, wanted.column, wanted.text_rows == "line", wanted.append_end, vocab_size)
    with Reporter(config, build.loggers(config)) as report:
        with bytes_bar("tokenising", show=True) as advance:
            made = prepare.prepare(
                wanted.paths, output, rules, workers=workers, max_bad_share=wanted.max_bad_share, advance=advance
            )
        report.say(f"{made.documents} documents, {made.tokens} tokens: {output}.bin and .idx")
        if made.tally.bad:
            report.say(made.tally.describe())
        report.say(f"next: python -m megabridge.run recipe=pretrain data=indexed data.paths=[{output}]")
