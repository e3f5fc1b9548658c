"""ModelProvider: builds this rank's model chunks from native settings and a topology."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

import megabridge.platform as platform
from megabridge.config import instantiate
from megabridge.config.value_types import shown
from megabridge.errors import ConfigError, listed
from megabridge.models import provider_settings as rules
from megabridge.models.backends import Backend, chosen
from megabridge.models.causal_lm import CausalLM
from megabridge.models.layer_options import LayerOptions
from megabridge.models.pipeline_split import by_stage
from megabridge.parallel import process_groups
from megabridge.parallel.topology import SETTINGS, Topology
from megabridge.platform.patches import wgrad_products
from megabridge.platform.patches.half_precision import in_half_precision

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

Chunk = torch.nn.Module
Hook = Callable[[list[Chunk]], list[Chunk]]
Init = Literal["random", "empty", "meta"]


class ModelProvider:
    """The settings of a model, as attributes, and the methods that build it.

    Every field of megatron-core's TransformerConfig is a setting, and those of `provider_settings.OWN_FIELDS`. Reading or
    setting another name raises ConfigError with the nearest one; so does setting anything after `finalize`.

        provider = ModelProvider(native, family_name="LlamaForCausalLM")
        provider.tensor_model_parallel_size = 2
        provider.finalize()
        chunks = provider.provide_distributed_model()
    """

    family_name: str
    unread: tuple[str, ...]
    """Keys of config.json that nothing reads; `describe` lists them."""
    _given: dict[str, Any]
    _config: Any
    _pre_wrap_hooks: list[Hook]
    _post_wrap_hooks: list[Hook]

    def __init__(self, native: Mapping[str, object], *, family_name: str, unread: Sequence[str] = ()) -> None:
        own: dict[str, object] = {
            "family_name": family_name,
            "unread": tuple(unread),
            "_given": {},
            "_config": None,
            "_pre_wrap_hooks": [],
            "_post_wrap_hooks": [],
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        for name, value in native.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not ours to answer: copy, pickle and inspect ask for such names
            raise AttributeError(name)
        if self._config is not None and name in vars(self._config) and name not in ("activation_func",):
            return vars(self._config)[name]
        return self._given[name] if name in self._given else rules.default(name)

    def __setattr__(self, name: str, value: object) -> None:
        if not rules.is_known(name):
            raise rules.UnknownSetting(name)
        if self._config is not None:
            raise ConfigError(f"{name} can't be set after finalize(); set it before, or make a new provider.")
        self._given[name] = value

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *rules.OWN_FIELDS, *rules.config_fields()]

    # ------------------------------------------------------------------ settings

    def finalize(self) -> None:
        """Checks every rule and makes `config`; settings are fixed from here on. Further calls do nothing.

        Needs no ranks. Raises ConfigError with all problems in one message.
        """
        if self._config is not None:
            return

        def get(name: str) -> Any:
            return self._given[name] if name in self._given else rules.default(name)

        if problems := rules.problems_of(get):
            raise ConfigError(listed(problems))
        settings = rules.config_settings(get, self._given)
        settings.setdefault("finalize_model_grads_func", finalize_model_grads)
        try:
            config = rules.config_class(get)(**settings)
        except (ValueError, AssertionError, TypeError) as error:
            raise ConfigError(f"megatron-core refuses the settings of {self.family_name}: {error}") from error
        if config.virtual_pipeline_model_parallel_size is not None:
            # Batched sends and receives pair the wrong messages where two stages exchange several chunks: losses are
            # right, gradients wrong.
            config.overlap_p2p_comm, config.batch_p2p_comm = True, False
        object.__setattr__(self, "_config", config)

    @property
    def config(self) -> Any:
        """The TransformerConfig. Raises ConfigError before `finalize`."""
        if self._config is None:
            raise ConfigError("provider.config exists after finalize(); call provider.finalize() first.")
        return self._config

    @property
    def resolved_backend(self) -> Backend:
        """The backend that the setting `backend` selects here. Raises ConfigError for a name that no backend has."""
        return chosen(lambda name: self._given[name] if name in self._given else rules.default(name))

    @property
    def layer_options(self) -> LayerOptions:
        """The options of the layers beyond megatron-core's TransformerConfig."""
        return LayerOptions.of(lambda name: getattr(self, name))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all ranks: vocab_size and its padding."""
        return rules.padded_vocab_size(lambda name: getattr(self, name), self.tensor_model_parallel_size)

    @property
    def split(self) -> list[list[int]]:
        """Transformer layers per pipeline stage and virtual chunk: `split[pp][vpp]`. Needs finalize()."""
        config = self.config
        pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
        layout = config.pipeline_model_parallel_layout
        if layout is not None:
            return [[chunk.count(LayerType.decoder) for chunk in stage] for stage in layout.layout]
        order = [(chunk if vpp > 1 else None, stage) for chunk in range(vpp) for stage in range(pp)]
        counts = [get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage) for chunk, stage in order]
        return by_stage(counts, pp=pp)

    def describe(self, *, runs: bool = True) -> str:
        """One line: layout, backend, dtype (with `runs`), the number of layers of each stage, and config keys that nothing reads.

        Needs finalize().
        """
        config = self.config
        layout = Topology.of_settings(vars(config).__getitem__).model
        if config.sequence_parallel:
            layout += " sequence-parallel"
        stages = " | ".join("+".join(map(str, stage)) for stage in self.split)
        dtype = str(config.params_dtype).removeprefix("torch.") if runs else "dtypes as they are stored"
        padding = "" if self.padded_vocab_size == self.vocab_size else f" (padded to {self.padded_vocab_size})"
        unread = f"; nothing reads config.json's {', '.join(map(shown, self.unread))}" if self.unread else ""
        return (
            f"{self.family_name}: {layout}, backend={self.resolved_backend.name}, {dtype}, vocabulary {self.vocab_size}"
            f"{padding}, layers per stage {stages}{unread}"
        )

    def topology(self, world_size: int) -> Topology:
        """Returns the topology of this model over `world_size` processes. Raises ConfigError when the sizes don't fit."""
        return Topology.of_settings(vars(self.config).__getitem__, world_size)

    # ------------------------------------------------------------------ model

    def register_pre_wrap_hook(self, hook: Hook) -> None:
        """Adds `hook(chunks) -> chunks`, which runs on every rank once the bare chunks exist: load weights, freeze, adapt."""
        self._pre_wrap_hooks.append(hook)

    def register_post_wrap_hook(self, hook: Hook) -> None:
        """Adds `hook(chunks) -> chunks`, which runs on every rank after mixed-precision and data-parallel wrapping."""
        self._post_wrap_hooks.append(hook)

    def start_groups(self) -> None:
        """Finalizes, and makes the process groups of this layout current, creating them when there are none. Every rank calls it.

        Raises ConfigError, with the torchrun command, when more processes are needed.
        """
        self.finalize()
        sizes = vars(self.config)
        needed = math.prod(sizes[SETTINGS[name]] for name in ("tp", "pp", "cp"))
        process_groups.ensure(self.topology(max(process_groups.world_size(), needed)))

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        *,
        init: Init = "random",
    ) -> Chunk:
        """Builds one bare chunk of this rank: with the embedding if `pre_process`, the output layer if `post_process`.

        None: as the rank's place in the pipeline has it. Needs finalize() and process groups. `init` is random
        (config.init_method), empty (uninitialised memory, for weights that are loaded next) or meta (no memory, for plans;
        with the layers of `Backend.without_memory`).
        """
        config, backend = self.config, self.resolved_backend
        if init == "meta":  # a copy, since all other chunks share one config, on which a trainer sets functions
            config = copy.copy(config)
            config.init_model_with_meta_device = config.use_cpu_initialization = True  # torch.device() decides
            backend = backend.without_memory(config)
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        specs = self._layer_specs(config, backend, parallel_state.get_pipeline_model_parallel_rank(), vp_stage or 0)
        on_cpu = config.use_cpu_initialization  # on a CUDA host: the model is converted, not run
        device = torch.device("meta" if init == "meta" else "cpu") if on_cpu else platform.device()
        with device, _initialization(config, enabled=init == "random"):
            return CausalLM(
                config,
                TransformerBlockSubmodules(specs, backend.norm(config, self.layer_options)),
                mtp_block_spec=self._mtp_spec(config, backend, vp_stage),
                vocab_size=self.vocab_size,
                padded_vocab_size=self.padded_vocab_size,
                max_sequence_length=self.seq_length,
                pre_process=pre_process,
                post_process=post_process,
                vp_stage=vp_stage,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                rope=self.rope,
                rotary_percent=self.rotary_percent,
                options=self.layer_options,
            )

    def provide_distributed_model(
        self,
        wrap_with_ddp: bool = True,
        ddp_config: Mapping[str, object] | None = None,
        *,
        init: Init = "random",
        runs: bool = True,
    ) -> list[Chunk]:
        """Builds this rank's chunks (one, or one per virtual stage) on `platform.device()`. Every rank calls it.

        Finalizes, creates the process groups when there are none (a single process needs no set-up), builds the chunks,
        runs the pre-wrap hooks, wraps in Float16Module for bf16 and fp16, then in DistributedDataParallel with the
        distributed optimizer (`ddp_config` overrides fields of DistributedDataParallelConfig), and runs the post-wrap
        hooks. Chunks that are only converted (`runs=False`) are not wrapped in Float16Module, which would cast the weights
        that hooks loaded. Raises ConfigError, with the torchrun command, when more processes are needed.
        """
        self.start_groups()
        config = self.config
        vpp = config.virtual_pipeline_model_parallel_size
        stages = [None] if vpp is None else list(range(vpp))
        chunks = [self.provide(vp_stage=stage, init=init) for stage in stages]
        for hook in self._pre_wrap_hooks:
            chunks = _checked(hook(chunks), hook)
        if runs and (config.bf16 or config.fp16):
            chunks = [in_half_precision(config, chunk) for chunk in chunks]
        if wrap_with_ddp:
            chunks = _data_parallel(chunks, config, ddp_config or {})
            # The setting as it was given: config has it off, for chunks without a gradient buffer.
            if self._given.get("gradient_accumulation_fusion", rules.default("gradient_accumulation_fusion")):
                wgrad_products.fuse_wgrad(chunks)
        elif ddp_config:
            raise ConfigError("ddp_config has no effect with wrap_with_ddp=False; leave it out.")
        for hook in self._post_wrap_hooks:
            chunks = _checked(hook(chunks), hook)
        return chunks

    def _mtp_spec(self, config: Any, backend: Backend, vp_stage: int | None) -> Any:
        """The spec of this chunk's multi-token-prediction layers, which are like the last layer; None where it has none."""
        if not config.mtp_num_layers:
            return None
        last = self._layer_spec(config, backend, config.num_layers - 1)
        return backend.mtp(config, self.layer_options, last, vp_stage)

    def _layer_specs(self, config: Any, backend: Backend, stage: int, chunk: int) -> list[Any]:
        """The specs of the layers of one chunk of a stage."""
        split = self.split
        first = sum(sum(stages[number] for stages in split) for number in range(chunk)) + sum(
            stages[chunk] for stages in split[:stage]
        )
        layers = range(first, first + split[stage][chunk])
        kinds = {rules.has_experts(config, layer): layer for layer in layers}
        specs = {mixed: self._layer_spec(config, backend, layer) for mixed, layer in kinds.items()}
        return [specs[rules.has_experts(config, layer)] for layer in layers]

    def _layer_spec(self, config: Any, backend: Backend, layer: int) -> Any:
        given = self.transformer_layer_spec
        if given is None:
            return backend.layer(config, self.layer_options, has_experts=rules.has_experts(config, layer))
        if isinstance(given, str):
            given = instantiate.named(given, where="transformer_layer_spec")
        return given if isinstance(given, ModuleSpec) else given(config)


@contextlib.contextmanager
def _initialization(config: Any, *, enabled: bool) -> Iterator[None]:
    """Turns the initialisation of parameters on or off for modules that are built inside."""
    wanted = config.perform_initialization
    config.perform_initialization = wanted and enabled
    try:
        yield
    finally:
        config.perform_initialization = wanted


def _data_parallel(chunks: list[Chunk], config: Any, overrides: Mapping[str, object]) -> list[Chunk]:
    settings: dict[str, object] = {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": True,  # bf16 sums over micro-batches lose small gradients
        **overrides,
    }
    try:
        ddp = DistributedDataParallelConfig(**settings)
    except TypeError as error:
        raise ConfigError(f"ddp_config has a field that DistributedDataParallelConfig lacks: {error}") from error
    # Later chunks communicate while the first ones compute: they need no buckets (megatron/training/training.py).
    return [DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]


def _checked(chunks: Any, hook: Hook) -> list[Chunk]:
    if not isinstance(chunks, list):
        raise ConfigError(f"a wrap hook must return the list of chunks; {hook!r} returned {type(chunks).__name__}.")
    return chunks
