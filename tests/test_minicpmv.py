"""minicpmv.py against transformers (Idefics2's tower, which SigLIP's NaViT is; Qwen3), and against the released
resampler, slicing and template written down naively.
Run: pytest tests/test_minicpmv.py"""
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from data import IGNORED, Sample, collate, encode_rows, processor_of
from density import densities, draw_files
from formats import texts
from minicpmv import Config, best_grid, bucket
from model import Qwen3VL, to_hybrid
from test_internvl import picture, sample, write_tokenizer

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>",
           "<image_id>", "</image_id>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
AT = {token: len(LETTERS) + i for i, token in enumerate(SPECIAL + ["<think>", "</think>"])}
STEP = 20                                                 # of the sizes of test_teachers.py's pictures
SIDE, PATCH, Q, TABLE = 56, 14, 4, 7                      # a slice: about 4 x 4 patches, 4 queries; the table: 7 x 7
D, DV, HEADS = 256, 32, 2


def published(**changes):
    """config.json as it is released, but small."""
    return dict(
        model_type="minicpmv", version=4.5, architectures=["MiniCPMV"], hidden_act="silu", attention_bias=False, hidden_size=D,
        intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6,
        rope_theta=10000, rope_scaling=None, max_position_embeddings=40960, tie_word_embeddings=False, use_sliding_window=False,
        vocab_size=len(LETTERS) + len(AT), eos_token_id=AT["<|im_end|>"], query_num=Q, patch_size=PATCH, image_size=448,
        drop_vision_last_layer=False, batch_vision_input=True, batch_3d_resampler=True, slice_mode=True,
        slice_config=dict(max_slice_nums=9, patch_size=PATCH, scale_resolution=SIDE, model_type="minicpmv"),
        vision_config=dict(hidden_size=DV, image_size=PATCH * TABLE, intermediate_size=48, model_type="siglip",
                           num_attention_heads=2, num_hidden_layers=3, patch_size=PATCH)) | changes


def write_companions(folder):
    write_tokenizer(folder, AT, plain=("<think>", "</think>"))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_feature_size=Q, max_slice_nums=9, patch_size=PATCH, scale_resolution=SIDE, slice_mode=True, use_image_id=True,
        norm_mean=[.5, .4, .5], norm_std=[.5, .5, .25], version=4.5)))


class Theirs:
    """The parts that transformers has, with weights wide enough for errors to show, and the resampler's tensors."""

    def __init__(self):
        from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
        from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
        torch.manual_seed(0)
        config, keys = published(), ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.vpm = Idefics2VisionTransformer(Idefics2VisionConfig(
            **{k: config["vision_config"][k] for k in (*keys, "image_size", "patch_size")})).eval()
        self.llm = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            **{k: config[k] for k in (*keys, "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps")},
            rope_parameters=dict(rope_type="default", rope_theta=1e4), tie_word_embeddings=False)).eval()
        for part in (self.vpm, self.llm):
            for name, p in part.named_parameters():
                torch.nn.init.normal_(p, float(p.dim() == 1 and "norm" in name and "weight" in name), 0.2)
        shapes = {"query": (Q, D), "proj": (D, D), "kv_proj.weight": (D, DV), "attn.in_proj_weight": (3 * D, D),
                  "attn.in_proj_bias": (3 * D,), "attn.out_proj.weight": (D, D), "attn.out_proj.bias": (D,)}
        shapes |= {f"ln_{n}.{kind}": (D,) for n in ("q", "kv", "post") for kind in ("weight", "bias")}
        self.resampler = {n: torch.randn(s) * (0.1 if len(s) > 1 else 0.2) + ("ln" in n and "weight" in n)
                          for n, s in shapes.items()}
        self.resampler["query"] *= 10

    def state(self):
        parts = {"vpm.": self.vpm.state_dict(), "llm.": self.llm.state_dict(), "resampler.": self.resampler}
        return {start + n: t.clone() for start, part in parts.items() for n, t in part.items()}

    def seen(self, pixels, grids):
        """Slice by slice: the tower's last hidden states (n, Dv)."""
        out, start = [], 0
        for _, h, w in grids.tolist():
            x = pixels[start:start + h * w].view(h, w, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
            out.append(self.vpm(x.reshape(1, 3, h * PATCH, w * PATCH)).last_hidden_state[0])
            start += h * w
        return out

    def tokens(self, pixels, grids):
        return torch.cat([resample(self.resampler, x, h, w)[0] for x, (_, h, w)
                          in zip(self.seen(pixels, grids), grids.tolist())])

    def embeds(self, b):
        x = self.llm.model.embed_tokens(b.ids)
        x[(b.ids == AT["<unk>"]) & b.mask] = self.tokens(b.pixels, b.grids)
        return x


def resample(s, x, h, w):
    """The released resampler for one slice, place by place and head by head: x (h * w, Dv) -> (Q, D), mean shares (Q, h * w)."""
    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (D,), s[f"ln_{name}.weight"], s[f"ln_{name}.bias"], 1e-6)

    places = torch.zeros(h * w, D)
    for y in range(h):
        for column in range(w):
            for i in range(D // 4):
                f = 10000 ** (-i / (D // 4))
                for part, angle in enumerate((column * f, y * f)):
                    places[y * w + column, part * D // 2 + i] = math.sin(angle)
                    places[y * w + column, part * D // 2 + D // 4 + i] = math.cos(angle)
    x, query = norm(x @ s["kv_proj.weight"].T, "kv"), norm(s["query"], "q")
    parts = [t @ weight.T + bias for t, weight, bias in zip(
        (query, x + places, x), s["attn.in_proj_weight"].split(D), s["attn.in_proj_bias"].split(D))]
    outs, shares = [], []
    for head in range(HEADS):
        q, k, v = (t[:, 128 * head:128 * head + 128] for t in parts)
        shares.append(torch.softmax(q @ k.T / math.sqrt(128), dim=-1))
        outs.append(shares[-1] @ v)
    out = torch.cat(outs, dim=1) @ s["attn.out_proj.weight"].T + s["attn.out_proj.bias"]
    return norm(out, "post") @ s["proj"], sum(shares) / HEADS


def make(folder):
    """Writes the parts of the oracle under the released names. -> them"""
    theirs = Theirs()
    save_file(theirs.state(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published()))
    write_companions(folder)
    return theirs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The parts of the oracle, a folder with their weights, and ours from it."""
    folder = tmp_path_factory.mktemp("minicpmv")
    theirs = make(folder)
    return theirs, folder, Qwen3VL.from_pretrained(folder)


SAMPLES = [sample([(200, 100), "What and ", (50, 50), (60, 190), "who?"]), sample(["Say nothing."], name="t"),
           sample([(300, 220), "Read it."], ["No."], ["Why?", (30, 80)], name="u")]


def batch(processor, side):
    return collate([processor.encode(s, add_generation_prompt=True) for s in SAMPLES], processor.pad_id, side)


# -- the model

@torch.no_grad()
def test_tower_and_resampler_equal_their_oracles(both):
    theirs, folder, ours = both
    b = batch(processor_of(folder), "right")
    vision = ours.visual(b.pixels, b.grids)
    assert len({tuple(g) for g in b.grids.tolist()}) >= 5 and len(b.grids) == 9 + 1 + 4 + 10 + 1
    torch.testing.assert_close(vision.patches, torch.cat(theirs.seen(b.pixels, b.grids)), atol=1e-4, rtol=1e-4)
    expected = theirs.tokens(b.pixels, b.grids)
    assert expected.std() > 1 and vision.deepstack == [] and len(vision.tokens) == Q * len(b.grids)
    torch.testing.assert_close(vision.tokens, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_transformers(both, side):
    theirs, folder, ours = both
    b = batch(processor_of(folder), side)
    places = (b.mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs.llm(inputs_embeds=theirs.embeds(b), attention_mask=b.mask.long(), position_ids=places).logits[b.mask]
    assert expected.std() > 1
    torch.testing.assert_close(ours(b.ids, b.mask, b.pixels, b.grids)[b.mask], expected, atol=3e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_tokens_equal_transformers(both):
    theirs, folder, ours = both
    b = batch(processor_of(folder), "left")
    expected = theirs.llm.generate(inputs_embeds=theirs.embeds(b), attention_mask=b.mask.long(), max_new_tokens=12,
                                   do_sample=False, eos_token_id=None, pad_token_id=0)
    until = [row[:(row + [AT["<|im_end|>"]]).index(AT["<|im_end|>"])] for row in expected.tolist()]
    assert len({t for row in until for t in row}) > 6
    for side in ("left", "right"):
        b = batch(processor_of(folder), side)
        assert ours.generate(b.ids, b.mask, b.pixels, b.grids, max_new_tokens=12) == until


def test_a_tables_parts_are_rounded_as_released():
    """Recorded from the released code, on x86 with and without its vectors: all but these places have the exact part."""
    lower = {25: [5, 10, 15, 20], 49: [7, 14, 35, 42], 50: [5, 10, 15, 20, 30, 40], 55: [11, 22, 33, 44], 58: [29]}
    for n in range(1, 71):
        assert bucket(n, 70).tolist() == [70 * i // n - (i in lower.get(n, [])) for i in range(n)], n
    assert all(len(bucket(n, 70)) == n and bucket(n, 70)[-1] == 70 * (n - 1) // n for n in range(71, 500))


@torch.no_grad()
def test_it_loads_strictly_and_is_written_again(both, tmp_path):
    _, folder, ours = both
    b = batch(processor_of(folder), "right")
    ours.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())

    student = to_hybrid(ours)
    student.save_pretrained(tmp_path / "student")
    loaded = Qwen3VL.from_pretrained(tmp_path / "student")
    assert loaded.config.hybrid == dict(mixer="mamba2", layers=[0, 1, 2]) and processor_of(tmp_path / "student").side == SIDE
    assert torch.equal(loaded(b.ids, b.mask, b.pixels, b.grids), student(b.ids, b.mask, b.pixels, b.grids))

    lost = "resampler.attn.in_proj_weight"
    save_file({n: t for n, t in before.items() if n != lost} | {"vpm.stray": torch.zeros(1)}, tmp_path / "again/model.safetensors")
    with pytest.raises(ValueError, match=f"missing tensor {re.escape(lost)}.*unexpected tensor vpm.stray"):
        Qwen3VL.from_pretrained(tmp_path / "again")


def test_the_released_8b_has_the_published_names_and_bytes(tmp_path):
    """On the meta device, by the released config. The index names 17,391,790,560 bytes in bf16, and these tensors."""
    config = published(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                       num_key_value_heads=8, rope_theta=1000000, vocab_size=151748, query_num=64,
                       slice_config=dict(max_slice_nums=9, patch_size=14, model_type="minicpmv"),
                       vision_config=dict(hidden_size=1152, image_size=980, intermediate_size=4304, model_type="siglip",
                                          num_attention_heads=16, num_hidden_layers=27, patch_size=14))
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_companions(tmp_path)
    with torch.device("meta"):
        ours = Qwen3VL(Config.from_folder(tmp_path))
    mine = {n: list(p.shape) for name, p in ours.named_parameters() for n in ours.config.stored(name)}
    assert 2 * sum(p.numel() for p in ours.parameters()) == 17_391_790_560 and not list(ours.named_buffers())
    names = {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight", "resampler.query",
             "resampler.proj", "resampler.kv_proj.weight", "resampler.attn.in_proj_weight", "resampler.attn.in_proj_bias"}
    pairs = ["vpm.embeddings.patch_embedding", "vpm.post_layernorm", "resampler.attn.out_proj", "resampler.ln_q",
             "resampler.ln_kv", "resampler.ln_post"]
    pairs += [f"vpm.encoder.layers.{i}.{n}" for i in range(27) for n in (
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")))]
    names |= {f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")} | {"vpm.embeddings.position_embedding.weight"}
    names |= {f"llm.model.layers.{i}.{n}.weight" for i in range(36) for n in (
        "input_layernorm", "post_attention_layernorm", *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        *(f"self_attn.{p}_proj" for p in "qkvo"), "self_attn.q_norm", "self_attn.k_norm")}
    assert mine.keys() == names and mine["vpm.embeddings.position_embedding.weight"] == [4900, 1152]
    assert mine["resampler.attn.in_proj_weight"] == [12288, 4096] and mine["resampler.kv_proj.weight"] == [4096, 1152]


# -- pictures and ids: the released slicing and template, written down naively

def naive_grid(width, height, side, most):
    """-> (columns, rows), or None."""
    pieces = math.ceil(width * height / (side * side))
    pieces = most if pieces > most else pieces
    if pieces <= 1:
        return None
    best, error = (1, 1), math.inf
    for n in (pieces - 1, pieces, pieces + 1):
        for columns in range(1, n + 1):
            if n != 1 and n <= most and n % columns == 0:
                off = abs(math.log(width / height) - math.log(columns / (n // columns)))
                if off < error:
                    best, error = (columns, n // columns), off
    return best


def naive_fit(width, height, side, patch, upscale):
    if upscale or width * height > side * side:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return max(patch, round(width / patch) * patch), max(patch, round(height / patch) * patch)


def naive_slices(image, side=SIDE, patch=PATCH, most=9):
    """-> PIL images, the overview first, then row by row."""
    (width, height), bicubic = image.size, Image.Resampling.BICUBIC
    grid = naive_grid(width, height, side, most)
    slices = [image.resize(naive_fit(width, height, side, patch, upscale=grid is None), bicubic)]
    if grid:
        columns, rows = grid
        near_w, near_h = max(columns, round(width / columns) * columns), max(rows, round(height / rows) * rows)
        w, h = naive_fit(near_w / columns, near_h / rows, side, patch, upscale=True)
        large = image.resize((w * columns, h * rows), bicubic)
        slices += [large.crop((w * x, h * y, w * x + w, h * y + h)) for y in range(rows) for x in range(columns)]
    return slices


def naive_pixels(image):
    """A slice -> (patches, 3 * p * p): bytes through /255, minus mean, over std in fp32, then patch by patch."""
    x = np.asarray(image).astype(np.float32) / 255
    x = (x - np.array([.5, .4, .5], np.float32)) / np.array([.5, .5, .25], np.float32)
    rows, columns = x.shape[0] // PATCH, x.shape[1] // PATCH
    return np.stack([x[PATCH * y:PATCH * y + PATCH, PATCH * c:PATCH * c + PATCH].transpose(2, 0, 1).ravel()
                     for y in range(rows) for c in range(columns)])


SIZES = [(56, 56), (57, 200), (640, 480), (900, 40), (40, 900), (79, 79), (80, 80), (113, 113), (168, 113), (3, 300), (20, 30),
         (112, 168), (301, 100), (5, 900)]


@pytest.mark.parametrize("size", SIZES)
def test_slices_are_bit_identical_to_the_released_algorithm(both, size):
    image, processor = picture(*size), processor_of(both[1])
    pixels, grids = processor.patches(image)
    slices = naive_slices(image)
    assert grids == [[1, s.height // PATCH, s.width // PATCH] for s in slices]
    assert np.array_equal(pixels, np.concatenate(list(map(naive_pixels, slices))))
    assert processor.visual_tokens(size, 9) == Q * len(slices)


def test_grids_equal_the_released_algorithm_at_many_sizes():
    """At the released side, sizes and limits, ties among them."""
    draw, met = np.random.default_rng(0), set()
    sizes = [*draw.integers(20, 3000, (1500, 2)).tolist(), *([448 * a, 448 * b] for a in range(1, 8) for b in range(1, 8)), (3900, 430), (430, 3900)]
    for width, height in sizes:
        for most in (1, 2, 5, 9):
            grid = best_grid((width, height), 448, most)
            assert grid == naive_grid(width, height, 448, most), (width, height, most)
        met.add(grid)
    assert {(3, 3), (4, 2), (2, 4), (1, 9), (9, 1), (1, 7), (7, 1), None} <= met


def text_of(s, ask=True, most=9):
    """What the released chat() and processor hand to the tokenizer, with enable_thinking=False."""
    out, images = "", iter(enumerate(s.images))
    for i, message in enumerate(s.messages):
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part["text"])
                continue
            number, image = next(images)
            marked = f"<image_id>{number}</image_id><image>" + "<unk>" * Q + "</image>"
            if grid := naive_grid(*image.size, SIDE, most):
                row = ("<slice>" + "<unk>" * Q + "</slice>") * grid[0]
                marked += "\n".join([row] * grid[1])
            parts.append(marked)
        empty = "<think>\n\n</think>\n\n" if message["role"] == "assistant" and i + 1 == len(s.messages) else ""
        out += f"<|im_start|>{message['role']}\n{empty}" + "\n".join(parts) + "<|im_end|>\n"
    return out + ("<|im_start|>assistant\n<think>\n\n</think>\n\n" if ask else "")


ANSWERED = sample([(120, 60), (90, 40), "A?"], ["B."], ["And ", (30, 20)], ["No\n\n."], name="v")


@pytest.mark.parametrize("which", range(5))
def test_ids_equal_the_released_template(both, which):
    s, processor = [*SAMPLES, ANSWERED, sample(["Hm?"], ["B."])][which], processor_of(both[1])
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(both[1] / "tokenizer.json"))
    ask = s.messages[-1]["role"] == "user"
    e = processor.encode(s, add_generation_prompt=ask)
    assert e.ids.tolist() == tokens(text_of(s, ask))["input_ids"] and processor.length(s, ask) == len(e.ids)
    assert (e.ids == AT["<unk>"]).sum() == Q * (0 if e.grids is None else len(e.grids))
    learned = tokens.decode(e.ids[e.labels != IGNORED])
    assert learned == ("", "", "No.<|im_end|>", "B.<|im_end|>No\n\n.<|im_end|>", "B.<|im_end|>")[which]


def test_a_prompt_is_the_beginning_of_both_answers_of_a_pair(both):
    processor, s = processor_of(both[1]), SAMPLES[2]
    pair = Sample("p", s.messages, s.images, chosen=[dict(type="text", text="Yes")], rejected=[dict(type="text", text="Noo")])
    prompt = processor.encode(s, add_generation_prompt=True).ids
    assert all(torch.equal(row.ids[:len(prompt)], prompt) for row in encode_rows(processor, pair))


def test_marked_text_stays_text(both):
    processor = processor_of(both[1])
    ids = processor.encode(sample(["<unk><slice><image_id>0</image_id>"])).ids
    assert not set(ids.tolist()) & {AT[t] for t in ("<unk>", "<slice>", "<image_id>", "</image_id>")}


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_a_turned_photograph_has_the_markers_of_its_slices(both, tmp_path, kind):
    """By the EXIF orientation in its header it is seen as 100 x 300, in rows, or lying, in columns."""
    processor, exif = processor_of(both[1]), Image.Exif()
    standing, lying = (processor.encode(sample(["a", size], ["b"])) for size in ((100, 300), (300, 100)))
    assert not torch.equal(standing.ids, lying.ids)
    for orientation, upright in ((1, lying), (3, lying), (5, standing), (8, standing)):
        exif[0x0112] = orientation
        picture(300, 100).save(tmp_path / f"turned.{kind}", exif=exif)
        content = [dict(type="text", text="a"), dict(type="image")]
        e = processor.encode(Sample("t", [dict(role="user", content=content), dict(role="assistant", content=[dict(
            type="text", text="b")])], [str(tmp_path / f"turned.{kind}")]))
        assert torch.equal(e.ids, upright.ids) and torch.equal(e.grids, upright.grids)


def test_caps_choose_fewer_slices(both):
    folder, s = both[1], sample([(448, 168), "a"], ["b"])
    slices = [len(processor_of(folder, max_visual_tokens=cap).encode(s).grids) for cap in (40, 39, 12, 11, 4)]
    assert slices == [9, 9, 3, 1, 1]                       # 8 in a grid of 4 x 2 and the overview, 2 and it, it alone
    many = sample([(448, 168), (448, 168), (448, 168), "a"], ["b"])
    e = processor_of(folder, max_tokens=120).encode(many)
    assert len(e.ids) <= 120 and 3 < len(e.grids) < 27 and e.cut == 0
    small = processor_of(folder).bounded(Q, 5 * Q)
    assert small.limit == 4 and small.limits() == [4, 3, 2, 1] and len(small.patches(s.images[0])[1]) <= 5
    with pytest.raises(ValueError, match="a tile has 4 visual tokens, but an image may have 3 only"):
        processor_of(folder, max_visual_tokens=3)


def test_running_text_gets_no_line_breaks_of_the_template(both):
    processor = processor_of(both[1])
    document = Sample("d", [dict(role="document", content=texts("One. ") + [dict(type="image")] + texts(" Two."))], [picture(50, 50)])
    e = processor.encode(document)
    assert processor.decode(e.labels[e.labels >= 0], skip_special_tokens=False) == "One.  Two.<|endoftext|>"


# -- density

@torch.no_grad()
def test_density_of_a_query_is_that_of_the_patches_it_attends_to(both, tmp_path):
    """Eq. 2 by loops over the rows and columns of a slice, reflected at its border, and the naive resampler's shares."""
    theirs, folder, ours = both
    processor = processor_of(folder)
    e = processor.encode(sample([(100, 50), (50, 90), "a"], ["b"]))
    expected = []
    for seen, (_, h, w) in zip(theirs.seen(e.pixels, e.grids), e.grids.tolist()):
        unit = (seen / seen.norm(dim=-1, keepdim=True)).view(h, w, DV).double().numpy()
        rows, columns = ([1, *range(n), n - 2] for n in (h, w))           # -1 is 1, and n is n - 2
        rho = [1 - np.mean([unit[y, x] @ unit[rows[y + dy], columns[x + dx]] for dy in range(3) for dx in range(3)])
               for y in range(h) for x in range(w)]
        expected += (resample(theirs.resampler, seen, h, w)[1].numpy() @ np.array(rho)).tolist()
    rho = densities(ours, ours.visual(e.pixels, e.grids), e.grids)
    np.testing.assert_allclose(rho.numpy(), expected, atol=1e-5)
    assert len(expected) == (e.ids == AT["<unk>"]).sum() and min(np.std(expected[i:i + Q]) for i in range(0, len(expected), Q)) > 1e-4

    page = picture(200, 100)
    page.save(tmp_path / "page.png")
    draw_files([tmp_path / "page.png"], ours, processor, tmp_path)
    _, grids = processor.patches(page)
    drawn = processor.as_map(torch.arange(36.0), torch.tensor(grids), page.size)    # the overview, and 4 x 2 slices
    assert drawn.tolist() == [[5.5, 9.5, 13.5, 17.5], [21.5, 25.5, 29.5, 33.5]] and (tmp_path / "page.density.png").is_file()
    both_pages = processor.as_map(torch.arange(76.0), torch.tensor(grids), page.size)       # of two the first
    assert torch.equal(both_pages, drawn)
    assert processor.as_map(torch.arange(8.0), torch.tensor([[1, 4, 4]]), (50, 50)).tolist() == [[1.5]]


# -- refusals

@pytest.mark.parametrize("where, key, value, words", [
    ("", "version", 2.6, "version is 2.6, but of MiniCPM-V only 4.5"), ("", "version", None, "version is None"),
    ("", "num_experts", 128, "num_experts is 128"), ("", "attention_bias", True, "attention_bias"),
    ("", "rope_scaling", dict(rope_type="yarn", factor=4), "rope_type is 'yarn'"), ("", "head_dim", 0, "head_dim is '0'"),
    ("", "drop_vision_last_layer", True, "drop_vision_last_layer is True"), ("", "slice_mode", False, "slice_mode is False"),
    ("", "use_image_id", False, "use_image_id is False"), ("", "hidden_size", 100, "no multiple of the resampler's 128"),
    ("", "query_num", 0, "query_num is '0'"), ("", "patch_size", 16, "patch_size is 16"), ("", "slice_config", None, "max_slice_nums is None"),
    ("slice_config", "patch_size", 16, "patch_size is 16"), ("slice_config", "max_slice_nums", 0, "max_slice_nums is 0"),
    ("slice_config", "scale_resolution", "448", "scale_resolution is '448'"),
    ("vision_config", "hidden_size", D, "no kv_proj"), ("vision_config", "hidden_size", 33, "no multiple of num_attention_heads"),
    ("vision_config", "hidden_act", "gelu", "hidden_act is 'gelu'"), ("vision_config", "image_size", 7, "less than patch_size"),
    ("", "vision_config", 3, "vision_config: hidden_size is missing"), ("", "model_type", "minicpmo", "model_type is 'minicpmo'")])
def test_what_is_not_implemented_is_refused_by_name(both, tmp_path, where, key, value, words):
    raw = json.loads((both[1] / "config.json").read_text())
    (raw[where] if where else raw)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_companions(tmp_path)
    with pytest.raises(ValueError, match=f"config.json.*({words})"):
        Config.from_folder(tmp_path) if key != "model_type" else Qwen3VL.from_pretrained(tmp_path)


@torch.no_grad()
def test_inputs_that_do_not_fit_are_refused(both, tmp_path):
    _, folder, ours = both
    b = batch(processor_of(folder), "right")
    n, last = len(b.grids), b.grids[-1].prod()
    with pytest.raises(ValueError, match=f"{n - 1} tiles of 4 tokens, but {4 * n} placeholders"):
        ours(b.ids, b.mask, b.pixels[:-last], b.grids[:-1])
    with pytest.raises(ValueError, match=f"grids describe {len(b.pixels)} patches, but pixels has {len(b.pixels) - 1} rows"):
        ours.visual(b.pixels[:-1], b.grids)
    with pytest.raises(ValueError, match="video, which is not implemented"):
        ours.visual(torch.cat([b.pixels[:16]] * 2), torch.tensor([[2, 4, 4]]))
    (tmp_path / "config.json").write_text(json.dumps(published()))
    for key, value in (("image_feature_size", 64), ("max_slice_nums", 4), ("scale_resolution", 448), ("use_image_id", False)):
        write_companions(tmp_path)
        settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {key: value}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"{key} is {value} in preprocessor_config.json, but .* in config.json"):
            processor_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer.json that has <unk> as an added token"):
        Config.from_folder(tmp_path)
