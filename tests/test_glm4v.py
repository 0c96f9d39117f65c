"""glm4v.py against transformers (logits, tokens, pixels, ids, names, shapes) and numpy loops (density).
Run: pytest tests/test_glm4v.py"""
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from data import collate, encode_rows, processor_of
from density import densities
from formats import Sample, texts
from model import Config, Qwen3VL, to_hybrid
from test_internvl import picture, sample, write_tokenizer

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")

SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>",
           "<|end_of_image|>", "/nothink", "<think>", "</think>", "<|image|>", "<|video|>", "<|begin_of_video|>",
           "<|end_of_video|>", "<|begin_of_box|>", "<|end_of_box|>"]
PLAIN = {"<think>", "</think>", "<|image|>", "<|video|>", "<|begin_of_box|>", "<|end_of_box|>"}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
AT = {token: len(LETTERS) + i for i, token in enumerate(SPECIAL)}
STEP = 40                                                 # of the sizes of test_teachers.py's pictures
# What the published template gives with enable_thinking=False.
TEMPLATE = ("[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
            "{% if m['role'] == 'assistant' %}{{ '<think></think>\n' }}{% endif %}{% for c in m['content'] %}"
            "{% if c['type'] == 'image' %}{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% else %}{{ c['text'] }}"
            "{% endif %}{% endfor %}{% if m['role'] == 'user' %}{{ '/nothink' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n<think></think>\n' }}{% endif %}")


def published(**changes):
    text = dict(vocab_size=len(LETTERS) + len(SPECIAL), hidden_size=96, intermediate_size=80, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
                eos_token_id=[AT["<|endoftext|>"], AT["<|user|>"]], rope_parameters=dict(
                    rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[1, 3, 2]))
    vision = dict(depth=3, hidden_size=48, num_heads=4, out_hidden_size=96, intermediate_size=40, image_size=84)
    ids = {f"image_{side}token_id": AT[token] for side, token in
           (("", "<|image|>"), ("start_", "<|begin_of_image|>"), ("end_", "<|end_of_image|>"))}
    return transformers.Glm46VConfig(text_config=text, vision_config=vision, video_token_id=AT["<|video|>"], **ids, **changes)


def write_companions(folder):
    write_tokenizer(folder, SPECIAL, PLAIN)               # from GLM-4.5 on some are published as no special ones
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        size=dict(shortest_edge=2 * 28 * 28 * 4, longest_edge=2 * 28 * 28 * 40), patch_size=14, merge_size=2,
        image_mean=[.48145466, .4578275, .40821073], image_std=[.26862954, .26130258, .27577711])))


def make(folder):
    """Writes a model of transformers' with weights wide enough for errors to show. -> it"""
    torch.manual_seed(0)
    theirs = transformers.Glm46VForConditionalGeneration(published()).eval().float()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, float(p.dim() == 1 and "norm" in name and "weight" in name), 0.15)
    theirs.save_pretrained(folder)
    write_companions(folder)
    return theirs


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' model, its folder, and ours from it."""
    folder = tmp_path_factory.mktemp("glm4v")
    theirs = make(folder)
    return theirs, folder, Qwen3VL.from_pretrained(folder)


SAMPLES = [sample([(200, 100), "What and ", (50, 50), (20, 190), "who?"]), sample(["Say nothing."], name="t"),
           sample([(300, 220), "Read it."], ["No."], ["Why?"], name="u")]


def batch(processor, side):
    return collate([processor.encode(s, add_generation_prompt=True) for s in SAMPLES], processor.pad_id, side)


def arguments(b):
    return dict(input_ids=b.ids, attention_mask=b.mask.long(), pixel_values=b.pixels, image_grid_thw=b.grids,
                mm_token_type_ids=(b.ids == AT["<|image|>"]).int())


# -- the model

@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_equal_transformers(both, side):
    theirs, folder, ours = both
    b = batch(processor_of(folder), side)
    expected = theirs(**arguments(b)).logits[b.mask]
    assert expected.std() > 0.5 and len({tuple(g) for g in b.grids.tolist()}) == 4
    torch.testing.assert_close(ours(b.ids, b.mask, b.pixels, b.grids)[b.mask], expected, atol=2e-4, rtol=1e-4)


def test_greedy_tokens_equal_transformers(both):
    theirs, folder, ours = both
    b = batch(processor_of(folder), "left")
    expected = theirs.generate(**arguments(b), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours.config.eos_token_id, ends = [], ours.config.eos_token_id
    made = ours.generate(b.ids, b.mask, b.pixels, b.grids, max_new_tokens=12)
    ours.config.eos_token_id = ends
    assert made == expected[:, b.ids.shape[1]:].tolist() and len({t for row in made for t in row}) > 6


@torch.no_grad()
def test_a_folder_loads_strictly_and_is_written_again(both, tmp_path):
    _, folder, ours = both
    b = batch(processor_of(folder), "right")
    ours.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())

    student = to_hybrid(ours)
    student.save_pretrained(tmp_path / "student")
    loaded = Qwen3VL.from_pretrained(tmp_path / "student")
    assert loaded.config.to_json()["architectures"] == ["glm46v_hybrid"]      # which vLLM refuses by that name
    assert loaded.config.hybrid == dict(mixer="mamba2", layers=[0, 1, 2]) and processor_of(tmp_path / "student").factor == 28
    assert torch.equal(loaded(b.ids, b.mask, b.pixels, b.grids), student(b.ids, b.mask, b.pixels, b.grids))
    for name in ("q_proj", "k_proj", "v_proj"):           # the mixer inherits attention's biases, and has no QK-norm
        mixer, attention = (getattr(m.layers[1].self_attn, name).bias for m in (loaded, ours))
        assert torch.equal(mixer, attention) and attention.abs().max() > 0
    assert not hasattr(loaded.layers[1].self_attn, "q_norm")

    (tmp_path / "again/config.json").write_text((folder / "config.json").read_text())
    lost = "model.visual.downsample.bias"
    save_file({n: t for n, t in before.items() if n != lost} | {"stray": torch.zeros(1)}, tmp_path / "again/model.safetensors")
    with pytest.raises(ValueError, match=f"missing tensor {re.escape(lost)}.*unexpected tensor stray"):
        Qwen3VL.from_pretrained(tmp_path / "again")


def test_the_released_9b_has_transformers_names_and_shapes(tmp_path):
    """GLM-4.6V-Flash on the meta device, by the sizes that are transformers' defaults."""
    config = transformers.Glm46VConfig(text_config=dict(
        attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=5e5, partial_rotary_factor=0.5,
                                                  mrope_section=[8, 12, 12])), vision_config=dict(intermediate_size=13696))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        theirs = transformers.Glm46VForConditionalGeneration(config)
        ours = Qwen3VL(Config.from_folder(tmp_path))
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    mine = {ours.config.stored(n)[0]: p.shape for n, p in ours.named_parameters()}
    assert mine == shapes and 10.2e9 < sum(p.numel() for p in ours.parameters()) < 10.4e9


# -- pictures and ids

@pytest.fixture(scope="module")
def oracle(both):
    from transformers import Glm46VProcessor, PreTrainedTokenizerFast
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    class ImagesOnly(Glm46VProcessor):                    # a video processor would need torchvision
        def check_argument_for_proper_class(self, name, value):
            return type(value)

    tokens = PreTrainedTokenizerFast(tokenizer_file=str(both[1] / "tokenizer.json"), pad_token="<|endoftext|>")
    return ImagesOnly(Glm46VImageProcessorPil.from_pretrained(both[1]), tokens, None, chat_template=TEMPLATE)


@pytest.mark.parametrize("size", [(56, 56), (57, 200), (640, 480), (900, 40), (11, 90), (90, 27), (112, 112), (113, 169)])
def test_pixels_are_bit_identical_to_transformers(both, oracle, size):
    pixels, grid = processor_of(both[1]).patches(picture(*size))
    theirs = oracle.image_processor(images=[picture(*size)], return_tensors="pt")
    assert torch.equal(torch.from_numpy(pixels), theirs["pixel_values"]) and [grid] == theirs["image_grid_thw"].tolist()


@pytest.mark.parametrize("which", range(3))
def test_ids_equal_transformers(both, oracle, which):
    s, processor = SAMPLES[which], processor_of(both[1])
    words = oracle.apply_chat_template(s.messages, add_generation_prompt=True, tokenize=False)
    theirs = oracle(images=s.images or None, text=words, return_tensors="pt")["input_ids"][0]
    assert torch.equal(processor.encode(s, add_generation_prompt=True).ids, theirs)
    assert processor.length(s, add_generation_prompt=True) == len(theirs)


def test_what_the_released_folder_may_hold_is_read(both, tmp_path):
    """config.json without what transformers fills in, text that quotes a placeholder, answers in boxes."""
    raw = json.loads((both[1] / "config.json").read_text())
    for key in ("in_channels", "rope_parameters"):
        raw["vision_config"].pop(key, None)
    raw["vision_config"]["hidden_dropout_prob"] = 0.0
    raw["text_config"].pop("head_dim", None)
    raw["text_config"]["rope_parameters"].pop("partial_rotary_factor")        # GLM-4's is a half
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Config.from_folder(tmp_path).text == both[2].config.text
    processor = processor_of(both[1])
    e = processor.encode(sample(["What is <|image|>?"], ["It."]))
    assert e.ids.tolist().count(AT["<|image|>"]) == 0 and "<|image|>?" in processor.decode(e.ids)
    boxed = [AT["<|begin_of_box|>"], *processor.tokenize("7.17"), AT["<|end_of_box|>"], AT["<|user|>"]]
    assert processor.decode(boxed) == "7.17"
    wide = processor.bounded(4, 16384)                    # lmms-eval's bounds, within the published ones
    assert (wide.min_pixels, wide.max_pixels) == (28 * 28 * 4, 28 * 28 * 40)


def test_a_system_turn_is_no_answers_end(both):
    processor, s = processor_of(both[1]), sample(["Q?"], ["One."], ["Why?"], ["Two."])
    s.messages.insert(2, dict(role="system", content=texts("Be brief.")))
    e = processor.encode(s)
    assert processor.decode(e.labels[e.labels >= 0], skip_special_tokens=False) == "One.Two.<|user|>"


def test_answers_and_their_ends_are_supervised_and_nothing_else(both):
    processor = processor_of(both[1])
    e = processor.encode(sample([(60, 60), "Q?"], ["One."], ["Why?"], ["Two."]))
    learned = processor.decode(e.labels[e.labels >= 0], skip_special_tokens=False)
    assert learned == "One.<|user|>Two.<|user|>" and (e.ids == AT["<|user|>"]).sum() == 3
    long = sample([(60, 60), "Q?"], ["A very long answer."], ["Why?"], ["Two."])
    cut = processor_of(both[1], max_tokens=processor.length(long) - 6).encode(long)
    learned = processor.decode(cut.labels[cut.labels >= 0], skip_special_tokens=False)
    assert learned == "A very long aTwo.<|user|>" and cut.cut == 6

    pair = Sample("p", sample(["Q?"], ["One."], ["Why?"]).messages, chosen=texts("Yes."), rejected=texts("No."))
    rows = [processor.decode(row.labels[row.labels >= 0], skip_special_tokens=False) for row in encode_rows(processor, pair)]
    assert rows == ["Yes.<|user|>", "No.<|user|>"]


# -- density

@torch.no_grad()
def test_density_is_measured_before_the_convolution(both):
    """Eq. 2 by loops over the rows and columns of transformers' features, as they enter its convolution."""
    theirs, folder, ours = both
    e = processor_of(folder).encode(sample([(200, 100), "a"], ["b"]))
    _, h, w = e.grids[0].tolist()
    kept = []
    hook = theirs.model.visual.post_layernorm.register_forward_hook(lambda module, args, out: kept.append(out))
    theirs.model.visual(e.pixels, grid_thw=e.grids)
    hook.remove()
    seen = kept[0].view(h // 2, w // 2, 2, 2, -1).transpose(1, 2).reshape(h, w, -1).double().numpy()
    unit, rho = seen / np.linalg.norm(seen, axis=-1, keepdims=True), np.zeros((h, w))
    rows, columns = [1, *range(h), h - 2], [1, *range(w), w - 2]              # -1 is 1, and n is n - 2
    for y in range(h):
        for x in range(w):
            rho[y, x] = 1 - np.mean([unit[y, x] @ unit[rows[y + dy], columns[x + dx]] for dy in range(3) for dx in range(3)])
    expected = rho.reshape(h // 2, 2, w // 2, 2).mean((1, 3)).flatten()
    ours_rho = densities(ours, ours.visual(e.pixels, e.grids), e.grids)
    np.testing.assert_allclose(ours_rho.numpy(), expected, atol=1e-5)
    assert h != w and np.std(expected) > 1e-3


# -- refusals

@pytest.mark.parametrize("where, key, value, words", [
    ("text_config", "model_type", "glm4v_moe_text", "model_type is 'glm4v_moe_text'"), ("text_config", "head_dim", 12, "head_dim"),
    ("text_config", "rope_parameters", dict(rope_theta=1e4, mrope_section=[8, 12, 12]), "mrope_section does not sum"),
    ("text_config", "rope_parameters", dict(rope_theta=1e4, mrope_section=[1, 1, 1, 1, 1, 1]), "mrope_section does not sum"),
    ("vision_config", "hidden_act", "gelu", "hidden_act is 'gelu'"), ("vision_config", "depth", 0, "depth is '0'"),
    ("vision_config", "out_hidden_size", 48, "out_hidden_size is not"), ("vision_config", "attention_bias", True, "attention_bias"),
    ("", "image_token_id", None, "a token id is no whole number"), ("", "model_type", "glm4v_moe", "model_type is 'glm4v_moe'"),
    ("", "text_config", 3, "model_type|missing|no object")])
def test_what_is_not_implemented_is_refused_by_name(both, tmp_path, where, key, value, words):
    raw = json.loads((both[1] / "config.json").read_text())
    (raw[where] if where else raw)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"config.json.*({words})"):
        Config.from_folder(tmp_path)


def test_a_tokenizer_of_another_template_is_refused(both, tmp_path):
    raw = json.loads((both[1] / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = AT["<|endoftext|>"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    write_companions(tmp_path)
    with pytest.raises(ValueError, match="<|user|>, which ends an answer, is no eos_token_id"):
        processor_of(tmp_path)
    tokens = (tmp_path / "tokenizer.json").read_text().replace("/nothink", "/think")
    (tmp_path / "tokenizer.json").write_text(tokens)
    with pytest.raises(ValueError, match="/nothink is token None in tokenizer.json"):
        processor_of(tmp_path)
