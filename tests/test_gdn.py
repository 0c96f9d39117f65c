"""gdn.py against the rule as written, transformers' PyTorch functions of it, and finite differences."""
import pytest
import torch
import torch.nn.functional as F

from gdn import GatedDeltaNet, chunked_delta_rule, delta_rule
from model import Attention, TextConfig
from parts import fast

NAMES = ("q", "k", "v", "log_a", "beta", "state")


def rand(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(b=2, T=37, H=6, G=2, P=5, N=7, dtype=torch.float64):
    """Random arguments of delta_rule by name; keys overlap, so that errors bear on later errors."""
    k = F.normalize(rand(b, T, G, N, seed=1) + 1, dim=-1)
    a = {"q": F.normalize(rand(b, T, H, N, seed=0), dim=-1) / P ** 0.5, "k": k, "v": rand(b, T, G, P, seed=2),
         "log_a": -F.softplus(rand(b, T, H, seed=3) - 2), "beta": torch.sigmoid(rand(b, T, H, seed=4) + 1),
         "state": rand(b, H, P, N, seed=5)}
    return {name: z.to(dtype) for name, z in a.items()}


def naive(q, k, v, log_a, beta, state, mask=None):
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, each row over its real positions only."""
    b, T, H, N = q.shape
    group = torch.arange(H) // (H // k.shape[2])
    y, eye, final = torch.zeros(b, T, *state.shape[1:3], dtype=v.dtype), torch.eye(N, dtype=v.dtype), []
    for row in range(b):
        S = state[row]
        for t in range(T):
            if mask is not None and not mask[row, t]:
                continue
            key, value, b_t = k[row, t, group], v[row, t, group], beta[row, t, :, None, None]
            keep = eye - b_t * torch.einsum("hn,hm->hnm", key, key)
            S = log_a[row, t].exp()[:, None, None] * torch.einsum("hpn,hnm->hpm", S, keep)
            S = S + b_t * torch.einsum("hp,hn->hpn", value, key)
            y[row, t] = torch.einsum("hpn,hn->hp", S, q[row, t])
        final.append(S)
    return y, torch.stack(final)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def transformers(name):
    """One of transformers' PyTorch functions, without the wrapper that may call a fused kernel."""
    where = "transformers.models.qwen3_next.modeling_qwen3_next"
    f = getattr(pytest.importorskip(where, reason="needs transformers"), name)
    return getattr(f, "__wrapped__", f)


def padding(kind, T):
    """Two rows: a whole one, and one with its last (right), first (left) or all positions padded."""
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, {"left": slice(0, T // 3), "right": slice(T - T // 3, T), "all": slice(0, T)}[kind]] = False
    return mask


# ---------------------------------------------------------------------------------------------------------
# delta_rule

@pytest.mark.parametrize("T,chunk", [(1, None), (2, 16), (16, 16), (37, 16), (37, 5), (100, None)])
@pytest.mark.parametrize("G", [6, 2, 1])
def test_chunked_equals_the_recurrence(T, chunk, G):
    a = inputs(T=T, G=G)
    y, state = delta_rule(**a, chunk=chunk)
    y_naive, state_naive = naive(**a)
    assert relative(y, y_naive) < 1e-10 and relative(state, state_naive) < 1e-10
    y32, state32 = delta_rule(**{k: v.float() for k, v in a.items()}, chunk=chunk)
    assert y32.dtype == state32.dtype == torch.float32
    assert relative(y32.double(), y_naive) < 1e-5 and relative(state32.double(), state_naive) < 1e-5
    nothing, zeros = ({**a, "state": s} for s in (None, torch.zeros_like(a["state"])))
    assert torch.equal(delta_rule(**nothing, chunk=chunk)[0], delta_rule(**zeros, chunk=chunk)[0])


@pytest.mark.parametrize("T,Q", [(1, 16), (37, 16), (37, 5), (64, 8)])
@pytest.mark.parametrize("G", [6, 2])
def test_the_plain_chunked_form_equals_the_recurrence(T, Q, G):
    a = inputs(T=T, G=G)
    y, state = chunked_delta_rule(*a.values(), Q)
    y_naive, state_naive = naive(**a)
    assert relative(y, y_naive) < 1e-10 and relative(state, state_naive) < 1e-10


@pytest.mark.parametrize("T,Q,n", [(37, 8, 2), (37, 8, 9), (48, 8, 3), (5, 8, 4)])
@pytest.mark.parametrize("decay", [1, 300])
def test_blocks_of_chunks_equal_the_rule_with_all_gradients(T, Q, n, decay):
    """What a GPU runs, in fp64 on a CPU: whole blocks, a shorter one, a short last chunk; decays that underflow."""
    a = {k: v.requires_grad_() for k, v in inputs(T=T).items()}
    weights = rand(2, T, 6, 5, seed=7), rand(2, 6, 5, 7, seed=8)

    def results(f):
        y, state = f({**a, "log_a": decay * a["log_a"]})
        return [y, state, *torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), list(a.values()))]
    ours = results(lambda a: fast.delta_scan(*a.values(), Q, n))
    for name, got, exact in zip(("y", "new state", *a), ours, results(lambda a: naive(**a))):
        assert relative(got, exact) < 1e-10 and got.isfinite().all(), name


@pytest.mark.parametrize("kind", ["left", "right", "all"])
def test_padding_neither_enters_nor_decays_the_state(kind):
    a, mask = inputs(), padding(kind, 37)
    y, state = delta_rule(**a, mask=mask, chunk=8)
    y_naive, state_naive = naive(**a, mask=mask)
    assert relative(y[mask], y_naive[mask]) < 1e-10 and relative(state, state_naive) < 1e-10


def test_like_keys_and_strong_decay_stay_exact_in_fp32():
    """The hardest cases: one key all along with beta 1, so that K is all ones, and decays that underflow."""
    a = inputs(T=64)
    same = {**a, "k": a["k"][:, :1].expand_as(a["k"]), "beta": torch.ones_like(a["beta"]),
            "log_a": torch.zeros_like(a["log_a"])}
    for hard in (same, {**a, "log_a": 300 * a["log_a"]}):
        hard = {k: v.float().requires_grad_() for k, v in hard.items()}
        y, state = delta_rule(**hard, chunk=64)
        y_naive, _ = naive(**{k: v.double() for k, v in hard.items()})
        assert relative(y.double(), y_naive) < 1e-5
        grads = torch.autograd.grad(y.sum() + state.sum(), list(hard.values()))
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["chunk", "recurrent"])
def test_agrees_with_transformers(name):
    """Outputs, states and, by the chunked one, all gradients. It scales queries itself and works in fp32."""
    f = transformers(f"torch_{name}_gated_delta_rule")
    a = {k: v.requires_grad_() for k, v in inputs(T=150, H=4, G=2, P=16, N=16, dtype=torch.float32).items()}
    k, v = (a[z].repeat_interleave(2, dim=2) for z in ("k", "v"))
    y_theirs, state_theirs = f(a["q"] * 4, k, v, a["log_a"], a["beta"], initial_state=a["state"].mT,
                               output_final_state=True)
    y, state = delta_rule(**a)
    assert relative(y, y_theirs) < 1e-5 and relative(state, state_theirs.mT) < 1e-5
    if name == "chunk":
        weight, weight_state = rand(*y.shape, seed=7), rand(*state.shape, seed=8)
        ours, exact = (torch.autograd.grad((u * weight).sum() + (s * weight_state).sum(), list(a.values()))
                       for u, s in ((y, state), (y_theirs, state_theirs.mT)))
        for n, g, e in zip(a, ours, exact):
            assert relative(g, e) < 3e-5, n


@pytest.mark.parametrize("G", [4, 2])
def test_gradients_agree_with_finite_differences(G):
    """All inputs, the initial state too, through the output and the final state; the second row is padded."""
    a = {k: v.requires_grad_() for k, v in inputs(T=7, H=4, G=G, P=2, N=3).items()}
    mask = padding("left", 7)

    def f(*args):
        y, state = delta_rule(*args, mask=mask, chunk=3)
        return y * mask[..., None, None], state
    assert torch.autograd.gradcheck(f, [a[n] for n in NAMES])


def test_bf16_inputs_keep_state_and_decay_in_fp32():
    a = inputs(T=200, P=16, N=16)
    a16 = {k: v.bfloat16() if k in ("q", "k", "v") else v.float() for k, v in a.items()}
    y, state = delta_rule(**a16)
    y_exact, state_exact = naive(**{k: v.double() for k, v in a16.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative(state.double(), state_exact) < 1e-5 and relative(y.double(), y_exact) < 3e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(delta_rule(**a16)[1], state)


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"\(2, 37, 4, 7\)"):
        delta_rule(**{**inputs(), "k": rand(2, 37, 4, 7, seed=0)})


# ---------------------------------------------------------------------------------------------------------
# The mixer

def attention(H=4, G=2, P=8, D=24, seed=0):
    layer = Attention(TextConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=P), 3)
    for i, p in enumerate(layer.parameters()):
        p.data = rand(*p.shape, seed=100 * seed + i) * 0.3 + (p.dim() == 1)
    return layer.double()


def mixer(init="default", seed=0, **kwargs):
    """A mixer whose every new parameter is far from any start, so that none can hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    m = GatedDeltaNet.from_attention(attention(seed=seed, **kwargs), init, generator)
    for i, (name, p) in enumerate(m.named_parameters()):
        if name.split(".")[0] not in m.INHERITED:
            p.data += 0.3 * rand(*p.shape, seed=50 + i)
    return m


@pytest.mark.parametrize("H,G", [(4, 4), (6, 2), (4, 1)])
def test_weight_transfer_gives_the_delta_rule_head_by_head(H, G):
    """Identity conv, no decay, open gate: each head is the plain delta rule over the keys, values and queries
    that attention's own weights give, without RoPE."""
    layer, D, P, T, beta = attention(H, G), 24, 8, 19, 0.25
    m = GatedDeltaNet.from_attention(layer, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        m.conv.copy_(torch.tensor([0.0, 0, 0, 1]))
        m.A_log.fill_(-60.0), m.beta_proj.weight.zero_(), m.gate_proj.weight.zero_()
        m.beta_proj.bias.fill_(-1.0986122886681098)                                         # beta = 1/4
        m.gate_proj.bias.fill_(1.278464542761)                                              # gate = 1
        x = rand(2, T, D, seed=3)
        norm = lambda z, w: z * (z.pow(2).mean(-1, keepdim=True) + layer.config.rms_norm_eps).rsqrt() * w
        per_head = []
        for h in range(H):
            g = h // (H // G)
            q, k, v = (x @ f.weight[i * P:(i + 1) * P].T for f, i in
                       ((layer.q_proj, h), (layer.k_proj, g), (layer.v_proj, g)))
            q, k = (F.normalize(norm(z, n.weight), dim=-1) for z, n in
                    ((q, layer.q_norm), (k, layer.k_norm)))
            S, ys = torch.zeros(2, P, P, dtype=x.dtype), []
            for t in range(T):
                error = v[:, t] - torch.einsum("bpn,bn->bp", S, k[:, t])
                S = S + beta * torch.einsum("bp,bn->bpn", error, k[:, t])
                ys.append(torch.einsum("bpn,bn->bp", S, q[:, t]) / P ** 0.5)
            size = layer.v_proj.weight[g * P:(g + 1) * P].pow(2).sum().div(P).sqrt()
            per_head.append(0.5 * size * norm(torch.stack(ys, 1), 1.0))
        expected = torch.cat(per_head, -1) @ layer.o_proj.weight.T
        assert relative(m(x)[0], expected) < 1e-6                 # the start of out_norm is computed in fp32


@pytest.mark.parametrize("kind", [None, "left", "right"])
def test_any_split_into_chunks_equals_the_whole(kind):
    """A prompt in one go, position by position and in random pieces, padded on either side, then one more
    token: each row gives what it gives alone and unpadded."""
    m, T = mixer(), 23
    x, mask = rand(2, T + 1, 24, seed=4), torch.ones(2, T + 1, dtype=torch.bool)
    if kind:
        mask[:, :T] = padding(kind, T)
    alone = [m(x[i:i + 1, mask[i]])[0][0] for i in range(2)]
    random = (torch.randint(1, T, (n,), generator=torch.Generator().manual_seed(n)) for n in range(8))
    splits = [[T], list(range(1, T + 1)), *(sorted({T, *r.tolist()}) for r in random)]
    for ends in splits:
        state, ys = None, []
        for start, end in zip([0, *ends], [*ends, T + 1]):
            y, state = m(x[:, start:end], mask[:, start:end] if kind else None, state)
            ys.append(y)
        y = torch.cat(ys, dim=1)
        assert all(relative(y[i, mask[i]], alone[i]) < 1e-10 for i in range(2)), ends


@pytest.mark.parametrize("kind", ["left", "right", "all"])
def test_what_stands_at_padding_changes_nothing(kind):
    m, x, mask = mixer(), rand(2, 20, 24, seed=5), padding(kind, 20)
    state = m(rand(2, 9, 24, seed=6))[1]
    y, after = m(x, mask, state)
    y2, after2 = m(x.masked_fill(~mask[..., None], 1e3), mask, state)
    assert torch.equal(y[mask], y2[mask]) and all(torch.equal(a, b) for a, b in zip(after, after2))
    if kind == "all":
        assert all(torch.equal(a[1], b[1]) for a, b in zip(after, state))


def test_gradients_reach_every_parameter_and_the_input():
    """The mixer as a whole against finite differences along one random direction for each parameter."""
    m, x, mask = mixer(), rand(2, 13, 24, seed=7).requires_grad_(), padding("left", 13)
    weight = rand(2, 13, 24, seed=8) * mask[..., None]
    loss = lambda: (m(x, mask)[0] * weight).sum()
    tensors = dict(m.named_parameters(), x=x)
    grads = torch.autograd.grad(loss(), list(tensors.values()))
    for i, ((name, p), g) in enumerate(zip(tensors.items(), grads)):
        direction, eps = rand(*p.shape, seed=200 + i), 1e-6
        with torch.no_grad():
            p += eps * direction
            up = loss()
            p -= 2 * eps * direction
            down = loss()
            p += eps * direction
        slope = ((up - down) / (2 * eps)).item()
        assert slope != 0 and abs((g * direction).sum().item() / slope - 1) < 1e-5, name


def test_inits_differ_only_in_where_the_same_noise_is_laid():
    layer = attention(H=8, G=2, P=8).float()
    new = lambda init, seed: {n: p for n, p in GatedDeltaNet.from_attention(
        layer, init, torch.Generator().manual_seed(seed)).named_parameters() if n.split(".")[0] not in
        GatedDeltaNet.INHERITED}
    default, paper, again, other = new("default", 0), new("paper", 0), new("default", 0), new("default", 1)
    assert set(paper) == {"conv", "A_log", "beta_proj.weight", "beta_proj.bias", "decay_proj.weight",
                          "decay_bias", "gate_proj.weight", "gate_proj.bias", "out_norm"}
    for name, p in paper.items():
        assert torch.equal(default[name], again[name])
        if name != "out_norm":
            assert not torch.equal(default[name], other[name])
            assert p.abs().max() <= 0.04 and p.std() > 0.01                 # sigma 0.02, cut off at two sigma
    for name in ("A_log", "beta_proj.weight", "decay_proj.weight", "gate_proj.weight"):
        assert torch.equal(default[name], paper[name])
    close = lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    start = {name: default[name] - paper[name] for name in default}
    assert close(start["conv"], torch.tensor([0.0, 0, 0, 1]).expand(96, 4))
    assert close(torch.sigmoid(start["beta_proj.bias"]), 2.0 ** torch.linspace(-1, -6, 8))
    assert close(F.softplus(start["decay_bias"]), 2.0 ** torch.linspace(-4, -12, 8))
    assert close(F.silu(start["gate_proj.bias"]), torch.ones(64))
    with pytest.raises(ValueError, match="no init 'papre'"):
        GatedDeltaNet.from_attention(layer, "papre")


def test_from_attention_clones_in_the_same_dtype():
    layer = attention().bfloat16()
    m = GatedDeltaNet.from_attention(layer, generator=torch.Generator().manual_seed(0))
    assert {p.dtype for n, p in m.named_parameters() if n not in m.FP32} == {torch.bfloat16} and m.layer == 3
    for name in GatedDeltaNet.INHERITED:
        ours, theirs = getattr(m, name).weight, getattr(layer, name).weight
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    y, state = m(rand(2, 70, 24, seed=0, dtype=torch.bfloat16))
    assert y.dtype == state.conv.dtype == torch.bfloat16 and state.delta.dtype == torch.float32
    assert y.isfinite().all()
