"""megatron-core's GPTModel with what Hugging Face models need: their rotary settings, and a padded vocabulary."""

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

    `forward(tokens [b, s], position_ids [b, s], None)` gives logits [b, s, vocabulary shard] on the last stage, and
    with `labels=[b, s]` the losses [b, s]; elsewhere hidden states [s, b, hidden_size]. Columns past `vocab_size` hold
    the lowest finite value: no probability and no gradient. Their rows in embedding and output layer are zero.
    With `packed_seq_params`, a Packed, b is 1 and s all the tokens of its documents.
    """

    stored: Callable[[], dict[str, Any]] | None = None
    """Gives what a native checkpoint has of the chunk, where that isn't all of it: its adapters."""

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
        style: LayerOptions,
    ) -> None:
        table = "learned_absolute" if style.learned_positions else "none"
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
        self.unpadded_vocab_size, self.style = vocab_size, style
        if rope is not None and config.multi_latent_attention:
            for layer in self._layers():
                multi_latent_attention.set_rope(layer.self_attention, rope)
        elif rope is not None:
            self._set_rope(rope, rotary_percent)
        if config.softmax_type == "learnable":
            self._mark_sinks()
        if post_process and style.output_bias:
            self._add_output_bias()
        self._zero_padding()
        if (pre_process or self.mtp_process) and style.embedding_multiplier != 1.0:
            self.embedding.word_embeddings.register_forward_hook(self._scale_embeddings)
        changes = vocab_size < padded_vocab_size or style.logits_multiplier != 1.0 or style.logits_softcap is not None
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
        """Losses [b, s] of `logits` [s, b, vocabulary shard], which the backward pass overwrites, for `labels` [b, s]."""
        if self.config.cross_entropy_loss_fusion and self.config.cross_entropy_fusion_impl != "native":
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        return cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp).transpose(0, 1).contiguous()

    @override
    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """For packed rows the angles of every token: megatron-core's own way turns one document after the other."""
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
            for one in (rope, self.style.local_rope)
            if one is not None
        ]
        self.rotary_pos_emb = ropes[0] if len(ropes) == 1 else LocalAndGlobal(*ropes)
        for layer in self._layers():
            windowed = is_layer_window_attention(self.config.window_size, self.config.window_attn_skip_freq, layer.layer_number)
            rotary_factors.set_factor(layer.self_attention, ropes[-1 if windowed else 0].attention_factor)

    def _mark_sinks(self) -> None:
        """Says that sinks are cut over tp: what converts and what adds up gradient norms asks the parameter. No backend says it."""
        for layer in self._layers():
            sinks, is_cut = layer.self_attention.core_attention.softmax_offset, self.pg_collection.tp.size() > 1
            tensor_parallel.set_tensor_model_parallel_attributes(sinks, is_cut, 0, 1)

    @override
    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a native checkpoint has of this chunk, by local name (see `stored`)."""
        return super().sharded_state_dict(*args, **kwargs) if self.stored is None else self.stored()

    def keep_recomputation_alive(self) -> None:
        """Lets the embedding's output ask for a gradient where activations are recomputed and the embedding is frozen.

        A recomputed block is one autograd function; it has a backward only where a tensor that it is given asks for a gradient, and
        the first block is given nothing but the embedding's output: its own trained weights would get none.
        """
        if not self.pre_process or self.config.recompute_granularity is None:
            return
        if not any(parameter.requires_grad for parameter in self.embedding.parameters()):
            self.embedding.register_forward_hook(_ask_for_gradient)

    def real_columns(self, width: int) -> int:
        """How many of `width` vocabulary entries here are real; `width` is this rank's shard, or the whole."""
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
        """A bias for the output layer, which GPTModel always builds without; cut over tp as the weight's rows are."""
        device = None if self.config.use_cpu_initialization else platform.device()  # None: a surrounding torch.device() holds
        rows = self.output_layer.output_size_per_partition
        self.output_layer.bias = torch.nn.Parameter(torch.zeros(rows, dtype=self.config.params_dtype, device=device))
        tensor_parallel.set_tensor_model_parallel_attributes(self.output_layer.bias, True, 0, 1)

    def _scale_embeddings(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        factor = self.style.embedding_multiplier
        if self.style.round_embedding_multiplier:
            factor = torch.tensor(factor, dtype=self.config.params_dtype).item()
        return output * factor

    def _finish_logits(self, module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Multiplies and caps logits, and hides padded columns from whatever reads them. A hook, so that every loss sees it."""
        logits, bias = output
        if self.style.logits_multiplier != 1.0:
            logits = logits * self.style.logits_multiplier
        if self.style.logits_softcap is not None:
            logits = torch.tanh(logits / self.style.logits_softcap) * self.style.logits_softcap
        real = self.real_columns(logits.shape[-1])
        if real < logits.shape[-1]:
            logits[..., real:] = torch.finfo(logits.dtype).min  # not -inf: p * log p of a padded column would be NaN
        return logits, bias


def _ask_for_gradient(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
