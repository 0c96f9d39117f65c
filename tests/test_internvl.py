"""internvl.py against transformers (logits, tokens, pixels, ids, names, shapes) and numpy loops (density).
Run: pytest tests/test_internvl.py"""
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data import Sample, collate, processor_of
from density import densities, draw_files
from model import Config, Qwen3VL, to_hybrid

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
AT = {token: len(LETTERS) + i for i, token in enumerate(SPECIAL)}
STEP = 40                                                 # of the sizes of test_teachers.py's pictures
TILE, SIDE = 56, 4                                        # a tile: 4 x 4 patches of 14 pixels, 4 visual tokens
TEMPLATE = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
            "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}")


def published(**changes):
    text = dict(model_type="qwen3", vocab_size=len(LETTERS) + len(SPECIAL), hidden_size=64, intermediate_size=96,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24, eos_token_id=AT["<|im_end|>"],
                rope_parameters=dict(rope_type="default", rope_theta=1e4), tie_word_embeddings=False)
    vision = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
                  image_size=[TILE, TILE], patch_size=[14, 14], attention_bias=True)
    return transformers.InternVLConfig(text_config=text, vision_config=vision, image_token_id=AT["<IMG_CONTEXT>"],
                                       image_seq_length=4, tie_word_embeddings=False, **changes)


def write_tokenizer(folder, added, plain=()):
    """A token for each byte and these, of which the plain ones are not special."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=token not in plain, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_companions(folder):
    write_tokenizer(folder, SPECIAL)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(height=TILE, width=TILE), crop_to_patches=False, min_patches=1, max_patches=12,
        image_mean=[.485, .456, .406], image_std=[.229, .224, .225])))


def make(folder):
    """Writes a model of transformers' with weights wide enough for errors to show. -> it"""
    torch.manual_seed(0)
    theirs = transformers.InternVLForConditionalGeneration(published()).eval().float()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1 and "norm" in name and "weight" in name), 0.2)
    theirs.save_pretrained(folder)
    write_companions(folder)
    return theirs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' model, its folder, and ours from it."""
    folder = tmp_path_factory.mktemp("internvl")
    theirs = make(folder)
    return theirs, folder, Qwen3VL.from_pretrained(folder)


def picture(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def sample(*parts, name="s"):
    """Turns of user and assistant by turns; a part of a turn is a text, or the size of a picture."""
    images = [picture(*p, seed=i) for i, p in enumerate(p for turn in parts for p in turn if isinstance(p, tuple))]
    messages = [dict(role=("user", "assistant")[i % 2],
                     content=[dict(type="text", text=p) if isinstance(p, str) else dict(type="image") for p in turn])
                for i, turn in enumerate(parts)]
    return Sample(name, messages, images, "test")


SAMPLES = [sample([(200, 100), "What and ", (50, 50), (60, 190), "who?"]), sample(["Say nothing."], name="t"),
           sample([(300, 220), "Read it."], ["No."], ["Why?"], name="u")]


def batch(processor, side):
    return collate([processor.encode(s, add_generation_prompt=True) for s in SAMPLES], processor.pad_id, side)


def as_tiles(pixels):
    """Our patches, by merge block -> tiles (n, 3, 56, 56), place by place."""
    tiles, patch = torch.zeros(len(pixels) // SIDE ** 2, 3, TILE, TILE), iter(pixels.view(-1, 3, 14, 14))
    for tile in tiles:
        for block in range(4):
            for inner in range(4):
                y, x = 2 * (block // 2) + inner // 2, 2 * (block % 2) + inner % 2
                tile[:, 14 * y:14 * y + 14, 14 * x:14 * x + 14] = next(patch)
    return tiles


# -- the model

@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_transformers(both, side):
    theirs, folder, ours = both
    b = batch(processor_of(folder), side)
    expected = theirs(input_ids=b.ids, attention_mask=b.mask.long(), pixel_values=as_tiles(b.pixels)).logits[b.mask]
    assert expected.std() > 1 and len(b.grids) == 9 + 1 + 4 + 13     # 4 x 2, 1, 1 x 3 and 4 x 3 tiles, thumbnails
    torch.testing.assert_close(ours(b.ids, b.mask, b.pixels, b.grids)[b.mask], expected, atol=2e-4, rtol=1e-4)


def test_greedy_tokens_equal_transformers(both):
    theirs, folder, ours = both
    b = batch(processor_of(folder), "left")
    expected = theirs.generate(input_ids=b.ids, attention_mask=b.mask.long(), pixel_values=as_tiles(b.pixels),
                               max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    made = ours.generate(b.ids, b.mask, b.pixels, b.grids, max_new_tokens=12)
    assert made == expected[:, b.ids.shape[1]:].tolist() and len({t for row in made for t in row}) > 6


def original(state):
    """transformers' file -> the names of the original layout, written down by hand; q, k, v become one."""
    out = {}
    for name, t in state.items():
        if m := re.fullmatch(r"vision_tower\.encoder\.layer\.(\d+)\.(.*)", name):
            head, inner = f"vision_model.encoder.layers.{m[1]}.", m[2]
            if q := re.fullmatch(r"attention\.q_proj\.(.*)", inner):
                out[head + "attn.qkv." + q[1]] = torch.cat([state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            elif not re.match(r"attention\.[kv]_proj", inner):
                for a, b in (("attention.projection_layer", "attn.proj"), ("layernorm_before", "norm1"),
                             ("layernorm_after", "norm2"), ("lambda_1", "ls1"), ("lambda_2", "ls2")):
                    inner = inner.replace(a, b)
                out[head + inner] = t
            continue
        for a, b in (("vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
                     ("vision_tower.embeddings.position_embeddings", "vision_model.embeddings.position_embedding"),
                     ("vision_tower.embeddings.patch_embeddings.projection", "vision_model.embeddings.patch_embedding"),
                     ("multi_modal_projector.layer_norm", "mlp1.0"), ("multi_modal_projector.linear_1", "mlp1.1"),
                     ("multi_modal_projector.linear_2", "mlp1.3")):
            name = name.replace(a, b)
        out[name] = t
    return out


def other_layout(source, target, kind):
    target.mkdir()
    write_companions(target)
    state, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    if kind == "chat":
        text, vision = config["text_config"], config["vision_config"]
        vision = {k: v for k, v in vision.items() if k != "attention_bias"} | dict(image_size=TILE, patch_size=14, qkv_bias=True)
        config = dict(model_type="internvl_chat", llm_config=text, vision_config=vision, downsample_ratio=0.5,
                      ps_version="v2", select_layer=-1, max_dynamic_patch=12, min_dynamic_patch=1, use_thumbnail=True)
        state = original(state)
    if kind == "nested":
        state = {re.sub(r"^language_model\.lm_head", "lm_head", re.sub(r"^language_model\.model", "model.language_model",
                 re.sub(r"^(vision_tower|multi_modal)", r"model.\1", n))): t for n, t in state.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("kind", ["hf", "nested", "chat"])
@torch.no_grad()
def test_every_layout_loads_strictly_and_is_written_again(both, tmp_path, kind):
    _, folder, ours = both
    source = other_layout(folder, tmp_path / "source", kind)
    model, b = Qwen3VL.from_pretrained(source), batch(processor_of(source), "right")
    assert torch.equal(model(b.ids, b.mask, b.pixels, b.grids), ours(b.ids, b.mask, b.pixels, b.grids))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())

    student = to_hybrid(model)
    student.save_pretrained(tmp_path / "student")
    loaded = Qwen3VL.from_pretrained(tmp_path / "student")
    assert loaded.config.hybrid == dict(mixer="mamba2", layers=[0, 1, 2]) and processor_of(tmp_path / "student").tile == TILE
    assert torch.equal(loaded(b.ids, b.mask, b.pixels, b.grids), student(b.ids, b.mask, b.pixels, b.grids))

    lost = next(n for n in before if "qkv" in n or "q_proj" in n)
    save_file({n: t for n, t in before.items() if n != lost} | {"stray": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing tensor {re.escape(lost)}.*unexpected tensor stray"):
        Qwen3VL.from_pretrained(source)


def test_the_released_8b_has_transformers_names_and_shapes(tmp_path):
    """InternVL3.5-8B on the meta device, by the sizes of its published config."""
    text = dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=False)
    config = transformers.InternVLConfig(text_config=text, vision_config=dict(attention_bias=True),
                                         image_token_id=151671, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        theirs = transformers.InternVLForConditionalGeneration(config)
        ours = Qwen3VL(Config.from_folder(tmp_path))
    ours.config.layout = "nested"                         # the names that modules have in transformers
    shapes = {n: list(p.shape) for n, p in theirs.named_parameters()}
    mine = {}
    for name, p in ours.named_parameters():
        parts = ours.config.stored(name)
        mine |= {n: [p.shape[0] // len(parts), *p.shape[1:]] for n in parts}
    assert mine == shapes and 8.5e9 < sum(p.numel() for p in ours.parameters()) < 8.6e9


# -- pictures and ids

@pytest.fixture(scope="module")
def oracle(both):
    from transformers import InternVLProcessor, PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class ImagesOnly(InternVLProcessor):                  # a video processor would need torchvision
        def check_argument_for_proper_class(self, name, value):
            return type(value)

    tokens = PreTrainedTokenizerFast(
        tokenizer_file=str(both[1] / "tokenizer.json"), pad_token="<|endoftext|>", extra_special_tokens=dict(
            start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"))
    images = GotOcr2ImageProcessorPil(size=dict(height=TILE, width=TILE), image_mean=[.485, .456, .406],
                                      image_std=[.229, .224, .225])
    return ImagesOnly(images, tokens, None, image_seq_length=4, chat_template=TEMPLATE)


@pytest.mark.parametrize("size", [(56, 56), (57, 200), (640, 480), (900, 40), (40, 900), (112, 112), (113, 113), (168, 113)])
def test_tiles_are_bit_identical_to_transformers(both, oracle, size):
    pixels, grids = processor_of(both[1]).patches(picture(*size))
    theirs = oracle.image_processor(images=[picture(*size)], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(as_tiles(torch.from_numpy(pixels)), theirs) and grids == [[1, SIDE, SIDE]] * len(theirs)


@pytest.mark.parametrize("which", range(3))
def test_ids_equal_transformers(both, oracle, which):
    s, processor = SAMPLES[which], processor_of(both[1])
    words = oracle.apply_chat_template(s.messages, add_generation_prompt=True, tokenize=False)
    theirs = oracle(images=s.images or None, text=words, return_tensors="pt")["input_ids"][0]
    assert torch.equal(processor.encode(s, add_generation_prompt=True).ids, theirs)
    assert processor.length(s, add_generation_prompt=True) == len(theirs)


def test_caps_choose_fewer_tiles(both):
    folder, s = both[1], sample([(448, 168), "a"], ["b"])          # 8 : 3 fits no grid exactly
    tiles = [len(processor_of(folder, max_visual_tokens=cap).encode(s).grids) for cap in (52, 51, 12, 11, 4)]
    assert all((n * 4) <= cap for n, cap in zip(tiles, (52, 51, 12, 11, 4))) and tiles[0] > tiles[2] > tiles[3] == 1
    many = sample([(448, 168), (448, 168), (448, 168), "a"], ["b"])
    assert len(processor_of(folder, max_tokens=100).encode(many).ids) <= 100
    with pytest.raises(ValueError, match="a tile has 4 visual tokens, but an image may have 3 only"):
        processor_of(folder, max_visual_tokens=3)


# -- density

@torch.no_grad()
def test_density_is_each_tiles_own(both, tmp_path):
    """Eq. 2 by loops over the rows and columns of transformers' features, reflected at the tile's border."""
    theirs, folder, ours = both
    processor = processor_of(folder)
    e = processor.encode(sample([(100, 50), (50, 50), "a"], ["b"]))
    seen = theirs.model.vision_tower(as_tiles(e.pixels)).last_hidden_state[:, 1:].view(-1, SIDE, SIDE, 32).double().numpy()
    expected = []
    for tile in seen:
        unit, rho = tile / np.linalg.norm(tile, axis=-1, keepdims=True), np.zeros((SIDE, SIDE))
        inside = [1, *range(SIDE), SIDE - 2]              # -1 is 1, and n is n - 2
        for y in range(SIDE):
            for x in range(SIDE):
                rho[y, x] = 1 - np.mean([unit[y, x] @ unit[inside[y + dy], inside[x + dx]] for dy in range(3) for dx in range(3)])
        expected += [rho[2 * y:2 * y + 2, 2 * x:2 * x + 2].mean() for y in range(2) for x in range(2)]
    rho = densities(ours, ours.visual(e.pixels, e.grids), e.grids)
    np.testing.assert_allclose(rho.numpy(), expected, atol=1e-5)
    assert len(expected) == (e.ids == AT["<IMG_CONTEXT>"]).sum() and np.std(expected) > 1e-3

    page = picture(100, 50)
    page.save(tmp_path / "page.png")
    draw_files([tmp_path / "page.png"], ours, processor, tmp_path)
    drawn = processor.as_map(torch.arange(12.0), e.grids, page.size)       # two tiles side by side, and a thumbnail
    assert drawn.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]] and (tmp_path / "page.density.png").is_file()


# -- refusals

@pytest.mark.parametrize("where, key, value, words", [
    ("text_config", "model_type", "qwen3_moe", "model_type is 'qwen3_moe'"), ("text_config", "head_dim", 0, "head_dim is '0'"),
    ("vision_config", "norm_type", "rms_norm", "norm_type is 'rms_norm'"), ("vision_config", "use_qk_norm", True, "use_qk_norm"),
    ("vision_config", "image_size", [56, 84], "image_size"), ("vision_config", "patch_size", 28.5, "patch_size"),
    ("", "vision_feature_layer", -2, "vision_feature_layer is -2"), ("", "downsample_ratio", 0.25, "downsample_ratio"),
    ("", "image_seq_length", 256, "a tile has 4 tokens"), ("", "image_token_id", "x", "a token id is no whole number"),
    ("", "model_type", "internvl3", "model_type is 'internvl3'"), ("", "text_config", 3, "model_type|missing")])
def test_what_is_not_implemented_is_refused_by_name(both, tmp_path, where, key, value, words):
    raw = json.loads((both[1] / "config.json").read_text())
    (raw[where] if where else raw)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"config.json.*({words})"):
        Config.from_folder(tmp_path)


@torch.no_grad()
def test_inputs_that_do_not_fit_are_refused(both, tmp_path):
    _, folder, ours = both
    b = batch(processor_of(folder), "right")
    with pytest.raises(ValueError, match="26 tiles of 4 tokens, but 108 placeholders"):
        ours(b.ids, b.mask, b.pixels[:-16], b.grids[:-1])
    with pytest.raises(ValueError, match="each tile must have 4 x 4 patches"):
        ours.visual(b.pixels[:-1], b.grids)
    raw = json.loads((folder / "config.json").read_text()) | dict(image_token_id=3)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_companions(tmp_path)
    with pytest.raises(ValueError, match="<IMG_CONTEXT> is token 261 in tokenizer.json, but 3 in config.json"):
        processor_of(tmp_path)
