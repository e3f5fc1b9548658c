"""Runs the built-in tasks on a loaded model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megabridge.data.rendering import Template
from megabridge.data.vocabulary import check_ids, check_tokens
from megabridge.evaluation import rows, scoring
from megabridge.evaluation.tasks import Generations, MultipleChoice, Perplexity


def vocabulary(model: Any) -> int:
    """Returns the number of token ids of a transformers model."""
    return int(model.get_input_embeddings().num_embeddings)


def perplexity(task: Perplexity, model: Any, tokenizer: Any, *, batch_size: int) -> dict[str, float]:
    """Returns nats_per_token, perplexity (its exponential), bits_per_byte of the UTF-8 text, and the counts tokens and bytes."""
    assert task.seq_length is not None  # tasks.parsed has set it
    stride = task.stride or max(1, task.seq_length // 2)
    texts = rows.documents(task.path, task.column)
    encoded = [scoring.document(tokenizer, text) for text in texts]
    for number, ids in enumerate(encoded):
        check_ids(ids, vocabulary(model), f"document {number} of {task.path}")
    pieces = [piece for ids in encoded for piece in scoring.windows(ids, task.seq_length, stride)]
    nats = -sum(scoring.log_likelihoods(model, pieces, batch_size=batch_size))
    tokens, size = sum(piece.scored for piece in pieces), sum(len(text.encode()) for text in texts)
    mean = nats / tokens
    return {
        "nats_per_token": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": float(tokens),
        "bytes": float(size),
    }


def multiple_choice(task: MultipleChoice, model: Any, tokenizer: Any, *, batch_size: int, longest: int) -> dict[str, float]:
    """Returns the shares of questions whose right choice has the highest log-likelihood, as lm-evaluation-harness counts them.

    acc uses the whole log-likelihood, acc_norm that per character, acc_bytes that per byte; the first of equal choices wins.
    acc_stderr is the standard error of acc.
    """
    asked = rows.questions(task.path)
    pieces = [
        scoring.continuation(tokenizer, question.prompt, task.delimiter + choice, longest=longest)
        for question in asked
        for choice in question.choices
    ]
    questions = [number for number, question in enumerate(asked) for _ in question.choices]
    for number, piece in zip(questions, pieces, strict=True):
        check_ids(piece.tokens, vocabulary(model), f"question {number} of {task.path}")
    found = iter(scoring.log_likelihoods(model, pieces, batch_size=batch_size))
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for question in asked:
        likelihoods = [next(found) for _ in question.choices]
        sizes = {
            "acc": [1] * len(likelihoods),
            "acc_norm": [len(choice) for choice in question.choices],
            "acc_bytes": [len(choice.encode()) for choice in question.choices],
        }
        for name, lengths in sizes.items():
            scores = [likelihood / length for likelihood, length in zip(likelihoods, lengths, strict=True)]
            right[name] += scores.index(max(scores)) == question.answer
    count = len(asked)
    metrics = {name: number / count for name, number in right.items()}
    if count > 1:
        metrics["acc_stderr"] = math.sqrt(metrics["acc"] * (1 - metrics["acc"]) / (count - 1))
    return metrics | {"questions": float(count)}


def generations(task: Generations, model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Returns a row {prompt, text} for each prompt."""
    prompts = [*task.prompts, *(rows.prompts(task.path) if task.path is not None else ())]
    texts = generate(model, tokenizer, prompts, max_new_tokens=task.max_new_tokens)
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """Returns the greedy answer to each prompt, without special tokens; asked through the chat template if there is one."""
    texts = []
    template = Template(tokenizer, tokenizer.name_or_path) if tokenizer.chat_template else None
    for prompt in prompts:
        if template is not None:
            messages = [{"role": "user", "content": prompt}]
            inputs = template.apply(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        check_tokens(inputs["input_ids"], vocabulary(model), f"the prompt {prompt[:80]!r}")
        filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with torch.no_grad():
            tokens = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=filler)
        texts.append(str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return texts
