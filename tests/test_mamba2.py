"""mamba2.py against the recurrence as written, finite differences, and explicit linear attention."""
import types

import pytest
import torch
import torch.nn.functional as F

from mamba2 import Mamba2, causal_conv, chunked_ssd, ssd
from model import Attention, TextConfig
from parts import fast

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def rand(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(b=2, T=37, H=6, G=2, P=5, N=7, dtype=torch.float64):
    """Random arguments of ssd by name; every head decays at its own pace."""
    a = {"x": rand(b, T, G, P, seed=0), "dt": F.softplus(rand(b, T, H, seed=1) - 1),
         "A": -torch.exp(rand(H, seed=2)), "B": rand(b, T, G, N, seed=3),
         "C": rand(b, T, H, N, seed=4) / N ** 0.5, "D": rand(H, seed=5), "state": rand(b, H, P, N, seed=6)}
    return {name: z.to(dtype) for name, z in a.items()}


def naive(x, dt, A, B, C, D, state, mask=None):
    """The recurrence, entry by entry in einsum letters, each row walking over its own real positions only."""
    b, T, G, _ = x.shape
    group = torch.arange(C.shape[2]) // (C.shape[2] // G)
    y, final = torch.zeros(b, T, *state.shape[1:3], dtype=x.dtype), []
    for row in range(b):
        S = state[row]
        for t in range(T):
            if mask is not None and not mask[row, t]:
                continue
            S = torch.einsum("h,hpn->hpn", torch.exp(dt[row, t] * A), S) + torch.einsum(
                "h,hp,hn->hpn", dt[row, t], x[row, t, group], B[row, t, group])
            y[row, t] = torch.einsum("hpn,hn->hp", S, C[row, t]) + D[:, None] * x[row, t, group]
        final.append(S)
    return y, torch.stack(final)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def padding(kind, T):
    """Two rows: a whole one, and one with its first (left) or last (right) third padded, or all of it."""
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, {"left": slice(0, T // 3), "right": slice(T - T // 3, T), "all": slice(0, T)}[kind]] = False
    return mask


# ---------------------------------------------------------------------------------------------------------
# ssd

@pytest.mark.parametrize("T,chunk", [(1, None), (2, 16), (16, 16), (37, 16), (37, 5), (100, None)])
@pytest.mark.parametrize("G", [6, 2, 1])
def test_chunked_equals_the_recurrence(T, chunk, G):
    a = inputs(T=T, G=G)
    y, state = ssd(**a, chunk=chunk)
    y_naive, state_naive = naive(**a)
    assert relative(y, y_naive) < 1e-10 and relative(state, state_naive) < 1e-10
    y32, state32 = ssd(**{k: v.float() for k, v in a.items()}, chunk=chunk)
    assert y32.dtype == state32.dtype == torch.float32
    assert relative(y32.double(), y_naive) < 1e-5 and relative(state32.double(), state_naive) < 1e-5


@pytest.mark.parametrize("T,Q", [(1, 16), (37, 16), (37, 5), (64, 8)])
@pytest.mark.parametrize("G", [6, 2])
def test_the_plain_chunked_form_equals_the_recurrence(T, Q, G):
    a = inputs(T=T, G=G)
    y, state = chunked_ssd(*a.values(), Q)
    y_naive, state_naive = naive(**a)
    assert relative(y, y_naive) < 1e-10 and relative(state, state_naive) < 1e-10


@pytest.mark.parametrize("T,Q,n", [(37, 8, 2), (37, 8, 9), (48, 8, 3), (5, 8, 4)])
@pytest.mark.parametrize("decay", [1, 300])
def test_blocks_of_chunks_equal_the_recurrence_with_all_gradients(T, Q, n, decay):
    """What a GPU runs, in fp64 on a CPU: whole blocks, a shorter one, a short last chunk; decays that underflow."""
    a = {k: v.requires_grad_() for k, v in inputs(T=T).items()}
    weights = rand(2, T, 6, 5, seed=7), rand(2, 6, 5, 7, seed=8)
    order = ("x", "dt", "A", "B", "C", "D", "state")

    def results(f):
        y, state = f({**a, "A": decay * a["A"]})
        return [y, state, *torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), list(a.values()))]
    ours = results(lambda a: fast.ssd_scan(*(a[k] for k in order), Q, n))
    for name, got, exact in zip(("y", "new state", *a), ours, results(lambda a: naive(**a))):
        assert relative(got, exact) < 1e-10 and got.isfinite().all(), name


@pytest.mark.parametrize("kind", ["left", "right", "all"])
def test_padding_neither_enters_nor_decays_the_state(kind):
    a, mask = inputs(), padding(kind, 37)
    y, state = ssd(**a, mask=mask, chunk=8)
    y_naive, state_naive = naive(**a, mask=mask)
    assert relative(y[mask], y_naive[mask]) < 1e-10 and relative(state, state_naive) < 1e-10


def test_strong_decay_stays_finite_and_exact():
    """Within a chunk exp of the summed decay underflows and its inverse overflows: neither may reach y."""
    a = {k: v.float().requires_grad_() for k, v in inputs(T=64).items()}
    y, state = ssd(**{**a, "A": 300 * a["A"]}, chunk=64)
    assert relative(y, naive(**{**a, "A": 300 * a["A"]})[0]) < 1e-5
    grads = torch.autograd.grad(y.sum() + state.sum(), list(a.values()))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("G", [2, 1])
def test_gradients_agree_with_finite_differences(G):
    """All inputs, the initial state too, through the output and the final state; the second row is padded.
    Five chunks, the last one short, and thus two spans of the backward pass."""
    a = {k: v.requires_grad_() for k, v in inputs(T=9, H=2, G=G, P=2, N=3).items()}
    mask = padding("left", 9)
    f = lambda *args: tuple(z * m for z, m in zip(ssd(*args, mask=mask, chunk=2), (mask[..., None, None], 1)))
    assert torch.autograd.gradcheck(f, [a[n] for n in NAMES])


def test_the_backward_pass_may_be_called_inside_autocast():
    """bf16 inputs: the same gradients inside the region and outside it, for scan and convolution."""
    grads = []
    for inside in (False, True):
        a = {k: (v.bfloat16() if k in ("x", "B", "C") else v.float()).requires_grad_() for k, v in inputs(T=40).items()}
        u, weight = rand(2, 12, 5, seed=0).bfloat16().requires_grad_(), rand(5, 4, seed=1).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, conv = ssd(**a)[0], causal_conv(u, weight)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(y.float().sum() + conv.float().sum(), [*a.values(), u, weight]))
    assert all(torch.equal(g, h) for g, h in zip(*grads))


def test_gradients_in_fp32_over_many_chunks():
    a = inputs(T=300, H=4, G=2, P=16, N=16)
    weights = rand(2, 300, 4, 16, seed=7), rand(2, 4, 16, 16, seed=8)

    def grads(f, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in a.items()}
        outputs = f(**{**leaves, "dt": leaves["dt"] / 30})                      # a memory of many chunks
        loss = sum((z * w).sum() for z, w in zip(outputs, weights))
        return torch.autograd.grad(loss, list(leaves.values()))

    for name, ours, exact in zip(a, grads(ssd, torch.float32), grads(naive, torch.float64)):
        assert relative(ours.double(), exact) < 1e-5, name


def test_bf16_inputs_keep_state_and_decay_in_fp32():
    a = inputs(T=200, P=16, N=16)
    a16 = {k: v.bfloat16() if k in ("x", "B", "C") else v.float() for k, v in a.items()}
    y, state = ssd(**a16)
    y_exact, state_exact = naive(**{k: v.double() for k, v in a16.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative(state.double(), state_exact) < 1e-5 and relative(y.double(), y_exact) < 3e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd(**a16)[1], state)


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"\(2, 37, 4, 7\)"):
        ssd(**{**inputs(), "B": rand(2, 37, 4, 7, seed=0)})


# ---------------------------------------------------------------------------------------------------------
# The mixer

def attention(H=4, G=2, P=8, D=24, seed=0):
    layer = Attention(TextConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=P), 3)
    for i, p in enumerate(layer.parameters()):
        p.data = rand(*p.shape, seed=100 * seed + i) * 0.3 + (p.dim() == 1)
    return layer.double()


def mixer(init="default", seed=0, **kwargs):
    """A mixer whose every new parameter is far from any start, so that none can hide a fault."""
    m = Mamba2.from_attention(attention(seed=seed, **kwargs), init, torch.Generator().manual_seed(seed))
    for i, (name, p) in enumerate(m.named_parameters()):
        if name.split(".")[0] not in m.INHERITED:
            p.data += 0.3 * rand(*p.shape, seed=50 + i)
    return m


@pytest.mark.parametrize("H,G", [(4, 4), (6, 2), (4, 1)])
def test_weight_transfer_gives_linear_attention_head_by_head(H, G):
    """Identity conv, no decay, open gate, no skip: each head is linear attention with attention's weights."""
    layer, D, P, T = attention(H, G), 24, 8, 19
    m = Mamba2.from_attention(layer, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        m.conv.copy_(torch.tensor([0.0, 0, 0, 1]))
        m.A_log.fill_(-60.0), m.D.zero_(), m.dt_proj.weight.zero_(), m.gate_proj.weight.zero_()
        m.dt_bias.fill_(0.5413248546129181), m.gate_proj.bias.fill_(1.278464542761)    # dt = gate = 1
        x = rand(2, T, D, seed=3)
        norm = lambda z, w: z * (z.pow(2).mean(-1, keepdim=True) + layer.config.rms_norm_eps).rsqrt() * w
        per_head = []
        for h in range(H):
            g = h // (H // G)
            q, k, v = (x @ f.weight[i * P:(i + 1) * P].T for f, i in
                       ((layer.q_proj, h), (layer.k_proj, g), (layer.v_proj, g)))
            q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
            scores = torch.einsum("btn,bsn->bts", q, k).tril() / P ** 0.5
            y = norm(torch.einsum("bts,bsp->btp", scores, v), 1.0)
            size = layer.v_proj.weight[g * P:(g + 1) * P].pow(2).sum().div(P).sqrt()
            per_head.append(0.5 * size * y)
        expected = torch.cat(per_head, -1) @ layer.o_proj.weight.T
        assert relative(m(x)[0], expected) < 1e-6                       # out_norm's start is in fp32


@pytest.mark.parametrize("padded,border", [(None, 23), ((0, 7), 23), ((16, 23), 23), ((8, 15), 12)])
def test_any_split_into_chunks_equals_the_whole(padded, border):
    """Two pieces, single positions and random pieces, padded on the left, on the right (then one more token) or
    in the middle (right in one piece, left in the next): each row gives what it gives alone and unpadded."""
    m, T = mixer(), 24
    x, mask = rand(2, T, 24, seed=4), torch.ones(2, T, dtype=torch.bool)
    if padded:
        mask[1, slice(*padded)] = False
    alone = [m(x[i:i + 1, mask[i]])[0][0] for i in range(2)]
    random = torch.Generator().manual_seed(0)
    pieces = [sorted({border, T, *torch.randint(1, T, (n,), generator=random).tolist()}) for n in range(1, 8)]
    for ends in [[border, T], list(range(1, T + 1)), *pieces]:
        state, ys = None, []
        for start, end in zip([0, *ends], ends):
            y, state = m(x[:, start:end], mask[:, start:end] if padded else None, state)
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


def test_causal_conv_equals_its_definition():
    u, weight = rand(2, 9, 5, seed=0), rand(5, 4, seed=1)
    y, memory = causal_conv(u, weight)
    for t in range(9):
        expected = sum(weight[:, 3 - lag] * u[:, t - lag] for lag in range(4) if lag <= t)
        assert torch.allclose(y[:, t], expected, atol=1e-12)
    assert torch.equal(memory, u[:, -3:])


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
    new = lambda init, seed: {n: p for n, p in Mamba2.from_attention(
        layer, init, torch.Generator().manual_seed(seed)).named_parameters() if n.split(".")[0] not in
        Mamba2.INHERITED}
    default, paper, again, other = new("default", 0), new("paper", 0), new("default", 0), new("default", 1)
    assert set(paper) == {"conv", "A_log", "D", "dt_proj.weight", "dt_bias", "gate_proj.weight",
                          "gate_proj.bias", "out_norm"}
    for name, p in paper.items():
        assert torch.equal(default[name], again[name])
        if name != "out_norm":
            assert not torch.equal(default[name], other[name])
            assert p.abs().max() <= 0.04 and p.std() > 0.01                 # sigma 0.02, cut off at two sigma
    for name in ("A_log", "D", "dt_proj.weight", "gate_proj.weight"):
        assert torch.equal(default[name], paper[name])
    close = lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-6)
    assert close(default["conv"] - paper["conv"], torch.tensor([0.0, 0, 0, 1]).expand(96, 4))
    steps = F.softplus(default["dt_bias"] - paper["dt_bias"])
    assert torch.allclose(steps, 2.0 ** torch.linspace(-4, -12, 8), rtol=1e-3)
    assert close(F.silu(default["gate_proj.bias"] - paper["gate_proj.bias"]), torch.ones(64))
    with pytest.raises(ValueError, match="no init 'papre'"):
        Mamba2.from_attention(layer, "papre")


def test_from_attention_clones_in_the_same_dtype():
    layer = attention().bfloat16()
    m = Mamba2.from_attention(layer, generator=torch.Generator().manual_seed(0))
    assert {p.dtype for n, p in m.named_parameters() if n not in m.FP32} == {torch.bfloat16} and m.layer == 3
    for name in Mamba2.INHERITED:
        ours, theirs = getattr(m, name).weight, getattr(layer, name).weight
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    y, state = m(rand(2, 70, 24, seed=0, dtype=torch.bfloat16))
    assert y.dtype == state.conv.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert y.isfinite().all()


# ---------------------------------------------------------------------------------------------------------
# The optional kernels: our arguments, given to functions with the kernels' signatures that run on a CPU

def transformers_kernels():
    """transformers' PyTorch fallbacks have the kernels' signatures, groups and initial state included."""
    theirs = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="needs transformers")
    both = theirs.mamba2_chunk_scan, theirs.mamba2_selective_state_update
    return [getattr(f, "__wrapped__", f) for f in both]                    # past the search for a kernel


def mamba_ssm_kernels():
    """The reference functions that mamba-ssm itself is tested against (importing them needs triton)."""
    for name in ("triton", "mamba_ssm"):
        pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
    from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan_ref
    from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state_ref
    from mamba_ssm.ops.triton.ssd_state_passing import state_passing_ref

    def scan(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states):
        assert x.shape[1] % chunk_size == 0 and return_final_states
        dt = dt.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)                      # (B, H, chunks, Q)
        total = (dt * A[:, None, None]).cumsum(-1)
        states = chunk_state_ref(B, x, dt, total)
        states, final = state_passing_ref(states.flatten(3), total[..., -1], initial_states.flatten(2))
        states = states.unflatten(-1, initial_states.shape[2:])
        return chunk_scan_ref(B, C, x, dt, total, states, D=D), final.view_as(initial_states)
    return scan, selective_state_update_ref


@pytest.mark.parametrize("kernels", [transformers_kernels, mamba_ssm_kernels])
def test_kernels_get_the_arguments_they_expect(kernels, monkeypatch):
    """With `kernel` answering as on a GPU, scan and step give what the PyTorch path gives."""
    scan, step = kernels()
    a = inputs(T=512, dtype=torch.float32)
    mask = padding("right", 512)
    one = {k: v[:, :1] if k in ("x", "dt", "B", "C") else v for k, v in a.items()}
    expected, expected_one = ssd(**a, mask=mask), ssd(**one)

    def checked(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
        """What the published wrapper asserts and reads before it calls the kernel: one number a head, by strides."""
        assert x.shape == dt.shape and A.shape == (6, 5, 7) and B.shape == C.shape == (2, 6, 7) and D.shape == (6, 5)
        assert A.stride(-1) == A.stride(-2) == dt.stride(-1) == dt_bias.stride(-1) == 0
        return step(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)
    fused = types.SimpleNamespace(mamba_chunk_scan_combined=scan, selective_state_update=checked)
    calls = []
    monkeypatch.setattr(fast, "kernel", lambda module, like: calls.append(module) or fused)
    kept = a["state"].clone()
    with torch.no_grad():
        y, state = ssd(**a, mask=mask)
        y_one, state_one = ssd(**one)
    assert calls == ["mamba_ssm.ops.triton.ssd_combined", "mamba_ssm.ops.triton.selective_state_update"]
    assert relative(y[mask], expected[0][mask]) < 1e-5 and relative(state, expected[1]) < 1e-5
    assert relative(y_one, expected_one[0]) < 1e-5 and relative(state_one, expected_one[1]) < 1e-5
    assert torch.equal(a["state"], kept)                                   # the caller's state is left alone


def test_conv_kernel_gets_the_arguments_it_expects(monkeypatch):
    conv1d = pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    u, weight, memory = (rand(*s, seed=0, dtype=torch.float32) for s in ((2, 9, 8), (8, 4), (2, 3, 8)))
    expected = causal_conv(u, weight, padding("left", 9), memory)
    reference = types.SimpleNamespace(causal_conv1d_fn=conv1d.causal_conv1d_interface.causal_conv1d_ref)
    monkeypatch.setattr(fast, "kernel", lambda module, like: reference)
    got = causal_conv(u, weight, padding("left", 9), memory)
    assert torch.allclose(got[0], expected[0], atol=1e-6) and torch.equal(got[1], expected[1])


@torch.no_grad()
def test_a_teacher_without_qk_norm_and_with_biases_hands_them_on():
    """Attention by loops over queries, with a rotation written out pair by pair; the mixer's queries and keys are plain."""
    class Biased(TextConfig):
        qk_norm, qkv_bias = False, True
    torch.manual_seed(0)
    config = Biased(hidden_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    attention, x, angle = Attention(config, 0).double(), torch.randn(1, 5, 12).double(), torch.rand(1, 5, 2).double()
    w = {n: (getattr(attention, f"{n}_proj").weight, getattr(attention, f"{n}_proj").bias) for n in "qkv"}
    q, k, v = ([(w[n][0] @ x[0, t] + w[n][1]) for t in range(5)] for n in "qkv")

    def turned(head, t):
        c, s = angle[0, t].cos(), angle[0, t].sin()
        return torch.cat((head[:2] * c - head[2:] * s, head[2:] * c + head[:2] * s))
    expected = []
    for t in range(5):
        heads = []
        for h in range(2):
            score = torch.stack([turned(q[t][4 * h:4 * h + 4], t) @ turned(k[s], s) / 2 for s in range(t + 1)])
            heads.append(sum(p * v[s] for s, p in enumerate(score.softmax(0))))
        expected.append(attention.o_proj.weight @ torch.cat(heads))
    both = torch.cat((angle, angle), -1)
    torch.testing.assert_close(attention(x, None, None, (both.cos(), both.sin()))[0][0], torch.stack(expected))

    mixer = Mamba2.from_attention(attention)
    C, B = mixer.queries_keys(x, 0.5)
    torch.testing.assert_close(C[0].flatten(1), torch.stack(q) / 2)
    torch.testing.assert_close(B[0].flatten(1), torch.stack(k))
    torch.testing.assert_close(mixer.v_proj(x)[0], torch.stack(v))
    assert not any("norm" in name for name, _ in mixer.named_parameters() if name != "out_norm")
