"""Evaluates a Hugging Face folder in transformers: perplexity, multiple choice, lm-evaluation-harness and greedy texts."""

from megabridge.evaluation.measures import generate
from megabridge.evaluation.run import FILE, TABLE, Results, device_name, evaluate, load, problems, write
from megabridge.evaluation.tasks import Task, asks_harness, parsed, specs

__all__ = [
    "FILE",
    "TABLE",
    "Results",
    "Task",
    "asks_harness",
    "device_name",
    "evaluate",
    "generate",
    "load",
    "parsed",
    "problems",
    "specs",
    "write",
]
