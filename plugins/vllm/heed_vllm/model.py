"""A distilled student inside vLLM (Sect. 4.1); `pip install ./plugins/vllm && vllm serve out/c4`.

vLLM's Qwen3-VL as it stands (vision half, processor, decoder), in whose replaced layers a mixer of
ours sits in attention's place, as in model.py. The math is that of mamba2.py and gdn.py, whose
headers have the equations; new here is where states live. vLLM flattens the tokens of all requests
into one row, those that decode first, one token each, and then those that read their prompts,
maybe a chunk only. Each request owns a slot in each layer's cache, into which the layer leaves its
two states and from which it takes them up:

    code     what it is                                                   shape
    u        v, k, q (x, B, C in mamba2.py) side by side, before the conv (T, (2G + H) P)
    conv     the convolution's last inputs                                (slots, (2G + H) P, 3)
    ssm      S of mamba2.py and gdn.py, in fp32                           (slots, H, P, N)
    extra    what a mixer needs at each position besides u                (T, H) or (T, 2 H)

Shape letters: T tokens of all requests, R requests, D model width, H heads, P head dim, N = P state
dim, G key/value groups.

Mamba-2 runs on vLLM's own convolution, scan and one-step update. It is that of vLLM with as many
groups as heads: v and k are repeated after the convolution. There is no SiLU, and the norm comes
before the gate. Gated DeltaNet runs on vLLM's convolution and the plain PyTorch below, because
vLLM's delta rule takes no fp32 on a CPU, and no heads of 32.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.mamba import mamba_mixer2  # noqa: F401  (it defines an op)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator, MambaStateShapeCalculator, is_conv_state_dim_first)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import (
    causal_conv1d_fn, causal_conv1d_update)
from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

TAPS = 4                               # of the convolution


def state_shapes(text):
    """Of one slot: conv, in the order of axes that vLLM is set to, and ssm."""
    H, G, P = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    return MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=1, intermediate_size=H * P, n_groups=G, num_heads=H, head_dim=P, state_size=P,
        conv_kernel=TAPS)


# --------------------------------------------------------------------------------------------------
# The mixers


class Mixer(nn.Module, MambaBase):
    """What both mixers share: projections, convolution, the gate, and the way to the states.

    Parameters have their names in the folder, but for two: vLLM stacks q_proj, k_proj and v_proj
    into qkv_proj, and gate_proj is `gate` here, for vLLM would stack that name into an MLP's."""

    def __init__(self, text, dtype, prefix):
        super().__init__()
        self.text, self.dtype, self.prefix = text, dtype, prefix
        D, P = text.hidden_size, text.head_dim
        H, G = text.num_attention_heads, text.num_key_value_heads
        self.H, self.G, self.P = H, G, P
        self.sizes = [G * P, G * P, H * P]                                      # of v, k, q in u
        self.qkv_proj = QKVParallelLinear(D, P, H, G, bias=False, prefix=f"{prefix}.qkv_proj")
        self.o_proj = nn.Linear(H * P, D, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(P, eps=text.rms_norm_eps) for _ in "qk")
        self.conv = nn.Parameter(torch.empty(sum(self.sizes), TAPS))
        self.gate = nn.Linear(D, H * P)
        self.out_norm = nn.Parameter(torch.empty(H * P))
        self.kv_cache = (torch.tensor([]), torch.tensor([]))     # vLLM puts the states here
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def per_head(self, dtype=None):
        return nn.Parameter(torch.empty(self.H, dtype=dtype))

    # -- what vLLM asks of a layer with states

    mamba_type = MambaAttentionBackendEnum.MAMBA2

    def get_state_shape(self):
        return state_shapes(self.text)

    def get_state_dtype(self):
        return self.dtype, torch.float32

    # -- from one position to the next

    def forward(self, positions, hidden_states):                                        # (T, D)
        H, G, P = self.H, self.G, self.P
        q, k, v = self.qkv_proj(hidden_states)[0].split([H * P, G * P, G * P], dim=-1)
        q = self.q_norm(q.unflatten(1, (H, P))) * self.query_scale                      # (T, H, P)
        k = self.k_norm(k.unflatten(1, (G, P)))         # (T, G, P)  no RoPE, as in mamba2.py
        inputs = torch.cat([v, k.flatten(1), q.flatten(1), *self.extra(hidden_states)], dim=1)
        y = hidden_states.new_empty(len(hidden_states), H * P)
        # At this op vLLM cuts its compiled graphs; it calls the `conv_ssm_forward` of the layer.
        torch.ops.vllm.mamba_mixer2(inputs, y, _encode_layer_name(self.prefix))
        y = F.rms_norm(y.unflatten(1, (H, P)), (P,), eps=self.text.rms_norm_eps).flatten(1)
        return self.o_proj(y * self.out_norm * F.silu(self.gate(hidden_states)))        # (T, D)

    def conv_ssm_forward(self, projected_states, output):
        """What reads and writes the slots. projected_states (T, (2G + H) P + ...) are u and extra;
        output (T, H P) is written in place."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:                              # vLLM only measures memory: no slots yet
            output.zero_()
            return
        metadata, (conv, ssm) = metadata[self.prefix], self.kv_cache
        conv = conv if is_conv_state_dim_first() else conv.transpose(1, 2)
        steps, read, E = metadata.num_decode_tokens, metadata.num_prefill_tokens, sum(self.sizes)
        u, extra = projected_states[:, :E], projected_states[:, E:]
        if read:
            at, slots = slice(steps, steps + read), metadata.state_indices_tensor_p
            goes_on = metadata.has_initial_states_p                                     # (R,) bool
            y = causal_conv1d_fn(
                u[at].T, self.conv, None, conv_states=conv, cache_indices=slots, activation=None,
                has_initial_state=goes_on, query_start_loc=metadata.query_start_loc_p,
                metadata=metadata).T[:read]
            # A slot may hold what an earlier request left: a prompt's first chunk begins at zero.
            before = torch.where(goes_on[:, None, None, None], ssm[slots], 0.0)      # (R, H, P, N)
            ssm[slots] = self.scan(*self.heads(y), extra[at], before, output[at], metadata)
        if steps:
            slots = metadata.state_indices_tensor_d[:, 0]
            y = causal_conv1d_update(u[:steps].contiguous(), conv, self.conv, None, None,
                                     conv_state_indices=slots)
            self.step(*self.heads(y), extra[:steps], ssm, slots, output[:steps])

    def heads(self, u):
        """u (T, (2G + H) P) -> v, k, q (T, H, P): a group's v and k repeated to its heads."""
        v, k, q = (z.unflatten(1, (-1, self.P)) for z in u.split(self.sizes, dim=1))
        v, k = (z.repeat_interleave(self.H // self.G, dim=1) for z in (v, k))
        return v, k, q.contiguous()


class Mamba2(Mixer):
    """mamba2.Mamba2; x, B, C are v, k, q here."""

    def __init__(self, *args):
        super().__init__(*args)
        self.query_scale = self.P ** -0.5
        self.dt_proj = nn.Linear(self.text.hidden_size, self.H, bias=False)
        self.dt_bias, self.A_log = (self.per_head(torch.float32) for _ in range(2))
        self.D = self.per_head()

    def extra(self, x):
        return [self.dt_proj(x)]                                                        # (T, H)

    def scan(self, x, B, C, dt, before, out, metadata):
        """All positions of the R requests that read, from the states `before` (R,H,P,N) -> those
        after."""
        return mamba_chunk_scan_combined_varlen(
            x, dt, -torch.exp(self.A_log), B, C, chunk_size=metadata.chunk_size, D=self.D,
            dt_bias=self.dt_bias, dt_softplus=True, cu_seqlens=metadata.query_start_loc_p,
            cu_chunk_seqlens=metadata.cu_chunk_seqlen_p, seq_idx=metadata.seq_idx_p,
            last_chunk_indices=metadata.last_chunk_indices_p, initial_states=before,
            out=out.view(x.shape), state_dtype=before.dtype)

    def step(self, x, B, C, dt, ssm, slots, out):
        """One position of each request, from its slot and into it."""
        H, P = self.H, self.P
        A = -torch.exp(self.A_log)[:, None, None].expand(H, P, P)
        dt, dt_bias, D = (z[..., None].expand(*z.shape, P) for z in (dt, self.dt_bias, self.D))
        selective_state_update(ssm, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True,
                               state_batch_indices=slots, dst_state_batch_indices=slots,
                               out=out.view(x.shape))


class GatedDeltaNet(Mixer):
    """gdn.GatedDeltaNet."""
    query_scale = 1.0                                     # the unit length that follows undoes any

    def __init__(self, *args):
        super().__init__(*args)
        self.beta_proj = nn.Linear(self.text.hidden_size, self.H)
        self.decay_proj = nn.Linear(self.text.hidden_size, self.H, bias=False)
        self.decay_bias, self.A_log = (self.per_head(torch.float32) for _ in range(2))

    def extra(self, x):
        return [self.beta_proj(x), self.decay_proj(x)]                             # (T, H) each

    def ready(self, v, k, q, extra):
        """-> q, k (of unit length), v, log_a, beta in fp32, as delta_rule takes them."""
        beta, decay = extra.float().chunk(2, dim=1)                                     # (T, H)
        log_a = -torch.exp(self.A_log) * F.softplus(decay + self.decay_bias)
        k, q = (F.rms_norm(z, (self.P,), eps=1e-6).to(v.dtype) * self.P ** -0.5 for z in (k, q))
        return *(z.float() for z in (q * self.P ** -0.5, k, v)), log_a, torch.sigmoid(beta)

    def scan(self, v, k, q, extra, before, out, metadata):
        inputs, after = self.ready(v, k, q, extra), []
        bounds = metadata.query_start_loc_p.tolist()
        for state, a, b in zip(before, bounds, bounds[1:]):
            state = state[None]
            for t in range(a, b, 64):
                at = slice(t, min(b, t + 64))
                y, state = delta_rule(*(z[None, at] for z in inputs), state)
                out[at] = y[0].flatten(1)
            after.append(state)
        return torch.cat(after)                                                     # (R, H, P, N)

    def step(self, v, k, q, extra, ssm, slots, out):
        y, ssm[slots] = delta_rule(*(z[:, None] for z in self.ready(v, k, q, extra)), ssm[slots])
        out.copy_(y[:, 0].flatten(1))


def delta_rule(q, k, v, log_a, beta, state):
    """gdn.chunked_delta_rule over one chunk: q, k, v (B,T,H,P), log_a, beta (B,T,H), state
    (B,H,P,N) -> y (B,T,H,P), the state after it. For T = 1 this is the rule itself."""
    q, k, v, log_a, beta = (z.transpose(1, 2) for z in (q, k, v, log_a[..., None], beta[..., None]))
    total = log_a.cumsum(2)                               # (B, H, T, 1)  log of the decay up to t
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    L = (total - total.mT).masked_fill(~causal, -torch.inf).exp()    # (B, H, T, T)  from s to t
    start, to_end = total.exp(), (total[:, :, -1:] - total).exp()
    overlap = (L * (k @ k.mT)).tril(-1)                   # how much of what s stored key t finds
    error = torch.linalg.solve_triangular(overlap * beta.mT, v - start * (k @ state.mT),
                                          upper=False, unitriangular=True)
    y = start * (q @ state.mT) + (L * (q @ k.mT)) @ (beta * error)
    return y.transpose(1, 2), total[:, :, -1:].exp() * state + (to_end * beta * error).mT @ k


# --------------------------------------------------------------------------------------------------
# The model

MIXERS = {"mamba2": Mamba2, "gdn": GatedDeltaNet}         # by their words in config.json
RENAMED = (".self_attn.gate_proj.", ".self_attn.gate.")   # from a folder to here


class Qwen3VLHybrid(Qwen3VLForConditionalGeneration, HasInnerState, IsHybrid):
    """Qwen3-VL with our mixers in the layers that config.json's `hybrid` names."""
    hf_to_vllm_mapper = Qwen3VLForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_substr=dict([RENAMED]))

    def __init__(self, *, vllm_config, prefix="model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hybrid, text = self.config.hybrid, self.config.text_config
        known = vllm_config.compilation_config.static_forward_context
        for i in hybrid["layers"]:                        # in all layers attention was built
            layer = self.language_model.model.layers[i]
            name = layer.self_attn.attn.layer_name
            del known[name]                               # else vLLM keeps keys and values for it
            layer.self_attn = MIXERS[hybrid["mixer"]](text, vllm_config.model_config.dtype,
                                                      name.removesuffix(".attn"))

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        return state_shapes(vllm_config.model_config.hf_text_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()

    def stored_names(self):
        """Every tensor of a folder that distill.py or sft_dpo.py wrote for this model."""
        names, back = set(), {"language_model.model.": "model.language_model.",
                              "visual.": "model.visual.", "language_model.lm_head.": "lm_head."}
        for name, _ in self.named_parameters():
            prefix = next(new for new in back if name.startswith(new))
            name = back[prefix] + name.removeprefix(prefix).replace(*reversed(RENAMED))
            *owner, module, last = name.split(".")
            for part in self.packed_modules_mapping.get(module, [module]):
                names.add(".".join([*owner, part, last]))
        return names

    def load_weights(self, weights):
        """Strictly: ValueError names each tensor that is missing or spare, or the first that does
        not fit."""
        expected, seen, spare = self.stored_names(), [], []
        blind = not list(self.visual.parameters())        # vLLM is to see no pictures

        def known():
            for name, tensor in weights:
                if blind and name.startswith("model.visual."):
                    continue
                (seen if name in expected else spare).append(name)
                if name in expected:
                    yield name, tensor
        try:
            loaded = super().load_weights(known())
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{seen[-1]} does not fit this model: {error}") from error
        wrong = [f"missing tensor {name}" for name in sorted(expected - set(seen))]
        wrong += [f"unexpected tensor {name}" for name in spare]
        if wrong:
            raise ValueError("the folder does not hold this model: " + "; ".join(wrong))
        return loaded
