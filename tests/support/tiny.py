"""A tiny GPTModel, data and Trainer for the training and checkpoint tests. Imported in the ranks' host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megabridge.config.schema import CheckpointConfig, Config, OptimizerConfig, PolicyConfig, RecipeConfig, SchedulerConfig
from megabridge.models.provider import ModelProvider
from megabridge.training import Callback, Trainer, build_optimizer, ddp_settings

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

VOCABULARY, SEQUENCE = 61, 16


NATIVE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    # Odd: under tensor parallelism the embedding has padded rows.
    "vocab_size": VOCABULARY,
    "seq_length": SEQUENCE,
    "share_embeddings_and_output_weights": True,
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
}


EXPERTS: dict[str, Any] = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 1e-3,
}
"""Settings that make mixtures of the last three layers."""


def model(*, distributed: bool = True, overlap: bool = False, dtype: str = "float32", **settings: Any) -> list[Any]:
    """DDP-wrapped chunks of the running layout, whose parameters don't depend on the layout."""
    provider = ModelProvider(NATIVE, family_name="Tiny")
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    placed = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": vpp,
        "params_dtype": dtype,
        "calculate_per_token_loss": True,
    }
    if "num_moe_experts" in settings:
        placed |= {
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
            "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
            "sequence_parallel": placed["tensor_model_parallel_size"] > 1,
        }
    for name, value in {**placed, **settings}.items():
        setattr(provider, name, value)

    def fill(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        for chunk in chunks:
            _fill(chunk)
        return chunks

    provider.register_pre_wrap_hook(fill)
    optimizer = OptimizerConfig(distributed=distributed, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    return provider.provide_distributed_model(ddp_config=ddp_settings(optimizer))


def _fill(chunk: torch.nn.Module) -> None:
    """Values that depend on the place in the whole tensor, not on the rank that holds it."""
    for name, tensor in shards([chunk]).items():
        if "norm" in name:
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, tensor.key)))
        # As many rows under every layout, whatever their padding.
        shape = (64, *tensor.global_shape[1:]) if tensor.allow_shape_mismatch else tensor.global_shape
        whole = torch.randn(shape, generator=generator) * 0.3
        with torch.no_grad():
            tensor.data.copy_(whole[tensor.global_slice()])


def shards(chunks: Sequence[Any]) -> dict[str, ShardedTensor]:
    """The sharded parameters of this rank, by global name and place."""
    found = {}
    for chunk in unwrap_model(list(chunks)):
        state = {name: entry for name, entry in chunk.sharded_state_dict().items() if not name.endswith("_extra_state")}
        apply_factories(state)
        for entry in nested_values(state):
            found[f"{entry.key}{list(entry.global_offset)}"] = entry
    return found


class Samples:
    """Endless random sequences, each with its own number of unmasked tokens; sample i is the same for every dp."""

    def __init__(self, micro_batch_size: int, *, validation: int = 3) -> None:
        self.micro_batch_size = micro_batch_size
        self.validation = validation
        self.seen: list[int] = []
        """First samples of the micro-batches that were taken for training."""

    def train_batches(self, consumed_samples: int, *, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
        size = self.micro_batch_size
        start = consumed_samples + dp_rank * size
        while True:
            self.seen.append(start)
            yield batch(range(start, start + size))
            start += size * dp_size

    def digest(self) -> str:
        return ""

    def decided(self) -> dict[str, object]:
        return {}

    def left_out(self) -> str:
        return ""

    def validation_batches(self, *, dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
        size = self.micro_batch_size
        starts = range(10_000, 10_000 + self.validation * size, size)
        return [batch(range(start, start + size)) for start in starts][dp_rank::dp_size]


def batch(samples: Sequence[int]) -> dict[str, torch.Tensor]:
    """The samples with these numbers. Each repeats a short pattern of few tokens, so that there is something to learn."""
    rows, masks = [], []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        pattern = torch.randint(0, 8, (4,), generator=generator)
        rows.append(pattern.repeat(SEQUENCE // 4 + 1)[: SEQUENCE + 1])
        masks.append(torch.arange(SEQUENCE) >= sample * 5 % (SEQUENCE - 1))
    tokens = torch.stack(rows)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.stack(masks).float(),
        "position_ids": torch.arange(SEQUENCE).expand(len(rows), -1).contiguous(),
    }


def config(
    run_dir: str,
    *,
    steps: int,
    lr: float = 1e-2,
    optimizer: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    **settings: Any,
) -> Config:
    """A Config for the tiny model; `settings` are of the groups checkpoint and recipe."""
    saving = {name: settings.pop(name) for name in list(settings) if name in CheckpointConfig.__dataclass_fields__}
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "eval_at_start": False, **settings}
    return Config(
        recipe=RecipeConfig(steps=steps, seq_length=SEQUENCE, **sizes),
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.1, **(optimizer or {})),
        policy=PolicyConfig(**(policy or {})),
        scheduler=SchedulerConfig(name="constant", warmup_steps=2),
        checkpoint=CheckpointConfig(**saving),
        run_dir=run_dir,
    )


class Recorder(Callback):
    """Keeps the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.said: list[str] = []
        self.calls: list[str] = []

    def on_start(self, trainer: Trainer) -> None:
        say = trainer.say

        def kept(line: str) -> None:
            self.said.append(line)
            say(line)

        trainer.say = kept  # type: ignore[method-assign]

    def after_step(self, trainer: Trainer, metrics: Any) -> None:
        self.steps.append(dict(metrics))


def trainer(config: Config, *, callbacks: Sequence[Callback] = (), loggers: Sequence[Any] = (), **model_options: Any) -> Trainer:
    """A Trainer over the tiny model in the running layout."""
    config.optimizer.distributed = model_options.get("distributed", True)
    config.optimizer.overlap_grad_reduce = config.optimizer.overlap_param_gather = model_options.get("overlap", False)
    chunks = model(**model_options)
    optimizer, scheduler = build_optimizer(chunks, config.optimizer, config.scheduler, steps=config.recipe.steps)
    data: Any = Samples(config.recipe.micro_batch_size)
    return Trainer(config, chunks=chunks, optimizer=optimizer, scheduler=scheduler, data=data, callbacks=callbacks, loggers=loggers)
