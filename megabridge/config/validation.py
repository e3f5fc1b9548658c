"""What can be refused before anything is downloaded or started: choices, `_target_` places, layout against shape.

No torch. The shape comes from `model.hf`, or from the config.json of a local `model.path`; where neither is known (a
hub id without a YAML of its own) the checks that need it are left to the ranks, which repeat all of them on the real
config. All problems of a kind are reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any, Final

from megabridge.config.schema import Config, ModelConfig
from megabridge.config.value_types import LAYERS, SIZE, Kind
from megabridge.errors import CheckpointError, ConfigError, listed
from megabridge.parallel.topology import Topology
from megabridge.storage import regular_files

EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What architectures call the number of their experts in config.json."""
TARGET_PLACES: Final = "data, callbacks.<name> and logger.<name>"


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that decide which layouts it allows. None: not said."""

    layers: int | None
    hidden: int | None
    ffn: int | None
    heads: int | None
    kv_heads: int | None
    vocab: int | None
    head_dim: int | None
    tied: bool
    experts: int | None
    expert_ffn: int | None

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> ModelShape:
        """Reads an HF config.json's content; a key that is no possible size counts as not said: its family refuses it."""

        def size(key: str, kind: Kind = SIZE) -> int | None:
            value = hf.get(key)
            return value if kind.allows(value) else None

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        head_dim = size("head_dim") or (hidden // heads if hidden and heads else None)
        return cls(
            layers=size("num_hidden_layers", LAYERS),
            hidden=hidden,
            ffn=size("intermediate_size"),
            heads=heads,
            kv_heads=size("num_key_value_heads") or heads,
            vocab=size("vocab_size"),
            head_dim=head_dim,
            tied=hf.get("tie_word_embeddings") is True,
            experts=next((count for key in EXPERTS if (count := size(key)) is not None), None),
            expert_ffn=size("moe_intermediate_size") or size("intermediate_size"),
        )

    @property
    def width(self) -> int | None:
        """Of a layer's MLP, or of all its experts together."""
        return self.ffn if self.experts is None or self.expert_ffn is None else self.experts * self.expert_ffn

    @property
    def parameters(self) -> int | None:
        """Parameters of a decoder with a gated MLP, or experts, in each layer: of a dense one exactly. None: a size isn't said."""
        sizes = (self.layers, self.hidden, self.width, self.heads, self.kv_heads, self.vocab, self.head_dim)
        if any(size is None for size in sizes):
            return None
        layers, hidden, width, heads, kv_heads, vocab, head_dim = (size or 0 for size in sizes)
        layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * width + 2 * hidden
        return layers * layer + vocab * hidden * (1 if self.tied else 2) + hidden


def known_shape(model: ModelConfig) -> ModelShape:
    """The shape as far as it can be known without a download.

    Raises ConfigError when `model.path` is a local folder whose config.json can't be read.
    """
    if model.hf or model.path is None or not regular_files.is_folder(Path(model.path)):
        return ModelShape.of(model.hf)
    file = Path(model.path) / "config.json"
    try:
        content = json.loads(regular_files.read_text(file))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path={model.path} must hold a readable config.json: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}.")
    return ModelShape.of(content)


def nearest(word: str, words: list[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` for the closest of `words`, or a full stop."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else "."


def check_choices(config: Config) -> None:
    """Raises ConfigError for every text field whose value is not among its choices."""
    problems = [
        f"{path}={value!r} is not one of {', '.join(choices)}{nearest(str(value), list(choices))}"
        for path, value, choices in _choices(config, "")
        if value is not None and value not in choices
    ]
    if problems:
        raise ConfigError(listed(problems))


def _choices(node: Any, prefix: str) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    for each in fields(node):
        value = getattr(node, each.name)
        if is_dataclass(value):
            yield from _choices(value, f"{prefix}{each.name}.")
        elif "choices" in each.metadata:
            choices = each.metadata["choices"]
            yield f"{prefix}{each.name}", value, choices() if callable(choices) else choices


def check_targets(config: Config) -> None:
    """Raises ConfigError for a `_target_` outside data, callbacks.* and logger.*, or one of these without it.

    That the target is a class of the right base is checked by `megabridge.config.instantiate.build`, in the ranks: finding out
    here would import torch.
    """
    problems: list[str] = []
    nodes: dict[str, Any] = {"data": config.data}
    nodes |= {f"callbacks.{name}": node for name, node in config.callbacks.items()}
    nodes |= {f"logger.{name}": node for name, node in config.logger.items()}
    for path, node in nodes.items():
        if node is None:
            continue
        target = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(target, str) and "." in target:
            node = {key: value for key, value in node.items() if key != "_target_"}
        else:
            problems.append(f"{path}._target_={target!r} must name a class as package.module.Class")
        rule = f"is not allowed; a _target_ may stand in {TARGET_PLACES}"
        problems += [f"{where} {rule}" for where in _targets(node, path)]
    for name in ("hf", "provider"):
        node = getattr(config.model, name)
        problems += [f"{where} is not allowed; remove it" for where in _targets(node, f"model.{name}")]
    problems += [f"{where} is not allowed; remove it" for where in _targets(config.recipe.options, "recipe.options")]
    if problems:
        raise ConfigError(listed(problems))


def _targets(node: Any, path: str) -> Iterator[str]:
    """Where `_target_` stands in `node`, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}._target_={value!r}"
            else:
                yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def check_model(config: Config) -> None:
    """Raises ConfigError when nothing says which model it is. A `family` does: its tiny model is meant then."""
    model = config.model
    if model.path is None and config.family is not None and config.recipe.steps == 0:
        return
    if model.path is None and not model.hf:
        raise ConfigError(f"model={model.name} has neither model.path nor a shape; give model.path=<folder or hub id>.")
    if model.load_weights and model.path is None:
        raise ConfigError("model.load_weights=true needs model.path=<folder or hub id>; set it, or load_weights=false.")


def check_peft(config: Config) -> None:
    """Raises ConfigError for settings of adapters that the run doesn't have."""
    peft = config.peft
    problems = []
    if peft.name == "none" and (peft.path is not None or peft.merge):
        problems.append("peft.path and peft.merge have no meaning with peft=none; choose peft=lora or peft=dora, or leave them out")
    if peft.name != "none" and config.optimizer.freeze:
        problems.append(f"optimizer.freeze has no meaning with peft={peft.name}, which trains its adapters alone; take it away")
    if problems:
        raise ConfigError(listed(problems))


def check_named(config: Config) -> None:
    """Raises ConfigError when recipe.target or family is not module:name of a module that exists. Imports its package only."""
    named = [("recipe.target", "function", "recipes.finetune:main", config.recipe.target)]
    if config.family is not None:
        named.append(("family", "NAME", "my_package.my_family:FAMILY", config.family))
    for key, kind, example, value in named:
        module, colon, name = value.partition(":")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"{key}={value!r} must be module:{kind}, such as {example}.")
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(f"{key}={value!r}: there is no module {module!r}; check the name and PYTHONPATH.")


def check_training(config: Config) -> None:
    """Raises ConfigError for settings of training that can't work, or would do nothing."""
    checkpoint, policy, optimizer = config.checkpoint, config.policy, config.optimizer
    problems = []
    if policy.spike != "ignore" and policy.spike_factor <= 1:
        problems.append(f"policy.spike_factor={policy.spike_factor} must be above 1; 2 is usual")
    if optimizer.initial_loss_scale < optimizer.min_loss_scale or optimizer.min_loss_scale <= 0:
        problems.append(
            f"optimizer.min_loss_scale={optimizer.min_loss_scale} must be above 0 and at most "
            f"initial_loss_scale={optimizer.initial_loss_scale}"
        )
    if "rollback" in (policy.nonfinite, policy.spike) and not (checkpoint.native and checkpoint.save_every):
        problems.append("policy rollback needs saved steps to go back to; set checkpoint.native=true and checkpoint.save_every")
    if checkpoint.keep_best and not checkpoint.native:
        problems.append(f"checkpoint.keep_best={checkpoint.keep_best} keeps native steps; set checkpoint.native=true")
    if problems:
        raise ConfigError(listed(problems))


def check_layout(config: Config, topology: Topology) -> None:
    """Raises ConfigError naming every rule between model, layout and batch that is broken."""
    problems = [*_shape_problems(known_shape(config.model), topology, config), *_batch_problems(config, topology)]
    if problems:
        raise ConfigError(listed(problems))


def divisors(number: int) -> list[int]:
    """The whole numbers that divide `number`, in their order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def allowed_tp(shape: ModelShape) -> list[int]:
    """Tensor parallel sizes that cut heads, KV heads and MLP evenly; KV heads may also be shared by several ranks."""
    heads = shape.heads or 1
    kv_heads = shape.kv_heads or heads
    return [
        tp for tp in divisors(heads) if (kv_heads % tp == 0 or tp % kv_heads == 0) and (shape.ffn is None or shape.ffn % tp == 0)
    ]


def _shape_problems(shape: ModelShape, topology: Topology, config: Config) -> Iterator[str]:
    tp, chunks = topology.tp, topology.pp * topology.vpp
    if shape.heads is not None and tp not in (allowed := allowed_tp(shape)):
        parts = [f"num_attention_heads={shape.heads}", f"num_key_value_heads={shape.kv_heads} (or be a multiple of it)"]
        parts += [f"intermediate_size={shape.ffn}"] if shape.ffn is not None else []
        sizes = ", ".join(map(str, allowed))
        yield f"parallel.tp={tp} must divide {', '.join(parts)} of {config.model.name}; use one of {sizes}"
    if shape.layers is not None and config.parallel.layout is None and shape.layers < chunks:
        yield (
            f"parallel.pp x parallel.vpp = {topology.pp} x {topology.vpp} needs at least {chunks} layers, "
            f"but {config.model.name} has num_hidden_layers={shape.layers}; use fewer stages"
        )
    if shape.experts is not None and shape.experts % topology.ep:
        sizes = ", ".join(map(str, divisors(shape.experts)))
        yield f"parallel.ep={topology.ep} must divide the {shape.experts} experts of {config.model.name}; use one of {sizes}"
    if shape.experts is not None and tp > 1 and not config.parallel.sequence_parallel:
        yield f"parallel.tp={tp} needs parallel.sequence_parallel=true for {config.model.name}, which has experts; set it"
    if config.parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true needs parallel.tp > 1; set parallel.tp=2 or leave it false"


def _batch_problems(config: Config, topology: Topology) -> Iterator[str]:
    recipe = config.recipe
    sizes = ("global_batch_size", "micro_batch_size", "seq_length", "log_every")
    small = [name for name in sizes if getattr(recipe, name) < 1]
    yield from (f"recipe.{name}={getattr(recipe, name)} must be at least 1" for name in small)
    if recipe.steps < 0:
        yield f"recipe.steps={recipe.steps} must not be negative"
    if small or recipe.steps < 1:
        return
    if config.parallel.sequence_parallel and recipe.seq_length % topology.tp:
        yield (
            f"recipe.seq_length={recipe.seq_length} must be a multiple of parallel.tp={topology.tp} "
            "under parallel.sequence_parallel; change one of the three"
        )
    at_once = recipe.micro_batch_size * topology.dp
    if recipe.global_batch_size % at_once:
        yield (
            f"recipe.global_batch_size={recipe.global_batch_size} must be a multiple of micro_batch_size x dp = "
            f"{recipe.micro_batch_size} x {topology.dp}; use recipe.global_batch_size={at_once} or a multiple"
        )
        return
    micro_batches = recipe.global_batch_size // at_once
    grouped = config.model.provider.get("microbatch_group_size_per_vp_stage")
    if topology.vpp > 1 and grouped is None and micro_batches % topology.pp:
        # megatron-core's interleaved schedule (pipeline_parallel/schedules.py) refuses a last group of other size.
        yield (
            f"parallel.vpp={topology.vpp} needs micro-batches per step ({micro_batches}) that are a multiple of "
            f"parallel.pp={topology.pp}; use recipe.global_batch_size={at_once * topology.pp} or a multiple"
        )
