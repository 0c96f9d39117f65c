"""A student in vLLM: vLLM's own Qwen3-VL, with the attention of the replaced layers exchanged for a
mixer on vLLM's own convolution, scan and one-step operations.

Vision tower, processor, MRoPE, the remaining attention and the MLPs are vLLM's, and so is the
cache: states stand beside keys and values in its blocks, so batching, chunked prefill and prefix
caching are those of vLLM's hybrids. The folder that distill.py or sft_dpo.py writes is loaded as it
is, every tensor accounted for.

    code         what it is                                            shape
    x            positions of all requests of a step, end to end       (T, D)
    u            what the short convolution reads: x, B, C             (T, (2G + H) P)
    conv state   the convolution's last inputs, a row for each block   (blocks, 3, (2G + H) P)
    ssm state    the state space, fp32                                 (blocks, H, P, N = P)

Mamba-2 in vLLM has as many B as C, silu after the convolution, and a norm after the gate. Ours
(mamba2.py) has one x and one B for each key/value group and one C for each head, no silu, and a
norm for each head before the gate. In vLLM's terms that is a group for each head, with x and B
repeated after the convolution: `Mixer` is its MambaMixer2 with other projections and another end.
"""
import re
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import (MambaStateCopyFuncCalculator,
                                                          MambaStateShapeCalculator)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder, Qwen3VLForConditionalGeneration, Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name

TAPS = 4                                   # positions that the short convolution sees


def shapes(text):
    """-> heads H, groups G, width of a head P."""
    return text.num_attention_heads, text.num_key_value_heads, text.head_dim


def state_shapes(text):
    """Of one request: convolution inputs, and state space; in vLLM's order of their axes."""
    H, G, P = shapes(text)
    return (MambaStateShapeCalculator._orient_conv_shape((2 * G + H) * P, TAPS - 1), (H, P, P))


class Mixer(MambaMixer2):
    """mamba2.Mamba2. Of MambaMixer2 it takes `conv_ssm_forward`, which splits a step's positions
    into prefills and decodes and keeps the states, and what describes those to vLLM."""

    def __init__(self, text, vllm_config, prefix):
        super(MambaMixer2, self).__init__()        # not its __init__: its projections are others
        H, G, P = shapes(text)
        D = text.hidden_size
        self.text, self.prefix = text, prefix
        self.sizes = [G * P, G * P, H * P, H, H * P]                     # x, B, C, dt, gate
        self.in_proj = nn.Linear(D, sum(self.sizes))       # one product; its bias is the gate's
        self.o_proj = nn.Linear(H * P, D, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(P, eps=text.rms_norm_eps) for _ in "qk")
        self.conv = nn.Parameter(torch.zeros((2 * G + H) * P, TAPS))
        self.dt_bias, self.A = (nn.Parameter(torch.zeros(H, dtype=torch.float32)) for _ in range(2))
        self.D = nn.Parameter(torch.zeros(H))
        self.out_norm = nn.Parameter(torch.zeros(H * P))
        # What conv_ssm_forward reads. It is given u and dt alone, so the gate's width is 0.
        self.num_heads = self.n_groups = H
        self.head_dim = self.ssm_state_size = P
        self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size = 0, (2 * G + H) * P, H
        self.tp_size, self.num_spec, self.conv_kernel_size = 1, 0, TAPS
        self.conv1d, self.activation = SimpleNamespace(bias=None), None
        self.split_hidden_states_B_C_fn = self.split
        self.model_config, self.cache_config = vllm_config.model_config, vllm_config.cache_config
        self.mamba_config = vllm_config.mamba_config
        self.use_replayssm = self.is_blackwell = self._ssd_kernels_warmed_up = False
        self.kv_cache = (torch.tensor([]), torch.tensor([]))       # vLLM binds the states here
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def conv_weights(self):
        return self.conv

    def split(self, u):
        """u (T, (2G+H)P) after the convolution -> x, B, C (T, HP): groups are repeated to heads."""
        H, G, P = shapes(self.text)
        x, B, C = u.split(self.sizes[:3], dim=-1)
        x, B = (z.unflatten(-1, (G, 1, P)).expand(-1, -1, H // G, -1).flatten(1) for z in (x, B))
        return x, B, C.contiguous()

    def forward(self, positions, hidden_states):                                    # (T, D)
        P = self.text.head_dim
        x, B, C, dt, gate = self.in_proj(hidden_states).split(self.sizes, dim=-1)
        B = self.k_norm(B.unflatten(-1, (-1, P)).contiguous()).flatten(1)           # (T, GP)
        C = self.q_norm(C.unflatten(-1, (-1, P)).contiguous()).flatten(1) * P ** -0.5
        y = hidden_states.new_empty(len(hidden_states), len(self.out_norm))         # (T, HP)
        # The operation's name is one at which vLLM cuts its compiled graph; it calls conv_ssm_forward.
        torch.ops.vllm.mamba_mixer2(torch.cat((x, B, C, dt), dim=-1), y,
                                    _encode_layer_name(self.prefix))
        y = F.rms_norm(y.unflatten(-1, (-1, P)), (P,), eps=self.text.rms_norm_eps).flatten(1)
        return self.o_proj(y * self.out_norm * F.silu(gate))                        # (T, D)

    def get_kv_cache_spec(self, vllm_config):
        # To share prefixes, vLLM's scan hands out states from inside a prefill; that on a CPU does
        # not. Without them the scheduler ends a step's prefill where a block of the cache ends.
        owner = MambaBase if current_platform.is_cpu() else MambaMixer2
        return owner.get_kv_cache_spec(self, vllm_config)

    def get_state_shape(self):
        return state_shapes(self.text)

    def get_state_dtype(self):
        return self.model_config.dtype, torch.float32

    @torch.no_grad()
    def load(self, name, tensor):
        """One tensor of a student's checkpoint, by its name there. Raises ValueError on another."""
        parts = dict(zip(("v_proj", "k_proj", "q_proj", "dt_proj", "gate_proj"),
                         self.in_proj.weight.split(self.sizes)))
        if name == "gate_proj.bias":
            self.in_proj.bias.zero_()
            target = self.in_proj.bias[-self.sizes[-1]:]
        elif name == "A_log":
            target, tensor = self.A, -tensor.float().exp()
        elif name.removesuffix(".weight") in parts:
            target = parts[name.removesuffix(".weight")]
        else:
            target = dict(self.named_parameters())[name]
        if target.shape != tensor.shape:
            raise ValueError(f"{self.prefix}.{name} is of shape {list(tensor.shape)}, and "
                             f"{list(target.shape)} is needed")
        target.copy_(tensor)


TENSORS = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_norm.weight",
           "k_norm.weight", "conv", "dt_proj.weight", "dt_bias", "A_log", "D", "gate_proj.weight",
           "gate_proj.bias", "out_norm"}           # of a mixer, by their names in a checkpoint


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo,
                                        dummy_inputs=Qwen3VLDummyInputsBuilder)
class Qwen3VLHybrid(Qwen3VLForConditionalGeneration, HasInnerState, IsHybrid):
    def __init__(self, *, vllm_config, prefix="model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text, self.mixers = self.config.text_config, {}
        known = vllm_config.compilation_config.static_forward_context
        for i in self.config.hybrid["layers"]:
            layer = self.language_model.model.layers[i]
            name = layer.self_attn.attn.layer_name
            del known[name]                        # or vLLM would keep keys and values for it
            layer.self_attn = self.mixers[i] = Mixer(text, vllm_config, name.removesuffix(".attn"))

    def load_weights(self, weights):
        found = {i: set() for i in self.mixers}

        def others():
            for name, tensor in weights:
                at = re.fullmatch(r"model\.language_model\.layers\.(\d+)\.self_attn\.(.+)", name)
                if not at or int(at[1]) not in found:
                    yield name, tensor
                elif at[2] not in TENSORS:
                    raise ValueError(f"unexpected tensor {name}")
                else:
                    self.mixers[int(at[1])].load(at[2], tensor)
                    found[int(at[1])].add(at[2])
        loaded = super().load_weights(others())
        missing = [f"model.language_model.layers.{i}.self_attn.{name}"
                   for i, names in found.items() for name in sorted(TENSORS - names)]
        if missing:
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        return loaded | {f"language_model.model.layers.{i}.self_attn.{name}"
                         for i, mixer in self.mixers.items() for name, _ in mixer.named_parameters()}

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        return state_shapes(vllm_config.model_config.hf_text_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()
