"""How much memory a training run will need on each device, counted from the shapes alone."""
import re


def estimate_memory(config, frozen, trained, micro_tokens, width, world=1, shard=False,
                    recompute=False, drifts=0):
    """-> {what: bytes} on one device; within 2 % of the measured peak of a c4 step on a GPU.

    config: of the text model. frozen, trained: {name: parameter}, of any device. micro_tokens:
    positions of a micro-batch. width: bytes of a frozen weight. world: how many devices share the
    decoder's layers. shard, recompute: the flags. drifts: how many fp32 copies of each layer's
    stream are kept besides (Stages 1/2 with --feed own; fed the teacher's they need one layer's
    activations at a time, and Stage 3 the most).
    """
    D, L, I = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    HP = config.num_attention_heads * config.head_dim
    half = width < 4
    embeddings_train = any("embed_tokens" in n for n in trained)
    mlps_train = any("language_model" in n and ".mlp." in n for n in trained)
    adapters = any(n.endswith(".A") for n in trained)

    def held(named):                     # how many of these parameters one device holds
        split = re.compile(r"language_model.*\.(self_attn|mlp)\.")
        return sum(p.numel() / (world if split.search(n) else 1) for n, p in named.items())

    # What the backward pass keeps, in bytes a layer and position.
    row = 2 * config.norms * D * width   # in and out of the norms
    row += 13 * HP * width               # read by the mixer's linear layers, convolution and scan
    row += (2 + mlps_train) * I * width  # the MLP's gate and up, their product where W_down trains
    row += half * 4 * config.norms * D   # bf16: what they read is fp32
    row += half * embeddings_train * 22 * D        # an fp32 stream; every linear layer's own cast
    row += adapters * (5 * D + HP + I) * (width + 1)         # LoRA's dropped-out inputs, and masks
    # With --recompute it is the stream alone, and all of the rest for one layer at a time.
    stream = D * (4 if embeddings_train else width)
    kept = L * stream + row if recompute else L * row
    kept += L * drifts * 4 * D

    # autocast's bf16 casts of fp32 masters; sharded and recomputed, they come and go with a layer.
    casts = 0 if shard and recompute or not half else 2 * held(trained)
    return dict(frozen=held(frozen) * width,
                trained=held(trained) * 16,        # fp32: master, gradient, AdamW's two moments
                activations=micro_tokens * kept + casts,
                head=3 * 512 * config.vocab_size * 4)        # fp32: logits of chunks of 512 rows
