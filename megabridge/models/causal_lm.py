"""CausalLM: megatron-core's GPTModel with Hugging Face's rotary settings, scaled logits and a padded vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, override

import torch
from torch import Tensor

import megabridge.platform as platform
from megabridge.models.layer_options import LayerOptions
from megabridge.models.layers import multi_latent_attention
from megabridge.models.layers.attention import TorchAttention
from megabridge.models.layers.loss import cross_entropy
from megabridge.models.layers.packed import Packed, for_attention
from megabridge.models.layers.rotary import HFRotaryEmbedding, LocalAndGlobal
from megabridge.platform.patches import rotary_factors

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import is_layer_window_attention


class CausalLM(GPTModel):  # type: ignore[misc]
    """One chunk of a causal language model: the layers of one (pipeline, virtual pipeline) stage.

    `forward(tokens [b, s], position_ids [b, s], None)` returns logits [b, s, vocabulary shard] on the last stage, or the
    losses [b, s] with `labels=[b, s]`; on other stages hidden states [s, b, hidden_size]. Logits past `vocab_size` have the
    lowest finite value: no probability and no gradient. Their rows in embedding and output layer are zero.
    With `packed_seq_params`, a Packed, b is 1 and s is the number of tokens of all its documents.
    """

    own_sharded_state: Callable[[], dict[str, Any]] | None = None
    """Returns the sharded state dict for native checkpoints where that is not the whole chunk: adapters alone."""

    def __init__(
        self,
        config: Any,
        block_spec: Any,
        *,
        mtp_block_spec: Any,
        vocab_size: int,
        padded_vocab_size: int,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        share_embeddings_and_output_weights: bool,
        rope: Mapping[str, Any] | None,
        rotary_percent: float,
        options: LayerOptions,
    ) -> None:
        table = "learned_absolute" if options.learned_positions else "none"
        super().__init__(
            config,
            block_spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            position_embedding_type=table if rope is None else "rope",
            rotary_percent=rotary_percent,
            vp_stage=vp_stage,
            mtp_block_spec=mtp_block_spec,
        )
        self.unpadded_vocab_size, self.options = vocab_size, options
        if rope is not None and config.multi_latent_attention:
            for layer in self._layers():
                multi_latent_attention.set_rope(layer.self_attention, rope)
        elif rope is not None:
            self._set_rope(rope, rotary_percent)
        if config.softmax_type == "learnable":
            self._mark_sinks()
        if post_process and options.output_bias:
            self._add_output_bias()
        self._zero_padding()
        if (pre_process or self.mtp_process) and options.embedding_multiplier != 1.0:
            self.embedding.word_embeddings.register_forward_hook(self._scale_embeddings)
        changes = vocab_size < padded_vocab_size or options.logits_multiplier != 1.0 or options.logits_softcap is not None
        if post_process and changes:
            self.output_layer.register_forward_hook(self._finish_logits)

    @override
    def forward(self, *args: Any, packed_seq_params: Packed | None = None, **kwargs: Any) -> Any:
        if packed_seq_params is not None:
            cores = [layer.self_attention.core_attention for layer in self._layers()]
            kwargs["packed_seq_params"] = for_attention(packed_seq_params, cores, TorchAttention)
        return super().forward(*args, **kwargs)

    @override
    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [b, s] for `labels` [b, s] and `logits` [s, b, vocabulary shard]; the backward pass overwrites the logits."""
        if self.config.cross_entropy_loss_fusion and self.config.cross_entropy_fusion_impl != "native":
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        return cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp).transpose(0, 1).contiguous()

    @override
    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Takes the rotary angles of every token of packed rows at once; megatron-core rotates one document after another."""
        decoder_input, angles, *rest = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if angles is not None and isinstance(packed_seq_params, Packed):
            angles = angles.index_select(-4, packed_seq_params.positions)
        return decoder_input, angles, *rest

    def _layers(self) -> list[Any]:
        """The transformer layers of this chunk, those of multi-token prediction last."""
        ahead = [layer.mtp_model_layer for layer in self.mtp.layers] if self.mtp_process else []
        return [*self.decoder.layers, *ahead]

    def _set_rope(self, rope: Mapping[str, Any], rotary_percent: float) -> None:
        ropes = [
            HFRotaryEmbedding(
                one,
                kv_channels=self.config.kv_channels,
                rotary_percent=rotary_percent,
                interleaved=self.config.rotary_interleaved,
                cp_group=self.pg_collection.cp,
            )
            for one in (rope, self.options.local_rope)
            if one is not None
        ]
        self.rotary_pos_emb = ropes[0] if len(ropes) == 1 else LocalAndGlobal(*ropes)
        for layer in self._layers():
            windowed = is_layer_window_attention(self.config.window_size, self.config.window_attn_skip_freq, layer.layer_number)
            rotary_factors.set_factor(layer.self_attention, ropes[-1 if windowed else 0].attention_factor)

    def _mark_sinks(self) -> None:
        """Marks sinks as sharded over tp, which no backend does; conversion and gradient norms read it from the parameter."""
        for layer in self._layers():
            sinks, is_cut = layer.self_attention.core_attention.softmax_offset, self.pg_collection.tp.size() > 1
            tensor_parallel.set_tensor_model_parallel_attributes(sinks, is_cut, 0, 1)

    @override
    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The sharded tensors that a native checkpoint has of this chunk, by local name (see `own_sharded_state`)."""
        return super().sharded_state_dict(*args, **kwargs) if self.own_sharded_state is None else self.own_sharded_state()

    def enable_input_require_grads(self) -> None:
        """Makes the output of a frozen embedding require a gradient where activations are recomputed.

        A recomputed block is one autograd function, which has a backward pass only if one of its inputs requires a gradient. The
        first block's only input is the embedding's output: without this its trained weights would get no gradient.
        """
        if not self.pre_process or self.config.recompute_granularity is None:
            return
        if not any(parameter.requires_grad for parameter in self.embedding.parameters()):
            self.embedding.register_forward_hook(_require_gradient)

    def real_columns(self, width: int) -> int:
        """Number of unpadded vocabulary entries among `width`, the size of this rank's shard or of the whole vocabulary."""
        first = 0 if width == self.vocab_size else self.pg_collection.tp.rank() * width
        return min(max(self.unpadded_vocab_size - first, 0), width)

    @torch.no_grad()
    def _zero_padding(self) -> None:
        weights = []
        if self.pre_process or self.mtp_process:
            weights.append(self.embedding.word_embeddings.weight)
        if self.post_process and self.output_layer.weight is not None:
            weights.append(self.output_layer.weight)
        for weight in weights:
            weight[self.real_columns(weight.shape[0]) :].zero_()

    def _add_output_bias(self) -> None:
        """Adds a bias to the output layer, which GPTModel always builds without one; sharded over tp as the weight's rows are."""
        device = None if self.config.use_cpu_initialization else platform.device()  # None: a surrounding torch.device() holds
        rows = self.output_layer.output_size_per_partition
        self.output_layer.bias = torch.nn.Parameter(torch.zeros(rows, dtype=self.config.params_dtype, device=device))
        tensor_parallel.set_tensor_model_parallel_attributes(self.output_layer.bias, True, 0, 1)

    def _scale_embeddings(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        factor = self.options.embedding_multiplier
        if self.options.round_embedding_multiplier:
            factor = torch.tensor(factor, dtype=self.config.params_dtype).item()
        return output * factor

    def _finish_logits(self, module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Multiplies and caps logits, and masks padded columns. A hook, so that it applies to every loss."""
        logits, bias = output
        if self.options.logits_multiplier != 1.0:
            logits = logits * self.options.logits_multiplier
        if self.options.logits_softcap is not None:
            logits = torch.tanh(logits / self.options.logits_softcap) * self.options.logits_softcap
        real = self.real_columns(logits.shape[-1])
        if real < logits.shape[-1]:
            logits[..., real:] = torch.finfo(logits.dtype).min  # not -inf: p * log p of a padded column would be NaN
        return logits, bias


def _require_gradient(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
