"""ModelProvider: names, rules, splits, wrapping; on a single process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.config import schema, validation
from megabridge.errors import ConfigError
from megabridge.families.core.known_sizes import known_sizes
from megabridge.launchers.prepare import resolve
from megabridge.models.logits import gather_logits
from megabridge.models.provider import ModelProvider
from megabridge.parallel import process_groups
from tests.support import llama
from tests.support.compose import compose

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig


def provider(**settings: Any) -> ModelProvider:
    return llama.provider_of({}, settings)


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        provider(**settings).finalize()
    return str(caught.value).split("\n  ")


@pytest.fixture
def single() -> Iterator[None]:
    yield
    process_groups.stop()


# ---------------------------------------------------------------------- names


def test_every_field_of_transformer_config_is_a_setting() -> None:
    ours = provider()
    for field in dataclasses.fields(TransformerConfig):
        if field.init and not field.name.startswith("_"):
            setattr(ours, field.name, getattr(ours, field.name))
    assert {"num_layers", "vocab_size", "recompute_granularity", "q_lora_rank"} <= set(dir(ours))


def test_an_unknown_name_names_the_nearest() -> None:
    ours = provider()
    with pytest.raises(ConfigError, match="did you mean 'tensor_model_parallel_size'"):
        ours.tensor_parallel_size = 2
    with pytest.raises(ConfigError, match="no setting 'hiden_size'; did you mean 'hidden_size'"):
        _ = ours.hiden_size
    with pytest.raises(ConfigError, match="no setting 'num_layerz'; did you mean 'num_layers'"):
        ModelProvider({"num_layerz": 2}, family_name="Any")
    with pytest.raises(ConfigError, match="no setting 'config'"):
        ours.config = None
    assert not hasattr(ours, "hiden_size")


def test_nothing_changes_after_finalize() -> None:
    ours = provider()
    ours.num_layers = 6
    ours.finalize()
    ours.finalize()
    with pytest.raises(ConfigError, match=r"num_layers can't be set after finalize\(\)"):
        ours.num_layers = 8
    assert ours.num_layers == ours.config.num_layers == 6
    assert copy.deepcopy(ours).describe() == copy.copy(ours).describe() == ours.describe()


def test_the_config_exists_after_finalize() -> None:
    with pytest.raises(ConfigError, match=r"call provider.finalize\(\) first"):
        _ = provider().config


def test_defaults_and_what_follows() -> None:
    ours = provider(params_dtype="bfloat16", virtual_pipeline_model_parallel_size=1)
    assert (ours.hidden_dropout, ours.attention_dropout) == (0.0, 0.0)
    ours.finalize()
    config = ours.config
    assert (config.params_dtype, config.bf16, config.fp16, config.pipeline_dtype) == (
        torch.bfloat16,
        True,
        False,
        torch.bfloat16,
    )
    assert ours.virtual_pipeline_model_parallel_size is None
    assert ours.num_query_groups == 4 and config.finalize_model_grads_func is not None


def test_vpp_never_batches_its_messages() -> None:
    ours = provider(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, batch_p2p_comm=True)
    ours.finalize()
    assert (ours.config.overlap_p2p_comm, ours.config.batch_p2p_comm) == (True, False)


# ---------------------------------------------------------------------- rules


def test_all_problems_come_in_one_error() -> None:
    found = problems(
        tensor_model_parallel_size=3,
        pipeline_model_parallel_size=9,
        sequence_parallel=True,
        seq_length=64,
        ffn_hidden_size=100,
        activation_func="swoosh",
        rope={"rope_type": "spiral", "rope_theta": 1e4},
    )
    assert found == [
        "parallel.tp=3 must divide num_attention_heads=8; use one of 1, 2, 4.",
        "parallel.tp=3 must divide num_query_groups=4, or be a multiple of it; use one of 1, 2, 4.",
        "parallel.tp=3 must divide ffn_hidden_size=100; use one of 1, 2, 4.",
        "parallel.pp x parallel.vpp = 9 x 1 leaves chunks without layers for num_layers=4; use at most 6 chunks.",
        "seq_length=64 must be a multiple of tp x cp = 3 under parallel.sequence_parallel; use 63.",
        "activation_func='swoosh' must be one of silu, gelu, gelu_pytorch_tanh, gelu_new, relu, relu2, quick_gelu, or a function.",
        "rope_type='spiral' is not supported; use one of default, linear, llama3, yarn, dynamic, longrope, proportional, alpha.",
    ]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"hidden_size": None}, "hidden_size must be set to a positive number; it is None."),
        ({"tensor_model_parallel_size": 0}, "parallel.tp=0 must be at least 1, and whole"),
        ({"num_query_groups": 3}, "num_query_groups=3 must divide num_attention_heads=8; use 1, 2, 4, 8."),
        ({"kv_channels": None, "hidden_size": 60}, "num_attention_heads=8 must divide hidden_size=60"),
        (
            {"tensor_model_parallel_size": 8, "num_query_groups": 1, "kv_channels": 2},
            "parallel.tp=8 must divide the query, key and value rows, (8 + 2 x 1) x 2",
        ),
        ({"sequence_parallel": True}, "parallel.sequence_parallel=true needs parallel.tp > 1"),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "parallel.vpp=2 needs pp > 1",
        ),
        ({"expert_model_parallel_size": 2}, "parallel.ep=2 needs a model with experts"),
        ({"context_parallel_size": 2}, "parallel.cp=2 needs backend=te, not torch"),
        ({"backend": "tea"}, "backend='tea' must be one of auto, torch, te, local; did you mean 'te'?"),
        ({"backend": "te"}, "backend=te runs on CUDA only; use backend=torch."),
        (
            {"backend": "local", "sequence_parallel": True, "tensor_model_parallel_size": 2},
            "backend=local has no sequence parallelism (megatron-core's torch norms); use backend=torch.",
        ),
        ({"normalization": "BatchNorm"}, "normalization='BatchNorm' must be one of RMSNorm, LayerNorm."),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one' needs backend=te or local, not torch; set it so."),
        ({"fp8": "hybrid"}, "fp8='hybrid' needs backend=te, not torch; set it so, or fp8=None."),
        ({"post_norm": True, "backend": "local"}, "post_norm=True needs backend=torch, not local; set it so."),
        ({"params_dtype": "int8"}, "params_dtype='int8' must be one of float32, bfloat16, float16."),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True can't both be"),
        ({"bf16": True, "params_dtype": "float16"}, "bf16=True and params_dtype=float16 contradict each other"),
        ({"add_bias_linear": True}, "add_bias_linear=True must equal add_mlp_bias=False"),
        ({"rotary_percent": 0.5, "rope": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "rope's partial_rotary"),
        ({"recompute_granularity": "some"}, "megatron-core refuses the settings of LlamaForCausalLM: When using"),
        ({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}, "megatron-core refuses"),
    ],
)
def test_rules(settings: dict[str, Any], problem: str) -> None:
    found = problems(**settings)
    assert len(found) == 1 and found[0].startswith(problem), found


def test_a_rule_is_one_sentence_in_the_parent_and_in_the_provider() -> None:
    sizes = {"tp": 3, "pp": 7, "cp": 2, "sequence_parallel": True}
    given = ["model=tiny_llama", "backend=torch", *(f"parallel.{name}={value}" for name, value in sizes.items())]
    run = resolve(compose(*given), Path("run"))[1]
    topology, native = schema.topology(run.parallel), known_sizes(run.model)
    with pytest.raises(ConfigError) as caught:
        validation.check_layout(run, topology, native)
    ours = ModelProvider(native, family_name="LlamaForCausalLM")
    for name, value in {**topology.settings(), "sequence_parallel": True, "backend": "torch"}.items():
        setattr(ours, name, value)
    with pytest.raises(ConfigError) as refused:
        ours.finalize()
    lines = str(refused.value).split("\n  ")
    assert len(lines) == 6
    assert lines == [line for line in str(caught.value).split("\n  ") if not line.startswith("recipe.")], "the batches are a run's"


# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("settings", "split", "printed"),
    [
        ({}, [[4]], "single, backend=torch, float32, vocabulary 128, layers per stage 4"),
        ({"pipeline_model_parallel_size": 2}, [[2], [2]], "pp2, backend=torch, float32, vocabulary 128, layers per s"),
        ({"pipeline_model_parallel_size": 3}, [[1], [2], [1]], "layers per stage 1 | 2 | 1"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "num_layers": 7},
            [[2, 2], [2, 1]],
            "pp2vpp2, backend=torch, float32, vocabulary 128, layers per stage 2+2 | 2+1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|tt|t|tL"},
            [[0, 1], [2, 1]],
            "pp2vpp2, backend=torch, float32, vocabulary 128, layers per stage 0+1 | 2+1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
            [[1], [3]],
            "layers per stage 1 | 3",
        ),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True, "vocab_size": 131, "params_dtype": "bfloat16"},
            [[4]],
            "tp4 sequence-parallel, backend=torch, bfloat16, vocabulary 131 (padded to 132), layers per stage 4",
        ),
    ],
)
def test_the_split_is_printed(settings: dict[str, Any], split: list[list[int]], printed: str) -> None:
    ours = provider(**settings)
    ours.finalize()
    assert ours.split == split
    assert ours.describe().startswith("LlamaForCausalLM: ") and printed in ours.describe()


# ---------------------------------------------------------------------- models


def test_a_single_process_needs_no_set_up(single: None) -> None:
    assert process_groups.current() is None
    ours = provider(vocab_size=131, make_vocab_size_divisible_by=8)
    [chunk] = ours.provide_distributed_model()
    assert isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.use_distributed_optimizer
    tokens = torch.randint(0, 131, (2, 16))
    positions = torch.arange(16)[None].expand(2, -1)
    logits = chunk(tokens, positions, None)
    assert logits.shape == (2, 16, 136)
    assert (logits[..., 131:] == torch.finfo(torch.float32).min).all() and logits[..., :131].abs().max() < 100
    assert torch.equal(gather_logits([chunk], tokens), logits[..., :131])
    chunk(tokens, positions, None, labels=tokens).mean().backward()
    weights = dict(chunk.module.named_parameters())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert weights[name][131:].abs().max() == 0, "padded rows are zero"
        assert weights[name].main_grad[131:].abs().max() == 0, "and stay so"
        assert weights[name].main_grad[:131].abs().max() > 0


def test_more_processes_are_asked_for_with_the_command(single: None) -> None:
    with pytest.raises(ConfigError, match="tp2pp2 needs 4 processes, but 1 process runs; start it with `torchrun"):
        provider(tensor_model_parallel_size=2, pipeline_model_parallel_size=2).provide_distributed_model()
    assert process_groups.current() is None


def test_hooks_and_wrapping_in_order(single: None) -> None:
    seen: list[tuple[str, list[type]]] = []

    def hook(name: str) -> Any:
        def run(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
            seen.append((name, [type(chunk).__name__ for chunk in chunks]))
            return chunks

        return run

    ours = provider(params_dtype="bfloat16")
    ours.register_pre_wrap_hook(hook("first"))
    ours.register_pre_wrap_hook(hook("second"))
    ours.register_post_wrap_hook(hook("last"))
    [chunk] = ours.provide_distributed_model(ddp_config={"check_for_nan_in_grad": True})
    assert seen == [("first", ["CausalLM"]), ("second", ["CausalLM"]), ("last", ["DistributedDataParallel"])]
    assert isinstance(chunk.module, Float16Module) and chunk.ddp_config.check_for_nan_in_grad
    assert {parameter.dtype for parameter in chunk.parameters()} == {torch.bfloat16}
    assert {parameter.main_grad.dtype for parameter in chunk.parameters()} == {torch.float32}
    tokens = torch.randint(0, 128, (1, 8))
    assert gather_logits([chunk], tokens).dtype == torch.float32 and chunk.training


def test_a_hook_that_forgets_to_return(single: None) -> None:
    ours = provider()
    ours.register_pre_wrap_hook(lambda chunks: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="must return the list of chunks"):
        ours.provide_distributed_model()


def test_ddp_config_is_checked(single: None) -> None:
    with pytest.raises(ConfigError, match="overlap_grad_reduction"):
        provider().provide_distributed_model(ddp_config={"overlap_grad_reduction": True})
    with pytest.raises(ConfigError, match="no effect with wrap_with_ddp=False"):
        provider().provide_distributed_model(wrap_with_ddp=False, ddp_config={"bucket_size": 1})


def test_a_meta_chunk_takes_no_memory(single: None) -> None:
    ours = provider(attention_dropout=0.1, share_embeddings_and_output_weights=True, add_qkv_bias=True)
    ours.finalize()
    process_groups.ensure(ours.topology(1))
    chunk = ours.provide(init="meta")
    assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
    assert not ours.config.init_model_with_meta_device and ours.config.perform_initialization
    real = dict(ours.provide(init="empty").named_parameters())
    for name, parameter in chunk.named_parameters():
        marks = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
        assert parameter.shape == real[name].shape
        assert [getattr(parameter, mark, None) for mark in marks] == [getattr(real[name], mark, None) for mark in marks]


def test_a_layer_spec_of_the_users(single: None) -> None:
    ours = provider(transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"))
    [chunk] = ours.provide_distributed_model(wrap_with_ddp=False)
    assert isinstance(chunk.decoder.layers[0].input_layernorm, torch.nn.RMSNorm)
    process_groups.stop()
    ours = provider(transformer_layer_spec=lambda config: get_gpt_layer_local_spec(normalization=config.normalization))
    [chunk] = ours.provide_distributed_model(wrap_with_ddp=False)
    assert isinstance(chunk.decoder.layers[0].input_layernorm, torch.nn.RMSNorm)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_the_local_backend_gives_the_same_logits(single: None, normalization: str) -> None:
    """megatron-core's own layers, attention and norms are the reference for ours."""
    tokens = torch.randint(0, 128, (2, 16))
    logits = []
    state: dict[str, torch.Tensor] = {}
    for backend in ("torch", "local"):
        ours = provider(backend=backend, normalization=normalization, add_attn_proj_bias=True, init_method_std=0.2)
        [chunk] = ours.provide_distributed_model(wrap_with_ddp=False)
        if state:
            chunk.load_state_dict(state)
        state = chunk.state_dict()
        logits.append(gather_logits([chunk], tokens))
    assert logits[0].std() > 0.3
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"qk_layernorm": True}, {"activation_func": "gelu", "gated_linear_unit": False}])
def test_layers_that_no_family_uses_yet(single: None, settings: dict[str, Any]) -> None:
    [chunk] = provider(add_mlp_bias=True, **settings).provide_distributed_model()
    tokens = torch.randint(0, 128, (1, 8))
    loss = chunk(tokens, torch.arange(8)[None], None, labels=tokens).mean()
    loss.backward()
    assert loss.isfinite() and all(parameter.main_grad.abs().sum() > 0 for parameter in chunk.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ],
)
def test_recomputation_changes_no_gradient(single: None, settings: dict[str, Any]) -> None:
    tokens = torch.randint(0, 128, (1, 8))
    gradients = []
    for changes in ({}, settings):
        process_groups.stop()
        [chunk] = provider(attention_dropout=0.3, hidden_dropout=0.2, **changes).provide_distributed_model()
        process_groups.seed(3)
        chunk(tokens, torch.arange(8)[None], None, labels=tokens).mean().backward()
        gradients.append(torch.cat([parameter.main_grad.flatten() for parameter in chunk.parameters()]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
