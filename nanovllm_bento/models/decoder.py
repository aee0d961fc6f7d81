"""The decoder that all families share: pre-norm blocks of attention and a gated MLP, a final norm, an LM head.

A family's module subclasses DecoderForCausalLM and says only what is different: class attributes such as ``qk_norm``,
or another MLP through ``make_mlp`` (where a mixture of experts belongs).

With a group of several ranks each holds its part of every layer (Shoeybi et al., "Megatron-LM", 2019, section 3): what
attention and MLP return are partial sums, which the norm that follows completes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nanovllm_bento.kernels.activation import silu_and_mul
from nanovllm_bento.kernels.attention.base import AttentionBackend, AttentionMetadata
from nanovllm_bento.kernels.products import FewRows, FusedProducts, choose_fused, choose_products
from nanovllm_bento.kernels.rope_store import RopeStoreStep, make_step
from nanovllm_bento.layers.attention import Attention
from nanovllm_bento.layers.embedding import LMHead, TokenEmbedding
from nanovllm_bento.layers.linear import MergedLinear
from nanovllm_bento.layers.mlp import MLP
from nanovllm_bento.layers.norm import RMSNorm
from nanovllm_bento.layers.parallel import SINGLE, ParallelGroup
from nanovllm_bento.layers.rotary import RotaryEmbedding
from nanovllm_bento.layers.weight_spec import WeightSpec, allocate, split
from nanovllm_bento.models.config import ModelConfig


class GatedMLP(MLP):
    """down(silu(gate(x)) * up(x)); gate and up are one product. Ranks split the intermediate size."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, group: ParallelGroup = SINGLE) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, split(config.intermediate_size, group), config.mlp_bias
        self.gate_up = MergedLinear(hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias, dtype=dtype)
        self.down = MergedLinear(inner, {"down_proj": hidden}, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size] -> this rank's partial sum of the same shape."""
        out: Tensor = self.down(silu_and_mul(self.gate_up(x)))
        return out

    def forward_fused(self, products: FusedProducts, hidden: Tensor, norm: RMSNorm) -> Tensor:
        assert self.gate_up.weight is not None and self.down.weight is not None
        x = products.norm_gate_up(hidden, norm.weight, norm.eps, self.gate_up.weight)
        return products.linear_add(x, self.down.weight, None, hidden)

    def forward_by(self, products: FewRows, x: Tensor) -> Tensor:
        assert self.gate_up.weight is not None
        return self.down.parts_by(products, products.gate_up(x, self.gate_up.weight))

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        yield from self.gate_up.weight_specs(prefix)
        yield from self.down.weight_specs(prefix)

    def finalize(self) -> None:
        self.gate_up.finalize()
        self.down.finalize()


class DecoderLayer(nn.Module):
    """One block. The residual stream travels beside the output, so that its add is fused into the next norm."""

    def __init__(
        self, config: ModelConfig, mlp: MLP, *, qk_norm: bool, dtype: torch.dtype, group: ParallelGroup = SINGLE
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, group=group)
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.attention_bias,
            o_bias=config.o_bias,
            qk_norm=qk_norm,
            eps=config.rms_norm_eps,
            dtype=dtype,
            group=group,
        )
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, group=group)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        last: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: the block before's output, [num_tokens, hidden_size], not yet added to residual (same shape).

        In a group of several ranks it is a partial sum, as what is returned. residual None: x is the embedding. With
        last what is returned is that of these tokens alone (see ``Attention.attend``).
        """
        x, residual = self.input_norm(x, residual)
        x = self.attention(x, step, kv_cache, meta, last)
        x, residual = self.post_attention_norm(x, residual if last is None else residual.index_select(0, last))
        return self.mlp(x), residual

    def forward_by(
        self,
        products: FewRows,
        x: Tensor,
        residual: Tensor | None,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """``forward`` for a decode step. In a group of one, x and what is returned may be parts of the sum."""
        x, residual = self.input_norm(x, residual)
        x = self.attention.forward_by(products, x, step, kv_cache, meta)
        x, residual = self.post_attention_norm(x, residual)
        return self.mlp.forward_by(products, x), residual

    def forward_fused(
        self,
        products: FusedProducts,
        hidden: Tensor,
        step: RopeStoreStep,
        kv_cache: tuple[Tensor, Tensor],
        meta: AttentionMetadata,
        last: Tensor | None = None,
    ) -> Tensor:
        """``forward`` in a group of one, norms, activation and residual adds left to the products.

        hidden: the residual stream, [num_tokens, hidden_size], everything before added; it is overwritten.
        """
        qkv, out = self.attention.qkv, self.attention.out
        assert qkv.weight is not None and out.weight is not None
        x = products.norm_linear(hidden, self.input_norm.weight, self.input_norm.eps, qkv.weight, qkv.bias)
        x = self.attention.attend(x, step, kv_cache, meta, last)
        if last is not None:
            hidden = hidden.index_select(0, last)
        hidden = products.linear_add(x, out.weight, out.bias, hidden)
        return self.mlp.forward_fused(products, hidden, self.post_attention_norm)

    def weight_specs(self, prefix: str) -> Iterator[WeightSpec]:
        yield from self.input_norm.weight_specs(f"{prefix}input_layernorm")
        yield from self.attention.weight_specs(f"{prefix}self_attn.")
        yield from self.post_attention_norm.weight_specs(f"{prefix}post_attention_layernorm")
        yield from self.mlp.weight_specs(f"{prefix}mlp.")

    def finalize(self) -> None:
        self.attention.finalize()
        self.mlp.finalize()


class DecoderForCausalLM(nn.Module):
    """A whole model, or rank ``group.rank``'s part of it, which the ranks of the group call together.

    Built on the meta device; ``materialize`` gives it memory and weights.
    """

    qk_norm = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, group: ParallelGroup = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.group = group
        self.attention_backend: AttentionBackend | None = None
        self.fusable = not config.mlp_bias
        self.embed = TokenEmbedding(config.vocab_size, config.hidden_size, dtype=dtype, group=group)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                self.make_mlp(config, i, dtype=dtype, group=group),
                qk_norm=self.qk_norm,
                dtype=dtype,
                group=group,
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, group=group)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.lm_head = LMHead(self.embed, tied=config.tie_word_embeddings)

    def make_mlp(self, config: ModelConfig, layer_index: int, *, dtype: torch.dtype, group: ParallelGroup) -> MLP:
        return GatedMLP(config, dtype=dtype, group=group)

    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Use ``backend`` in all layers; call its ``prepare(meta)`` once before each forward."""
        self.attention_backend = backend
        for layer in self._layers:
            layer.attention.backend = backend

    @property
    def attentions(self) -> list[Attention]:
        """Each layer's attention, in order."""
        return [layer.attention for layer in self._layers]

    def set_batch_invariant(self) -> None:
        """From now on a token's logits are bit-equal whatever else is in the batch (with a backend made for that)."""
        self.fusable = False
        for module in self.modules():
            if isinstance(module, MergedLinear | LMHead):
                module.batch_invariant = True

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        meta: AttentionMetadata,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """input_ids, positions: int64 [num_tokens]; kv_caches: (k_cache, v_cache) of each layer, initialised finite.

        Returns hidden states after the final norm, [num_tokens, hidden_size]; with last_only those of each row's last
        token, [num_rows, hidden_size], and the last layer then computes little else. Call it under
        torch.inference_mode().
        """
        step = make_step(self.rotary.table, positions, meta.slot_mapping)
        fused = products = None
        if self.fusable:
            case = len(input_ids), self.dtype, input_ids.device, self.config.hidden_size, self.group.size
            fused, products = choose_fused(*case), choose_products(*case)
        assert self.attention_backend is not None, "set_attention_backend comes first"
        last_only &= meta.has_prefill_rows  # decode rows have no other tokens
        last = residual = None
        x = self.embed(input_ids)
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            if last_only and layer is self.layers[-1]:
                last, meta = meta.last_tokens()
                self.attention_backend.prepare(meta)
            if fused is not None:
                x = layer.forward_fused(fused, x, step, kv_cache, meta, last)
            elif products is not None and last is None:
                x, residual = layer.forward_by(products, x, residual, step, kv_cache, meta)
            else:
                x, residual = layer(x, residual, step, kv_cache, meta, last)
        out: Tensor = self.norm(x, residual)[0]
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size], on all ranks; float32 on a CPU, else the model's dtype."""
        return self.lm_head.gather(self.own_logits(hidden))

    def own_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """This rank's part of them: [rows, lm_head.shard.length]. out: where to write them (GPU only)."""
        logits: Tensor = self.lm_head(hidden, self.embed, out)
        return logits

    def weight_specs(self) -> Iterator[WeightSpec]:
        """Every tensor that a checkpoint of this model must hold, under its Hugging Face name, and the part to read."""
        for _, specs in self._parts():
            yield from specs

    def materialize(self, fill: Callable[[WeightSpec], None], *, num_positions: int, device: torch.device) -> None:
        """Allocate the parameters, let ``fill`` write each spec's target, and bring them into the form that runs.

        Specs of which this rank takes nothing are left out; memory that no spec fills is zeros.
        Part by part, so that the plain and the packed copy of a weight exist together for one layer only.
        num_positions: length of the rotary table, in tokens.
        """
        for part, specs in self._parts():
            allocate(part, specs, device)
            for spec in specs:
                if spec.num_elements:
                    fill(spec)
            if isinstance(part, DecoderLayer):
                part.finalize()
        self.lm_head.finalize(self.embed)
        self.rotary.finalize(num_positions, device)

    def _parts(self) -> Iterator[tuple[nn.Module, list[WeightSpec]]]:
        yield self.embed, list(self.embed.weight_specs("model.embed_tokens"))
        for i, layer in enumerate(self._layers):
            yield layer, list(layer.weight_specs(f"model.layers.{i}."))
        yield self.norm, list(self.norm.weight_specs("model.norm"))
        yield self.lm_head, list(self.lm_head.weight_specs("lm_head"))

    @property
    def _layers(self) -> list[DecoderLayer]:
        return list(self.layers)  # type: ignore[arg-type]
