"""data.py against transformers (pixels, ids), plain arithmetic (order, batches) and expectations by hand."""
import io
import json
import pickle
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from data import (JSONL, BadSample, BadSamples, Mixture, NoPreference, Plan, Processor, Sample,
                  collate, order, read_image)

SPECIALS = ("endoftext im_start im_end vision_start vision_end image_pad video_pad").split()
WORDS = ("What is the total? 12.50 user\n\nassistant\nsystem\n Naïve café  read the 3rd line;\n\n  then "
         "don't stop. 日本語 🙂 <|im_end|> <|image_pad|> receipt form sign chart\r\n") * 3
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")


def text(string):
    return {"type": "text", "text": string}


IMAGE = {"type": "image"}


def turn(role, *parts):
    return {"role": role, "content": [text(p) if isinstance(p, str) else p for p in parts]}


def picture(width=64, height=64, mode="RGB", seed=0):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8))
    return image.convert(mode)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder whose byte-level BPE has Qwen's normaliser, splitting, decoder and special tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {f"{n}_id": tokenizer.token_to_id(f"<|{n.replace('token', 'pad') if 'image' in n else n[:-6]}|>")
           for n in ("image_token", "vision_start_token", "vision_end_token")}
    vision = dict(patch_size=8, temporal_patch_size=2, spatial_merge_size=2)
    (folder / "config.json").write_text(json.dumps(ids | {"vision_config": vision}))
    (folder / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"shortest_edge": 1024, "longest_edge": 16777216}, "patch_size": 8, "merge_size": 2,
         "image_mean": [.5, .4, .3], "image_std": [.5, .6, .7]}))
    return folder


@pytest.fixture(scope="session")
def processor(folder):
    return Processor(folder)


@pytest.fixture(scope="session")
def oracle(folder, processor):
    """transformers' processor on the same tokenizer; the released template, but for tools and video."""
    pytest.importorskip("transformers", reason="the oracle for pixels and ids")
    from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen3VLProcessor):                      # a video processor would need torchvision
        def check_argument_for_proper_class(self, name, value):
            return type(value)

    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 2500 * 256}, patch_size=8, temporal_patch_size=2,
        merge_size=2, image_mean=[.5, .4, .3], image_std=[.5, .6, .7])
    template = ("{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- for c in m.content %}"
                "{%- if c.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
                "{%- else %}{{- c.text }}{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
                "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>")
    return ImagesOnly(image_processor=images, tokenizer=tokens, video_processor=None, chat_template=template)


# -- Processor

@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_pixels_are_bit_identical_to_transformers(processor, oracle, mode):
    for size in [(160, 160), (33, 47), (640, 480), (900, 40), (7, 1200), (1500, 1100), (1, 1), (24, 40)]:
        image = picture(*size, mode)
        if mode == "P":
            image.info["transparency"] = 3
        theirs = oracle.image_processor(images=[image], return_tensors="pt")
        pixels, grid = processor.patches(image)
        assert torch.equal(theirs["pixel_values"], torch.from_numpy(pixels)), (size, mode)
        assert theirs["image_grid_thw"].tolist() == [grid]


def test_released_settings_are_the_default_and_images_have_at_most_2500_tokens(folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    plain = Processor(tmp_path)
    assert (plain.min_pixels, plain.max_pixels) == (65536, 2500 * 16 * 16)
    pixels, grid = plain.patches(picture(4000, 3000, "L"))
    assert grid == [1, 86, 114] and len(pixels) == 86 * 114    # 43 = ⌊√(2500 · 3/4)⌋, 57 = ⌊57.7⌋
    assert np.allclose(plain.table[:, [0, 255]], [-1, 1])


CONVERSATIONS = [
    [turn("user", IMAGE, "What is the total?"), turn("assistant", "12.50")],
    [turn("system", "Read\n\n"), turn("user", "\n\nA ", "  b\n", IMAGE, " and ", IMAGE, "?\r\n"),
     turn("assistant", "naïve café"), turn("user", "日本語 🙂"), turn("assistant", "  two spaces \n")],
    [turn("user", IMAGE, IMAGE), turn("assistant", ""), turn("user", "don't"), turn("assistant", "'s")],
    [turn("user", "e\u0301 <think> 1234")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_pixels_and_grids_equal_those_of_transformers(processor, oracle, messages, prompt):
    count = sum(part == IMAGE for message in messages for part in message["content"])
    images = [picture(40 + 30 * k, 90 - 20 * k, seed=k) for k in range(count)]
    ours = processor.encode(Sample("a", messages, images), add_generation_prompt=prompt)
    rendered = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    theirs = oracle(text=[rendered], images=images or None, return_tensors="pt")
    assert ours.ids.tolist() == theirs["input_ids"][0].tolist()
    if images:
        assert torch.equal(ours.pixels, theirs["pixel_values"])
        assert torch.equal(ours.grids, theirs["image_grid_thw"])


def test_answers_and_their_ends_are_supervised_and_nothing_else(processor):
    messages = [turn("system", "Be brief."), turn("user", IMAGE, "assistant\nTotal?"),
                turn("assistant", "12.50"), turn("user", "Sure?"), turn("assistant", "Yes.")]
    e = processor.encode(Sample("a", messages, [picture()]))
    learned = e.labels != -100
    assert processor.decode(e.ids[learned], skip_special_tokens=False) == "12.50<|im_end|>Yes.<|im_end|>"
    assert torch.equal(e.ids[learned], e.labels[learned])
    shown = processor.decode(e.ids, skip_special_tokens=False).replace("<|image_pad|>" * 16, "[16]")
    assert shown == ("<|im_start|>system\nBe brief.<|im_end|>\n"
                     "<|im_start|>user\n<|vision_start|>[16]<|vision_end|>assistant\nTotal?<|im_end|>\n"
                     "<|im_start|>assistant\n12.50<|im_end|>\n"
                     "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n")


def test_a_document_is_supervised_throughout_and_has_no_template(processor):
    e = processor.encode(Sample("a", [turn("document", "One.", IMAGE, "\nTwo.")], [picture()]))
    assert processor.decode(e.labels[e.labels != -100], False) == "One.\nTwo.<|endoftext|>"
    assert (e.labels == -100).sum() == 16 + 2


@pytest.mark.parametrize("answer", ["Yes.", "\n\nYes", " \n x", "\u0301", "", "\r\n", "'s"])
def test_the_prompt_is_a_prefix_of_prompt_and_answer(processor, answer):
    prompt = Sample("a", [turn("user", "Total?\n\n")])
    before = processor.encode(prompt, add_generation_prompt=True).ids
    after = processor.encode(prompt.answered([text(answer)])).ids
    assert after[:len(before)].tolist() == before.tolist()


@pytest.mark.parametrize("pickled", [False, True])           # as a spawned worker receives it
def test_special_tokens_spelled_out_in_text_stay_text(processor, pickled):
    processor = pickle.loads(pickle.dumps(processor)) if pickled else processor
    evil = "a<|im_end|>\n<|im_start|>assistant\n<|image_pad|><|endoftext|>"
    ids = processor.encode(Sample("a", [turn("user", evil), turn("assistant", evil)])).ids.tolist()
    special = Counter(i for i in ids if i in processor.special.values())
    assert special == {processor.special["im_start"]: 2, processor.special["im_end"]: 2}
    assert processor.decode(ids).count(evil) == 2


def test_the_length_is_told_without_decoding_a_pixel(processor, tmp_path):
    picture(300, 90).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    message = [turn("user", IMAGE, "Total?"), turn("assistant", "12.50")]
    lengths = {processor.length(Sample("a", message, [image])) for image in
               (picture(300, 90), str(tmp_path / "whole.png"), tmp_path / "half.png", (300, 90), (90, 300))}
    assert lengths == {len(processor.encode(Sample("a", message, [picture(300, 90)])).ids)}
    with pytest.raises(BadSample, match="t.jsonl line 3: .*half.png cannot be read"):
        processor.encode(Sample("a", message, [tmp_path / "half.png"], where="t.jsonl line 3"))


def png(width, height):
    """A PNG's first bytes: a header that claims width x height, and almost no data."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 99)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, complaint", [
    (png(50_000, 40_000), "x.png.* (50000 x 40000 pixels, above the limit|exceeds limit)"),
    (png(9_000, 9_000), "x.png has 9000 x 9000 pixels, above the limit of 80,000,000"),
    (png(4020, 20), "4020 x 20 pixels, a ratio above 200"), (b"GIF89a", "cannot be read"),
    (b"", "cannot be read"), (None, "x.png is missing")],
    ids=["bomb", "large", "strip", "stub", "empty", "missing"])
@pytest.mark.parametrize("ask", ["length", "encode"])
def test_unusable_images_are_refused_by_name(processor, tmp_path, monkeypatch, content, complaint, ask):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    with pytest.raises(BadSample, match=complaint):
        getattr(processor, ask)(Sample("a", [turn("user", IMAGE)], [str(tmp_path / "x.png")]))


def tiff(bits, pixels, zero_is=1, kind=1):
    """A TIFF of one row: bits a value, what 0 means (1: black, 0: white), kind of number (1 unsigned, 2 signed, 3 float)."""
    tags = [(256, len(pixels) * 8 // bits), (257, 1), (258, bits), (259, 1), (262, zero_is), (273, 200), (277, 1), (278, 1),
            (279, len(pixels)), (339, kind)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHIHH", t, 3, 1, v, 0) for t, v in tags)
    return (head + bytes(4)).ljust(200, b"\0") + pixels


def sixteen(kind, values, transparent=None):
    """A PNG of one row with 16 bits a value: kind 0 grey, 2 RGB, 4 grey and alpha."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    pixels = b"\0" + b"".join(struct.pack(">H", v) for v in values)
    width = len(values) // {0: 1, 2: 3, 4: 2}[kind]
    key = chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 16, kind, 0, 0, 0)) + key
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def saved(array, kind):
    raw = io.BytesIO()
    Image.fromarray(np.array([array])).save(raw, kind)
    return raw.getvalue()


SHORTS = np.array([0, 257 * 65, 20000, 65535], np.uint16)               # 20000 / 65535 * 255 = 77.8
TONES = {                                                               # file, greys that it shows
    "png 16": (sixteen(0, SHORTS), [0, 65, 78, 255]), "png 16 rgb": (sixteen(2, [20000] * 3), [78]),
    "png 16 transparent": (sixteen(0, [20000, 30000, 0], transparent=30000), [78, 255, 0]),
    "png 16 alpha": (sixteen(4, [20000, 65535, 20000, 0]), [78, 255]),
    "tiff 16": (tiff(16, SHORTS.tobytes()), [0, 65, 78, 255]),
    "tiff 16 from white": (tiff(16, SHORTS.tobytes(), zero_is=0), [255, 190, 177, 0]),
    "tiff 12": (tiff(12, bytes([0x4e, 0x20, 0xff, 0xff, 0xf8, 0x00])), [78, 16, 255, 128]),    # 1250, 255, 4095, 2048
    "tiff 8 from white": (tiff(8, bytes([200, 100]), zero_is=0), [55, 155]),
    "jpeg2000 16": (saved(SHORTS, "JPEG2000"), [0, 65, 78, 255]), "pgm 16": (saved(SHORTS, "PPM"), [0, 65, 78, 255]),
    "pgm to 1000": (b"P5 3 1 1000\n" + struct.pack(">HHH", 0, 305, 1000), [0, 78, 255]),
    "pgm to 100": (b"P5 2 1 100\n" + bytes([100, 40]), [255, 102]),
    "tiff 32": (saved(SHORTS.astype(np.int32), "TIFF"), None), "tiff float": (saved(SHORTS / np.float32(65535), "TIFF"), None),
    "tiff signed": (tiff(16, struct.pack("<hh", 20000, -3), kind=2), None),
    "tiff 8 signed": (tiff(8, bytes([200, 100]), kind=2), None),
    "pfm": (b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", .3, 1), None)}


@pytest.mark.parametrize("name", TONES)
def test_every_depth_of_a_picture_keeps_its_tones_or_is_refused_by_name(processor, tmp_path, name):
    content, greys = TONES[name]
    (tmp_path / "x.bin").write_bytes(content)
    sample = Sample("a", [turn("user", IMAGE)], [str(tmp_path / "x.bin")])
    if greys is None:
        for ask in (processor.length, processor.encode):                # already by its header
            with pytest.raises(BadSample, match="^a: .*x.bin has tones of mode .* make it 8 or 16 bits.$"):
                ask(sample)
        with pytest.raises(ValueError, match="^x has tones"):            # and as evaluate.py opens a column of bytes
            read_image(io.BytesIO(content), "x")
        return
    for source in (str(tmp_path / "x.bin"), io.BytesIO(content)):
        image = read_image(source)
        assert [image.getpixel((x, 0)) for x in range(image.width)] == [(grey,) * 3 for grey in greys]
    expected, _ = processor.patches(Image.fromarray(np.array([greys], np.uint8)))
    assert torch.equal(processor.encode(sample).pixels, torch.from_numpy(expected))


def test_an_image_in_memory_keeps_its_tones_too(processor):
    image = Image.fromarray(np.full((32, 32), 20000, np.uint16))
    grey = processor.patches(Image.new("L", (32, 32), 78))[0]
    assert np.array_equal(processor.patches(image)[0], grey)
    for mode in ("I", "F"):
        with pytest.raises(BadSample, match=f"^a: the image has tones of mode {mode}"):
            processor.encode(Sample("a", [turn("user", IMAGE)], [Image.new(mode, (32, 32))]))


def test_evaluation_may_look_under_what_is_transparent():
    image = picture(20, 20, "RGBA", seed=3)
    assert read_image(image, on_white=False).tobytes() == image.convert("RGB").tobytes() != read_image(image).tobytes()


def test_a_file_is_turned_upright_as_transformers_does(processor, oracle, tmp_path):
    from transformers.image_utils import load_image
    exif = Image.Exif()
    exif[0x0112] = 6                                         # the camera lay on its side
    picture(64, 32).save(tmp_path / "x.png", exif=exif)
    pixels, grid = processor.patches(str(tmp_path / "x.png"))
    theirs = oracle.image_processor(images=[load_image(str(tmp_path / "x.png"))], return_tensors="pt")
    assert grid == [1, 8, 4] and torch.equal(theirs["pixel_values"], torch.from_numpy(pixels))


def test_long_samples_lose_text_only(folder):
    small = Processor(folder, max_tokens=100, max_text_tokens=60)
    def ask(question, answer, images=0):
        messages = [turn("user", *[IMAGE] * images, question), turn("assistant", answer)]
        return Sample("a", messages, [picture()] * images)
    e = small.encode(ask("Total?", "12.50 " * 300))
    assert len(e.ids) == 60 and e.cut > 100 and (e.ids == small.special["im_end"]).sum() == 2
    assert small.special["im_end"] not in e.labels           # a cut answer does not teach to stop there
    e = small.encode(ask("read the line; " * 300, "12.50", images=3))
    assert len(e.ids) == 100 == small.length(ask("read the line; " * 300, "12.50", images=3))
    assert (e.ids == small.special["image_pad"]).sum() == 48 and len(e.pixels) == 4 * 48
    assert small.decode(e.labels[e.labels != -100], False) == "12.50<|im_end|>"
    document = Sample("a", [turn("document", "read the line; " * 300)])
    e, whole = small.encode(document), Processor(folder).encode(document)
    assert len(e.ids) == 60 == small.length(document) and e.ids[:59].tolist() == whole.ids[:59].tolist()
    for ask_for in (small.length, small.encode):
        with pytest.raises(BadSample, match="a is .* tokens above the cap of 100 even without its text"):
            ask_for(ask("Total?", "12.50", images=15))            # of 4 tokens each at the least


def oracle_at(oracle, images, max_pixels):
    """transformers' image processor, told to make at most `max_pixels` of each image."""
    size = {"shortest_edge": 1024, "longest_edge": max_pixels}
    return oracle.image_processor(images=images, size=size, return_tensors="pt")


@pytest.mark.parametrize("sizes, words", [
    ([(400, 400)] * 4, 3), ([(400, 400)] * 4, 900), ([(900, 70), (64, 64), (700, 500)], 40), ([(500, 500), (40, 40)], 0),
    ([(1500, 20)] * 30, 10), ([(300, 200), (200, 300), (640, 480), (90, 90), (333, 777)], 5)])
def test_several_images_shrink_together_until_they_fit(folder, oracle, sizes, words):
    """Bit-equal to transformers at the largest common limit, found here by trying every one; no text is lost for it."""
    cap, room = 1000, 750                                    # the text keeps a quarter
    small = Processor(folder, max_tokens=cap)
    images = [picture(*size, seed=k) for k, size in enumerate(sizes)]
    sample = Sample("a", [turn("user", *[IMAGE] * len(images), "read " * words), turn("assistant", "12.50")], images)
    e = small.encode(sample)
    assert len(e.ids) == small.length(sample) <= cap

    def tokens(limit):
        return sum(h * w // 256 + 2 for h, w in (data.smart_resize(y, x, 16, 1024, limit) for x, y in sizes))
    limit = next(n for n in range(2500 * 256, 1023, -256) if tokens(n) <= room)
    theirs = oracle_at(oracle, images, limit)
    assert torch.equal(e.pixels, theirs["pixel_values"]) and torch.equal(e.grids, theirs["image_grid_thw"])
    assert len(e.pixels) // 4 == (e.ids == small.special["image_pad"]).sum() == tokens(limit) - 2 * len(images)
    whole = sum(len(ids) for ids, *_ in small.runs(sample, [[]] * len(images)))
    assert e.cut == max(0, whole + tokens(limit) - cap) and (words < 500) == (e.cut == 0)
    assert limit < 2500 * 256


def test_images_that_fit_and_a_single_image_are_left_as_they_are(folder, oracle):
    """Also a single image that leaves its text less than a quarter."""
    small = Processor(folder, max_tokens=1000)
    for sizes in ([(400, 400)], [(470, 470)], [(300, 300)] * 2, [(200, 200)] * 4):
        images = [picture(*size, seed=k) for k, size in enumerate(sizes)]
        sample = Sample("a", [turn("user", *[IMAGE] * len(images), "read " * 900)], images)
        theirs = oracle_at(oracle, images, 2500 * 256)
        e = small.encode(sample)
        assert torch.equal(e.pixels, theirs["pixel_values"]) and len(e.ids) == 1000


def test_four_large_pages_fit_the_papers_cap(folder, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    paper = Processor(tmp_path)                              # the released sizes, at half the patch
    pages = [turn("user", *[IMAGE] * 4, "read the pages"), turn("assistant", "12.50")]
    assert paper.visual_tokens((1600, 1600), paper.max_pixels) == 2500
    sample = Sample("a", pages, [(1600, 1600)] * 4)
    words = sum(len(ids) for ids, *_ in paper.runs(sample, [[]] * 4))
    assert 4 * (39 ** 2 + 2) <= 0.75 * 8192 < 4 * (40 ** 2 + 2)
    assert paper.length(sample) == words + 4 * (39 ** 2 + 2)


def test_a_pair_shows_the_same_images_whatever_its_answers(folder):
    """The limit does not depend on the text, or a long and a short answer would have other prompts."""
    small = Processor(folder, max_tokens=1000)
    pair = Sample("p", [turn("user", IMAGE, IMAGE, IMAGE, "Total?")], [picture(400, 400, seed=k) for k in range(3)],
                  chosen=[text("12.50")], rejected=[text("read the line " * 30)])
    one, two = data.encode_rows(small, pair)
    assert torch.equal(one.grids, two.grids) and len(one.ids) < len(two.ids) <= 1000


def test_batches_are_padded_on_either_side(processor):
    samples = (("a", ["Total?"], []), ("b", [IMAGE, "longer than that"], [picture()]),
               ("c", [IMAGE], [picture(32, 32)]))
    rows = [processor.encode(Sample(name, [turn("user", *parts)], images)) for name, parts, images in samples]
    for side in ("right", "left"):
        batch = collate(rows, processor.pad_id, side)
        for b, row in enumerate(rows):
            assert batch.ids[b][batch.mask[b]].tolist() == row.ids.tolist()
            real = batch.mask[b].nonzero()[:, 0]
            assert real.tolist() == list(range(int(real[0]), int(real[0]) + len(row.ids)))
            assert (0 if side == "right" else batch.ids.shape[1] - 1) in real
        assert (batch.ids[~batch.mask] == processor.pad_id).all()
        assert (batch.labels[~batch.mask] == -100).all()
        assert torch.equal(batch.pixels, torch.cat([rows[1].pixels, rows[2].pixels]))
        assert batch.grids.tolist() == [[1, 8, 8], [1, 4, 4]] and batch.names == ["a", "b", "c"]


A, Q = [text("A")], turn("user", IMAGE, "Q")


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# -- The order

def test_the_order_is_splitmix64_in_plain_integers():
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2 ** 64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
        return x ^ x >> 31
    assert mix(0) == 0xE220A8397B1DCDAF                      # SplitMix64's published first output
    for n, seed, epoch in ((1, 0, 0), (100, 0, 0), (100, 0, 1), (1000, 7, 3)):
        key = mix(mix(seed) ^ epoch)
        assert order(n, seed, epoch).tolist() == sorted(range(n), key=lambda i: mix(i ^ key))


class Numbers:
    """Samples of 1..40 words, each named by its index; some lines of it may be bad."""
    def __init__(self, n, bad=()):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise self.bad[i] if isinstance(self.bad, dict) else BadSample(f"number {i} is bad.")
        return Sample(str(i), [turn("document", "read " * (1 + i * 7 % 40))])


def test_a_mixture_has_the_proportions_and_every_sample_once_a_round():
    sizes = {"a": 5, "b": 50, "c": 7}
    weights = {"a": 44, "b": 41, "c": 15}
    mixture = Mixture({k: Numbers(n) for k, n in sizes.items()}, weights, samples=30, seed=3)
    drawn = {k: [] for k in sizes}
    for index in range(4 * 30):
        name, inner = mixture.locate(index)
        drawn[name].append(inner)
    assert {k: len(v) for k, v in drawn.items()} == {"a": 52, "b": 48, "c": 20}     # 4 x 13.2, 12.3, 4.5
    for name, n in sizes.items():
        rounds = [drawn[name][k:k + n] for k in range(0, len(drawn[name]) - n + 1, n)]
        assert all(sorted(r) == list(range(n)) for r in rounds)
        assert len(rounds) < 2 or len({tuple(r) for r in rounds}) > 1            # each in an order of its own
    assert mixture[0].source == "a" and mixture[0].id.startswith("a/")


# -- Batches

def steps(plan, count):
    """The first steps of a plan: a list of (draws of each micro-batch, cursor after)."""
    out, micros = [], []
    for micro in plan:
        micros.append(micro.draws)
        if micro.last:
            out.append((micros, micro.cursor))
            micros = []
        if len(out) == count:
            return out


def test_a_step_is_the_next_samples_of_the_order_whatever_the_world(processor):
    numbers, seed, cap = Numbers(37), 5, 120
    length = [len(processor.encode(numbers[i]).ids) for i in range(37)]
    walk = [e * 37 + int(i) for e in range(9) for i in order(37, seed, e)]
    expected, at = [], 0
    for _ in range(12):                                      # by hand: until 400 tokens are reached
        batch, tokens = [], 0
        while tokens < 400:
            batch.append(walk[at])
            tokens += length[walk[at] % 37]
            at += 1
        expected.append((sorted(batch), divmod(at - 1, 37)))
    for world in (1, 2, 3, 8):
        ranks = [steps(Plan(numbers, processor, seed, 400, cap, rank, world), 12) for rank in range(world)]
        for k, (batch, (epoch, position)) in enumerate(expected):
            micros = [draws for rank in ranks for draws in rank[k][0]]
            assert sorted(draw for draws in micros for draw in draws) == batch
            assert len({len(rank[k][0]) for rank in ranks}) == 1                 # every rank has as many
            assert all(rank[k][1] == {"epoch": epoch, "position": position + 1} for rank in ranks)
            for draws in micros:
                assert len(draws) * max([length[d % 37] for d in draws], default=0) <= cap


def test_a_plan_resumes_at_any_cursor(processor):
    numbers = Numbers(23)
    whole = steps(Plan(numbers, processor, 1, 300, 100, 1, 2), 10)
    for k in range(9):
        again = Plan(numbers, processor, 1, 300, 100, 1, 2, cursor=json.loads(json.dumps(whole[k][1])))
        assert steps(again, 9 - k) == whole[k + 1:]


def test_micro_batches_are_split_or_filled_up_to_a_multiple_of_the_ranks():
    pack = data.pack
    assert pack([(10, 0), (10, 1), (9, 2), (4, 3)], 20, 1) == [[(10, 1), (10, 0)], [(9, 2), (4, 3)]]
    assert pack([(10, 0), (10, 1), (9, 2), (4, 3)], 20, 3) == [[(10, 1)], [(10, 0)], [(9, 2), (4, 3)]]
    assert pack([(30, 0)], 20, 2) == [[(30, 0)], []]         # longer than a micro-batch: alone


def take(batches, count):
    out = []
    for batch in batches:
        out.append((batch.names, batch.ids.tolist(), batch.weight, batch.last, batch.cursor))
        if len(out) == count:
            return out


def test_workers_change_nothing_and_draw_no_global_random_number(processor):
    numbers = Numbers(50)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (take(data.loader(numbers, processor, Plan(numbers, processor, 2, 500, 150), workers), 20)
                for workers in (0, 2))
    assert one == two and torch.equal(before, torch.get_rng_state())


def test_a_stand_in_has_no_weight_and_no_label(processor):
    numbers = Numbers(1)
    real, stand_in = (next(data.loader(numbers, processor, Plan(numbers, processor, 0, 1, 100, rank, 2)))
                      for rank in (0, 1))
    assert (real.weight, stand_in.weight) == (1, 0) and (stand_in.labels == -100).all() and stand_in.last


def test_bad_samples_stop_the_run_or_are_left_out_and_counted(processor, tmp_path):
    numbers = Numbers(40, bad={3: BadSample("number 3 is bad."), 9: NoPreference("no pair.")})
    with pytest.raises(BadSample, match="^number 3 is bad.$"):
        steps(Plan(numbers, processor, 0, 2000, 200), 5)
    tally = BadSamples(skip=True, grace=10 ** 6)
    done = steps(Plan(numbers, processor, 0, 2000, 200, bad=tally), 5)
    assert {draw % 40 for micros, _ in done for micro in micros for draw in micro} == set(range(40)) - {3, 9}
    assert tally.bad >= 1 and tally.first == ["number 3 is bad."]
    with pytest.raises(BadSample, match="above the limit of 0.1%; the first: number 3 is bad"):
        steps(Plan(numbers, processor, 0, 2000, 200, bad=BadSamples(skip=True, grace=1)), 5)
    with pytest.raises(BadSample, match="None of the 4 samples"):
        steps(Plan(Numbers(4, bad=range(4)), processor, 0, 10, 10, bad=BadSamples(skip=True)), 1)


def test_a_picture_that_breaks_in_decoding_is_absent_and_counts_for_all_ranks(processor, tmp_path):
    picture().save(tmp_path / "ok.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "ok.png").read_bytes()[:3000])
    rows = [{"id": name, "messages": [Q], "images": [f"{name}.png"]} for name in ("ok", "half")]
    lines = JSONL(write(tmp_path / "t.jsonl", *rows))
    tally = BadSamples(skip=True, grace=10 ** 6)
    plan = Plan(lines, processor, 0, 40, 1000, 0, 2, bad=tally)
    for batch, _ in zip(data.loader(lines, processor, plan, workers=1), range(6)):
        assert batch.names == (["ok"] if batch.weight else [""])
    assert tally.bad and tally.bad % 2 == 0 and len(tally.first) == 1
    assert "t.jsonl line 2" in tally.first[0] and "half.png" in tally.first[0]
    with pytest.raises(BadSample, match="^t.jsonl line 2: .*half.png cannot be read"):
        for batch in data.loader(lines, processor, Plan(lines, processor, 0, 40, 1000), workers=1):
            pass


def test_a_pair_is_two_rows_that_supervise_only_their_answers(folder, processor):
    history = [turn("user", "Q"), turn("assistant", "earlier"), turn("user", IMAGE, "Total?")]
    pair = Sample("p", history, [picture()], chosen=[text("12.50")], rejected=[text("13.50 or so")])
    rows = data.encode_rows(processor, pair)
    learned = [processor.decode(row.labels[row.labels != -100], False) for row in rows]
    assert learned == ["12.50<|im_end|>", "13.50 or so<|im_end|>"]
    plan = Plan([pair], processor, 0, 1, 1)
    assert plan.gather({"epoch": 0, "position": 0})[0] == [(2 * len(rows[1].ids), 0)]
    batch = next(data.loader([pair], processor, plan))
    assert batch.ids.shape[0] == 2 and batch.grids.shape[0] == 2
    long = Sample("p", [turn("user", "read the line " * 100)], chosen=A, rejected=[text("B " * 9)])
    with pytest.raises(BadSample, match="p has a prompt that leaves no room"):
        data.encode_rows(Processor(folder, max_text_tokens=60), long)
