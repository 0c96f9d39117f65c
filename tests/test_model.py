"""model.py against transformers: same logits, same tokens, same files; and against itself: one answer
whatever the padding, the chunks or the mixer. Run: pytest tests/test_model.py"""
import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from model import Qwen3VL, to_hybrid
from parts import mixers
from parts.fast import SwiGLU

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")

IMAGE, VIDEO, START, END = 190, 191, 192, 193
ROOT = Path(model.__file__).parent


def teacher_config(tie=False, layers=4):
    """A small Qwen3-VL with merge 2, where token order, DeepStack and both GELUs can go wrong."""
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True)
    text = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
                max_position_embeddings=4096, rope_parameters=rope)
    vision = dict(depth=4, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=16, in_channels=3,
                  temporal_patch_size=2, spatial_merge_size=2, out_hidden_size=64, num_position_embeddings=64,
                  deepstack_visual_indexes=[0, 1, 2])
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=tie)


def make_pair(folder, tie=False):
    """(transformers' model, ours loaded from its files), with weights wide enough for errors to show."""
    torch.manual_seed(0)
    theirs = transformers.Qwen3VLForConditionalGeneration(teacher_config(tie)).eval().float()
    for name, p in theirs.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
        else:
            torch.nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    theirs.save_pretrained(folder)
    return theirs, Qwen3VL.from_pretrained(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def both(request, tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("teacher"), request.param)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("teacher"))[1]


def prompt(seed, *parts):
    """Random text of length n for an int n, an image or video of t x h x w patches for a (kind, t, h, w)."""
    g = torch.Generator().manual_seed(seed)
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 180, (part,), generator=g).tolist()
        else:
            kind, t, h, w = part
            for _ in range(t):                            # each frame of a video comes after its time in text
                ids += torch.randint(0, 180, (3 if kind == VIDEO else 0,), generator=g).tolist()
                ids += [START, *[kind] * (h * w // 4), END]
            grids.append([t, h, w])
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 1536, generator=g)
    return ids, pixels, grids


def batch(rows, side):
    """Rows of prompt() as one padded batch: ids, mask, pixels, grids."""
    T = max(len(ids) for ids, _, _ in rows)
    ids, mask = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (row, _, _) in enumerate(rows):
        at = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = torch.tensor(row), True
    grids = [g for _, _, gs in rows for g in gs]
    return ids, mask, torch.cat([p for _, p, _ in rows]), torch.tensor(grids)


ROWS = [prompt(1, 5, (IMAGE, 1, 4, 6), 3, (IMAGE, 1, 10, 4), 2, (IMAGE, 1, 2, 2), 4),       # several sizes
        prompt(2, 9),                                                                       # no image at all
        prompt(3, 2, (IMAGE, 1, 6, 6), 7),
        prompt(4, 3, (VIDEO, 3, 4, 6), 4, (IMAGE, 1, 4, 4), 2)]                       # frames, then an image


def inputs_of_transformers(ids, mask, pixels, grids):
    """The same batch in transformers' words: images and videos come apart, in reading order each."""
    kinds = [k for row in ids.tolist() for k, before in zip(row, [START - 1, *row]) if before == START]
    split, rows, out = {IMAGE: [], VIDEO: []}, 0, {}
    for t, h, w in grids.tolist():
        kind = kinds[0]
        kinds = kinds[t:]
        split[kind].append((pixels[rows:rows + t * h * w], [t, h, w]))
        rows += t * h * w
    for kind, values, grid in ((IMAGE, "pixel_values", "image_grid_thw"),
                               (VIDEO, "pixel_values_videos", "video_grid_thw")):
        if split[kind]:
            out[values] = torch.cat([p for p, _ in split[kind]])
            out[grid] = torch.tensor([g for _, g in split[kind]])
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return dict(input_ids=ids, attention_mask=mask.long(), mm_token_type_ids=types, **out)


def logits_of_transformers(theirs, *inputs):
    theirs.model.rope_deltas = None
    with torch.no_grad():
        return theirs(**inputs_of_transformers(*inputs)).logits


@torch.no_grad()
def test_logits_equal_transformers_for_left_padded_images_and_video(both):
    theirs, ours = both
    inputs = batch(ROWS, "left")
    expected, real = logits_of_transformers(theirs, *inputs), inputs[1]
    assert expected[real].std() > 1
    torch.testing.assert_close(ours(*inputs)[real], expected[real], atol=1e-4, rtol=1e-4)


def test_greedy_tokens_equal_transformers_after_images_and_video(both):
    theirs, ours = both
    inputs = batch(ROWS, "left")
    theirs.model.rope_deltas = None
    expected = theirs.generate(**inputs_of_transformers(*inputs), max_new_tokens=12, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[:, inputs[0].shape[1]:].tolist()
    assert ours.generate(*inputs, max_new_tokens=12) == expected
    assert len({t for row in expected for t in row}) > 6  # varied enough to tell a wrong position

    stop = expected[0][4]                                 # an eos ends its row only, and is not part of it
    ending = copy.copy(ours)
    ending.config = copy.copy(ours.config)
    ending.config.eos_token_id = [stop]
    cut = [row[:row.index(stop)] if stop in row else row for row in expected]
    assert ending.generate(*inputs, max_new_tokens=12) == cut


# -- checkpoints -------------------------------------------------------------------------------------------


def tied(net):
    return net.lm_head.weight is net.model.language_model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("shard_bytes", [2 ** 30, 2 ** 16], ids=["single", "sharded"])
def test_transformers_loads_what_save_pretrained_writes(both, tmp_path, shard_bytes):
    _, ours = both
    ours.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 2 ** 16)
    kind = transformers.Qwen3VLForConditionalGeneration
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = batch(ROWS, "left")
    real, expected, theirs = inputs[1], ours(*inputs), logits_of_transformers(loaded, *inputs)
    torch.testing.assert_close(theirs[real], expected[real], atol=1e-4, rtol=1e-4)
    again = Qwen3VL.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs), expected)
    assert tied(again) == ours.config.tie_word_embeddings


def test_config_reads_both_rope_spellings_and_the_generation_settings(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = copy.deepcopy(new)
    rope = old["text_config"].pop("rope_parameters")
    old["text_config"]["rope_theta"] = rope.pop("rope_theta")
    old["text_config"]["rope_scaling"] = rope             # as the released checkpoints spell it
    new["text_config"].pop("rope_scaling")
    new["text_config"].pop("rope_theta")
    for raw in (old, new):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        text = model.Config.from_folder(tmp_path).text
        assert (text.rope_theta, text.mrope_section) == (5e6, [6, 5, 5])

    for settings, expected, eos in (
            (dict(do_sample=True, top_p=0.8, top_k=20, temperature=0.7, eos_token_id=[151645, 151643]),
             dict(top_p=0.8, top_k=20, temperature=0.7), [151645, 151643]),
            (dict(do_sample=False, top_p=0.8, temperature=None, eos_token_id=3), {}, [3]),
            (dict(do_sample=True, top_p=None, temperature=0.5, eos_token_id=None), dict(temperature=0.5),
             [151645, 151643])):
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        loaded = Qwen3VL.from_pretrained(tmp_path)
        assert (loaded.sampling, loaded.config.eos_token_id) == (expected, eos)


def mutations(raw):
    """config.json with one field missing, null, negative, of another type, or beyond reason: -> (place, text)."""
    def paths(node, at=()):
        for key, value in node.items():
            yield (*at, key)
            if isinstance(value, dict):
                yield from paths(value, (*at, key))
    for place in paths(raw):
        for change in ("gone", None, -1, 0, 2.5, "x", [], {}, True, 10 ** 12, [1, "a"], float("nan")):
            new = copy.deepcopy(raw)
            parent = new
            for key in place[:-1]:
                parent = parent[key]
            if change == "gone":
                del parent[place[-1]]
            else:
                parent[place[-1]] = change
            yield place, change, json.dumps(new)


def test_every_damaged_config_is_refused_by_name_or_read_as_it_stands(teacher, tmp_path):
    """A few hundred mutations: a sentence that names the file, or a config whose model can be built."""
    teacher.save_pretrained(tmp_path)
    raw, refused = json.loads((tmp_path / "config.json").read_text()), 0
    for place, change, text in mutations(raw):
        (tmp_path / "config.json").write_text(text)
        try:
            config = model.Config.from_folder(tmp_path)
        except (ValueError, FileNotFoundError) as error:
            assert "config.json" in str(error) and "\n" not in str(error), (place, change)
            refused += 1
            continue
        small = config.text.num_hidden_layers <= 10 and config.vision.depth <= 10
        with torch.device("meta"):
            assert not small or Qwen3VL(config) is not None, (place, change)
    assert refused > 200
    for text in ("", "[]", "{" * 3000, "nonsense", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            model.Config.from_folder(tmp_path)


def test_every_fault_of_a_checkpoint_is_named_in_one_error(teacher, tmp_path):
    from safetensors.torch import load_file, save_file
    teacher.save_pretrained(tmp_path, shard_bytes=2 ** 16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    norm, head, gate = "model.language_model.norm.weight", "lm_head.weight", "model.visual.merger.norm.weight"
    lost, broken = (index[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
    assert len({lost, broken, *(index[n] for n in (norm, head, gate))}) >= 4
    for name in (norm, head, gate):
        file = tmp_path / index[name]
        tensors = load_file(file)
        if name == norm:
            tensors[name] = torch.ones(63)
        else:
            tensors[f"extra.{name}"] = tensors.pop(name)
        save_file(tensors, file)
    (tmp_path / lost).unlink()
    (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:-7])
    with pytest.raises(ValueError) as error:
        Qwen3VL.from_pretrained(tmp_path)
    for words in (f"missing file {lost}", f"unreadable file {broken}", f"missing tensor {head} [200, 64]",
                  f"missing tensor {gate} [32]", f"unexpected tensor extra.{head}",
                  f"unexpected tensor extra.{gate}", f"{norm} has shape [63] where [64] is needed"):
        assert words in str(error.value)


def test_a_head_stored_beside_tied_embeddings_must_equal_them(tmp_path):
    from safetensors.torch import load_file, save_file
    _, ours = make_pair(tmp_path, tie=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(200, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="an lm_head.weight other than its embeddings"):
        Qwen3VL.from_pretrained(tmp_path)
    save_file({**tensors, "lm_head.weight": ours.lm_head.weight.detach().clone()}, tmp_path / "model.safetensors")
    assert torch.equal(Qwen3VL.from_pretrained(tmp_path).lm_head.weight, ours.lm_head.weight)


RELEASED = {                # hidden, layers, heads, MLP, tied; ViT depth, hidden, MLP, DeepStack blocks
    "2B": (2048, 28, 16, 6144, True, 24, 1024, 4096, [5, 11, 17]),
    "4B": (2560, 36, 32, 9728, True, 24, 1024, 4096, [5, 11, 17]),
    "8B": (4096, 36, 32, 12288, False, 27, 1152, 4304, [8, 16, 24]),
    "32B": (5120, 64, 64, 25600, False, 27, 1152, 4304, [8, 16, 24]),
}


@pytest.mark.parametrize("size", RELEASED)
def test_names_and_shapes_of_released_sizes_equal_transformers(size):
    D, layers, heads, mlp, tied, depth, width, vision_mlp, deepstack = RELEASED[size]
    config = model.Config(
        model.TextConfig(hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads,
                         intermediate_size=mlp),
        model.VisionConfig(depth=depth, hidden_size=width, intermediate_size=vision_mlp, out_hidden_size=D,
                           deepstack_visual_indexes=deepstack), tie_word_embeddings=tied)
    raw = {k: v for k, v in config.to_json().items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        ours = Qwen3VL(config)
        theirs = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**raw))
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    if size == "8B":                                      # what the released index.json says
        assert (len(shapes[0]), sum(p.numel() for p in ours.parameters())) == (750, 8_767_123_696)
    if size == "2B":
        assert len(shapes[0].keys() - {"lm_head.weight"}) == 625


MEASURE = """
import sys
import torch, model
def peak():                                               # not ru_maxrss: a child inherits its parent's
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
with torch.device("meta"):                                # what torch imports for this is no weight
    model.Qwen3VL(model.Config())
before = peak()
for dtype in (torch.bfloat16, torch.float32):             # the larger one last: a peak never falls
    m = model.Qwen3VL.from_pretrained(sys.argv[1], dtype)
    sum(float(p.detach().view(-1)[::256].sum()) for p in m.parameters())      # touches every page
    print((peak() - before) / sum(p.nbytes for p in m.parameters()))
    del m
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_never_holds_a_second_copy(tmp_path):
    """Peak memory at most 1.15 x the weights, in the stored dtype and converted (here 300 MB of bf16)."""
    torch.manual_seed(0)
    config = model.Config(
        model.TextConfig(vocab_size=8192, hidden_size=1024, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=4, intermediate_size=4096),
        model.VisionConfig(depth=3, hidden_size=256, intermediate_size=512, num_heads=4, out_hidden_size=1024,
                           deepstack_visual_indexes=[0, 1, 2]))
    with torch.device("meta"):
        big = Qwen3VL(config)
    big = big.to(torch.bfloat16).to_empty(device="cpu")
    for p in big.parameters():
        p.data.fill_(0.01)
    assert sum(p.nbytes for p in big.parameters()) > 280e6
    big.save_pretrained(tmp_path)
    del big
    out = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], cwd=ROOT, check=True, capture_output=True)
    stored, converted = map(float, out.stdout.split())
    assert 0.9 < stored <= 1.15 and 0.9 < converted <= 1.15, f"{stored:.2f} and {converted:.2f} x the weights"


def test_mapped_weights_train_in_place_and_save_into_their_own_folder(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = file.read_bytes()
    ours = Qwen3VL.from_pretrained(tmp_path)
    ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)      # inference mode leaves no trace
    ours(*batch(ROWS[:1], "right")).square().mean().backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert file.read_bytes() == stored                              # the file is not written through
    expected = {k: v.clone() for k, v in ours.state_dict().items()}
    assert not torch.equal(expected["lm_head.weight"], teacher.lm_head.weight)
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"not ours")
    for shard_bytes in (2 ** 30, 2 ** 16, 2 ** 30):                 # over itself, to shards, and back to one file
        ours.save_pretrained(tmp_path, shard_bytes)
        again = Qwen3VL.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(again[k], expected[k]) and torch.equal(v, expected[k])
                   for k, v in ours.state_dict().items())
    assert {f.name for f in tmp_path.iterdir()} >= {"model-of-mine.safetensors"}
    assert not list(tmp_path.glob("model-0*")) and not list(tmp_path.glob("*.index.json"))


# -- states ------------------------------------------------------------------------------------------------


def with_mixer(teacher, mixer):
    """The teacher, or a hybrid of it; for a mixer that is not there yet, a skip that says so."""
    if mixer == "attention":
        return teacher
    if not (ROOT / mixers.MIXERS[mixer].split(":")[0]).is_file():
        pytest.skip(f"the mixer {mixer!r} is not written yet: no {mixers.MIXERS[mixer]}")
    return to_hybrid(teacher, mixer)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "mamba2", "gdn"])
def test_prefill_and_decode_equal_each_row_alone_for_any_chunks_and_padding(teacher, mixer):
    """The oracle is the plain full forward of each row by itself: no padding, no state."""
    net, rng = with_mixer(teacher, mixer), np.random.default_rng(0)
    follow = torch.from_numpy(rng.integers(0, 180, (len(ROWS), 5)))
    alone = []                                            # (len + 5, V): the prompt and five tokens more
    for (ids, pixels, grids), more in zip(ROWS, follow.tolist()):
        images = (pixels, torch.tensor(grids)) if grids else (None, None)
        alone.append(net(torch.tensor([ids + more]), None, *images)[0])
    close = dict(atol=1e-4, rtol=1e-4)
    for side in ("left", "right"):
        ids, mask, pixels, grids = batch(ROWS, side)
        full = net(ids, mask, pixels, grids)
        for b, row in enumerate(alone):
            torch.testing.assert_close(full[b][mask[b]], row[:-5], **close)
        for chunk in (None, 1, 2, 7, *rng.integers(3, ids.shape[1], 2).tolist()):
            logits, states, position = net.prefill(ids, mask, pixels, grids, chunk)
            for n in range(6):
                for b, row in enumerate(alone):
                    torch.testing.assert_close(logits[b], row[n - 6], **close, msg=lambda m:
                                               f"{side}, chunk {chunk}, row {b}, token {n}: {m}")
                if n < 5:
                    logits, states = net.step(follow[:, n], states, position + n)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "mamba2", "gdn"])
def test_steps_on_fixed_buffers_equal_each_row_alone(teacher, mixer):
    """What CUDA captures, run as it comes: the oracle is the plain full forward of each row by itself. A second prompt,
    shorter and longer rows exchanged, is then decoded in the first one's buffers."""
    net, rng = with_mixer(teacher, mixer), np.random.default_rng(0)
    net.replayed = None
    follow = torch.from_numpy(rng.integers(0, 180, (len(ROWS), 7)))
    kept = []
    for rows in (ROWS, ROWS[::-1]):
        alone = [net(torch.tensor([ids + more]), None, *((pixels, torch.tensor(grids)) if grids else (None, None)))[0]
                 for (ids, pixels, grids), more in zip(rows, follow.tolist())]
        for side in ("left", "right"):
            _, states, position = net.prefill(*batch(rows, side), chunk=13)
            step = net.start_decoding(states, position, 7, graph=True)
            kept.append(step)
            for n in range(7):
                for b, (logits, row) in enumerate(zip(step(follow[:, n]), alone)):
                    torch.testing.assert_close(logits, row[n - 7], atol=1e-4, rtol=1e-4, msg=lambda m:
                                               f"{side}, row {b}, token {n}: {m}")
    assert all(step is kept[0] for step in kept)
    net.lm_head.weight.data = net.lm_head.weight.data.clone()       # other weights need another capture
    assert net.start_decoding(net.prefill(*batch(ROWS, "left"))[1], position, 7, graph=True) is not kept[0]


@torch.no_grad()
def test_a_state_that_grows_is_decoded_without_fixed_buffers(teacher, tmp_path):
    """A mixer that keeps all it has seen, as a reader may write one."""
    (tmp_path / "keeper.py").write_text(OWN_MIXER.replace("RunningSum", "Keeper").replace(
        "return torch.cat(out, 1), Past(total)",
        "past = x if state is None else torch.cat([state.total, x], 1)\n"
        "        return self.o_proj(self.up(self.v_proj(past.cumsum(1)[:, -x.shape[1]:]))), Past(past)"))
    net = to_hybrid(teacher, f"{tmp_path / 'keeper.py'}:Keeper")
    ids, mask, pixels, grids = batch(ROWS[2:3], "left")
    assert net.generate(ids, None, pixels, grids, max_new_tokens=9, graph=True) == \
        net.generate(ids, None, pixels, grids, max_new_tokens=9, graph=False)


@torch.no_grad()
def test_uneven_chunks_continue_the_state(teacher):
    ids, mask, pixels, grids = batch(ROWS, "left")
    x, deepstack, rope, _ = teacher.embed(ids, mask, pixels, grids)
    whole, _ = teacher.decode(x, deepstack, rope, mask, [None] * 4)
    states, a, parts = [None] * 4, 0, []
    for n in (3, 1, 11, 1, 1, 100):
        at = slice(a, a + n)
        h, states = teacher.decode(x[:, at], [d[:, at] for d in deepstack], tuple(r[:, at] for r in rope),
                                   mask[:, at], states)
        parts.append(h)
        a += n
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_row_without_any_token_disturbs_no_other(teacher):
    ids, mask, pixels, grids = batch(ROWS[2:3], "left")
    empty, hidden = torch.full_like(ids, IMAGE), torch.zeros_like(mask)     # nor do its placeholders count
    two = (torch.cat([empty, ids]), torch.cat([hidden, mask]), pixels, grids)
    logits = teacher(*two)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], teacher(ids, mask, pixels, grids), atol=1e-5, rtol=1e-5)
    for chunk in (None, 1):
        assert teacher.generate(*two, max_new_tokens=4, chunk=chunk)[1] == \
            teacher.generate(ids, mask, pixels, grids, max_new_tokens=4)[0]


@torch.no_grad()
def test_bfloat16_from_checkpoint_to_answer(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    half = Qwen3VL.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = batch(ROWS, "left")
    logits, real = half(*inputs), inputs[1]
    assert logits.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    a, b = logits[real].float(), teacher(*inputs)[real]
    assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1] > 0.97
    assert [len(r) for r in half.generate(*inputs, max_new_tokens=3, chunk=5)] == [3] * 4

    far = torch.arange(3900, 4000)                        # where angles in bfloat16 would be off by whole turns
    angle = far.numpy()[:, None] * 5e6 ** (-np.arange(0, 32, 2) / 32)
    cos, _ = model.mrope(far.expand(3, 1, -1), half.config.text, torch.bfloat16)
    np.testing.assert_allclose(cos[0, :, :16].float(), np.cos(angle), atol=2 ** -8)


@pytest.mark.parametrize("mixer, bias", [("mamba2", "dt_bias"), ("gdn", "decay_bias")])
def test_a_step_size_is_never_rounded_to_bfloat16(teacher, tmp_path, mixer, bias):
    """From a bf16 teacher's conversion through a save and a load in bf16: the bits that fp32 has."""
    teacher.save_pretrained(tmp_path / "t")
    exact = to_hybrid(Qwen3VL.from_pretrained(tmp_path / "t", torch.float32), mixer, seed=3)
    half = to_hybrid(Qwen3VL.from_pretrained(tmp_path / "t", torch.bfloat16), mixer, seed=3)
    half.layers[0].self_attn.float()                      # as distill.convert makes masters of it
    half.in_dtype(torch.bfloat16).save_pretrained(tmp_path / "s")
    back = Qwen3VL.from_pretrained(tmp_path / "s", torch.bfloat16)
    for i in exact.config.hybrid["layers"]:
        for name, p in back.layers[i].self_attn.named_parameters():
            if name in (bias, "A_log"):
                assert torch.equal(p, getattr(exact.layers[i].self_attn, name)) and p.dtype == torch.float32
            else:
                assert p.dtype == torch.bfloat16, name
    assert back(*batch(ROWS, "left")).dtype == torch.bfloat16


GRID, PIXELS = torch.tensor([[1, 4, 4]]), torch.zeros(16, 1536)
PLACES = torch.tensor([[5, START, *[IMAGE] * 4, END, 6]])


def test_swiglu_has_the_right_gradients_and_keeps_only_its_inputs():
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))                     # finite differences
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = SwiGLU.apply(gate, up)
    torch.testing.assert_close(y, gate / (1 + torch.exp(-gate)) * up, rtol=1e-12, atol=1e-12)
    assert sum(t.numel() for t in kept) == 2 * gate.numel()



@pytest.mark.parametrize("words, inputs", [
    ("there is no image for the placeholder at token 2", (PLACES,)),
    ("pixels and grids belong together", (PLACES, None, None, GRID)),
    ("pixels and grids belong together", (PLACES, None, PIXELS)),
    ("merged grid of 2 x 2, but fewer than 4", (PLACES[:, :5], None, PIXELS, GRID)),
    ("more image grids than images", (PLACES[:, :1], None, PIXELS, GRID)),
    ("grids describe 16 patches, but pixels has 15", (PLACES, None, PIXELS[:15], GRID)),
    ("2 x 9 patches has no whole 2 x 2", (PLACES, None, torch.zeros(18, 1536), torch.tensor([[1, 2, 9]]))),
    ("nothing to read", (PLACES[:, :0],)),
    ("mask must be bool of shape", (PLACES, torch.ones(1, 8, dtype=torch.long), PIXELS, GRID)),
    ("mask must be bool of shape", (PLACES, torch.ones(1, 7, dtype=torch.bool), PIXELS, GRID)),
])
def test_inputs_that_do_not_fit_are_refused_in_words(teacher, words, inputs):
    for run in (teacher, teacher.generate):
        with pytest.raises(ValueError, match=words):
            run(*inputs)


# -- sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_p, top_k", [(1, 1, 0), (0.7, 0.8, 20), (1.5, 0.5, 0), (1, 1, 5),
                                                       (0.9, 0.97, 12), (1, 0.0, 0), (1, 1e-9, 3)])
def test_samples_follow_the_truncated_distribution(temperature, top_p, top_k):
    """Oracle: numpy, token by token: the k likeliest, renormalised, then the fewest whose mass reaches p."""
    rng, draws = np.random.default_rng(1), 20_000
    logits = rng.normal(0, 2, 40)
    p = np.exp(logits / temperature)
    order = np.argsort(-p)[:top_k or None]
    p = p / p[order].sum()
    allowed, mass = [], 0.0
    for token in order:
        allowed.append(token)
        mass += p[token]
        if mass >= top_p:
            break
    expected = np.zeros(40)
    expected[allowed] = p[allowed] / mass
    many = torch.tensor(logits).float().expand(draws, -1)
    drawn = model.sample(many, temperature, top_p, top_k, torch.Generator().manual_seed(0))
    seen = np.bincount(drawn.numpy(), minlength=40) / draws
    assert not seen[expected == 0].any()
    assert np.all(np.abs(seen - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws) + 1e-9)


def test_rows_of_a_batch_are_sampled_each_from_their_own_logits():
    logits = torch.full((3, 9), -30.0)
    logits[0, [2, 5]], logits[1, [7, 1]], logits[2, 0] = 3.0, 1.0, 2.0
    for n in range(20):
        a, b, c = model.sample(logits, 1.0, 0.99, 4, torch.Generator().manual_seed(n)).tolist()
        assert a in (2, 5) and b in (1, 7) and c == 0


# -- hybrids -----------------------------------------------------------------------------------------------

OWN_MIXER = '''
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn


@dataclass
class Settings:
    decay: "float" = 0.5


class Past(NamedTuple):
    total: torch.Tensor             # (B, 1, D)


class RunningSum(nn.Module):
    """A mixer as a reader would write one: the decayed sum of all values so far."""
    INHERITED = ("v_proj", "o_proj")

    def __init__(self, config, layer):
        super().__init__()
        self.decay = nn.Parameter(torch.full((config.hidden_size,), Settings().decay))
        width = config.num_key_value_heads * config.head_dim
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    @classmethod
    def from_attention(cls, attention, init="default", generator=None):
        new = cls(attention.config, attention.layer).to(attention.o_proj.weight)
        new.up.weight.data.normal_(std=0.1, generator=generator)
        for name in cls.INHERITED:
            getattr(new, name).weight.data.copy_(getattr(attention, name).weight)
        return new

    def forward(self, x, mask=None, state=None, rope=None):
        v = self.o_proj(self.up(self.v_proj(x)))
        total, out = x.new_zeros(len(x), 1, x.shape[2]) if state is None else state.total, []
        for t in range(x.shape[1]):
            new = total * self.decay + v[:, t:t + 1]
            total = new if mask is None else torch.where(mask[:, t:t + 1, None], new, total)
            out.append(total)
        return torch.cat(out, 1), Past(total)
'''


@pytest.fixture
def own_mixer(tmp_path):
    path = tmp_path / "running_sum.py"
    path.write_text(OWN_MIXER)
    yield f"{path}:RunningSum"
    sys.modules.pop("running_sum", None)


@torch.no_grad()
def test_a_hybrid_shares_every_frozen_module_with_its_teacher(both, own_mixer):
    teacher, inputs = both[1], batch(ROWS, "left")
    before, kept = teacher(*inputs), dict(teacher.named_parameters())
    student = to_hybrid(teacher, own_mixer)
    assert student.config.hybrid["layers"] == [0, 1, 2] and teacher.config.hybrid is None
    shared = {n for n, p in student.named_parameters() if n in kept and p is kept[n]}
    new = {n for n, _ in student.named_parameters()} - shared
    replaced = tuple(f"model.language_model.layers.{i}.self_attn." for i in (0, 1, 2))
    parts = ("decay", "v_proj.weight", "up.weight", "o_proj.weight")
    assert new == {r + n for r in replaced for n in parts}
    assert kept.keys() - shared == {n for n in kept if n.startswith(replaced)}
    assert student.lm_head is teacher.lm_head and student.visual is teacher.visual
    assert tied(student) == teacher.config.tie_word_embeddings
    pointers = {p.data_ptr() for p in teacher.parameters()}
    assert not pointers & {p.data_ptr() for n, p in student.named_parameters() if n in new}

    called = []                                           # neither training nor a hook reaches the teacher
    student.layers[0].register_forward_hook(lambda *_: called.append(1))
    for n, p in student.named_parameters():
        if n in new:
            p.add_(1)
    assert torch.equal(teacher(*inputs), before) and not called
    assert not torch.allclose(student(*inputs), before) and called


@torch.no_grad()
def test_a_hybrid_with_a_readers_mixer_survives_the_disk(teacher, own_mixer, tmp_path):
    student = to_hybrid(teacher, own_mixer, seed=3)
    twin = to_hybrid(teacher, own_mixer, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), twin.parameters()))
    student.save_pretrained(tmp_path / "saved")
    again = Qwen3VL.from_pretrained(tmp_path / "saved")
    inputs = batch(ROWS, "right")
    assert again.config == student.config
    assert torch.equal(again(*inputs), student(*inputs))
    assert again.generate(*inputs, max_new_tokens=5, chunk=3) == student.generate(*inputs, max_new_tokens=5)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["mamba2", "gdn"])
def test_a_hybrid_with_a_built_in_mixer_survives_the_disk(teacher, mixer, tmp_path):
    student, inputs = with_mixer(teacher, mixer), batch(ROWS, "right")
    student.save_pretrained(tmp_path)
    again = Qwen3VL.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs), student(*inputs))
    kind = __import__(mixers.MIXERS[mixer].split(".")[0])  # the class that others import, not a second one
    assert isinstance(again.layers[0].self_attn, getattr(kind, mixers.MIXERS[mixer].split(":")[1]))


def test_a_hybrid_keeps_some_attention_and_replaces_some(teacher, own_mixer):
    for keep_every in (1, 5):
        with pytest.raises(ValueError, match=f"keep_every {keep_every} on 4 layers"):
            to_hybrid(teacher, own_mixer, keep_every)
    assert to_hybrid(teacher, own_mixer, 2).config.hybrid["layers"] == [0, 2]
    with pytest.raises(ValueError, match="a hybrid already"):
        to_hybrid(to_hybrid(teacher, own_mixer, 2))
    for spec in ("mamba3", "nowhere.py:Mixer"):
        with pytest.raises(ValueError, match=f"no mixer '{spec}'"):
            to_hybrid(teacher, spec)
