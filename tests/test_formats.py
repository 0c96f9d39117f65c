"""formats.py against lines as they are published, each with the sample it should become, written by hand."""
import copy
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
from formats import JSONL, MIXTURES, TABLE12, BadSample, NoPreference, convert
from test_data import IMAGE, folder, picture, processor, text, turn, write  # noqa: F401 (fixtures)

A, Q = [text("A")], turn("user", IMAGE, "Q")
RATED = [{"model": m, "response": r,
          "annotations": {"Helpfulness": {"Rating": h}, "Visual Faithfulness": {"Rating": v}}}
         for m, r, h, v in (("x", "mid", "3", "3"), ("y", "best", "5", "N/A"), ("z", "worst", "1", "4"))]
READ = [                                                     # row, messages, images, chosen, rejected
    ({"id": 7, "images": ["p.png"], "messages": [turn("user", IMAGE, "a <image> b"), turn("assistant", "A")]},
     [turn("user", IMAGE, "a <image> b"), turn("assistant", "A")], ["p.png"], None, None),
    ({"images": ["p.png"], "messages": [Q], "chosen": A, "rejected": "B"}, [Q], ["p.png"], A, [text("B")]),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "p.png"}, text("Q")]}]},
     [Q], ["p.png"], None, None),
    ({"messages": [{"role": "user", "content": "<image>\nQ<image>"}], "images": ["p.png", "q.png"]},
     [turn("user", IMAGE, "\nQ", IMAGE)], ["p.png", "q.png"], None, None),
    ({"id": "1", "image": "p.png", "model": "", "conversations": [{"from": "human", "value": "<image>\nQ"},
                                                                {"from": "gpt", "value": "A"}]},
     [Q, turn("assistant", "A")], ["p.png"], None, None),
    ({"conversations": [{"from": "human", "value": "Q"}]}, [turn("user", "Q")], [], None, None),
    ({"images": ["p.png"], "system": "S", "conversations": [{"from": "human", "value": "<image>Q"}],     # LLaMA-Factory
      "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
     [turn("system", "S"), Q], ["p.png"], A, [text("B")]),
    ({"image": "p.png", "question": "<image>\nQ", "chosen": "A", "rejected": "B"},
     [Q], ["p.png"], A, [text("B")]),
    ({"image": "p.png", "question": "Q", "chosen": "A", "rejected": "B"}, [Q], ["p.png"], A, [text("B")]),
    ({"ds_name": "RLHF-V", "image": "p.png", "idx": 0, "image_path": "elsewhere.jpg",
      "text": json.dumps({"question": "Q", "chosen": "A", "rejected": "B"})}, [Q], ["p.png"], A, [text("B")]),
    ({"id": "v", "prompt": "Q", "image": "p.png", "completions": RATED},
     [Q], ["p.png"], [text("best")], [text("worst")]),
    ({"prompt": "Q", "image": "p.png", "completions": {key: [r[key] for r in RATED] for key in RATED[0]}},
     [Q], ["p.png"], [text("best")], [text("worst")]),
    ({"prompt": "Q", "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
      "score_chosen": 9.},
     [turn("user", "Q")], [], A, [text("B")]),
    ({"prompt": "Q", "prompt_id": "x", "score_chosen": 9., "messages": [turn("user", "Q"), turn("assistant", "A")],
      "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]},
     [turn("user", "Q")], [], A, [text("B")]),
    ({"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "score_chosen": 9.,
      "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]},
     [turn("user", "Q")], [], A, [text("B")]),
    ({"source": "evol", "instruction": "Q", "models": [], "completions": RATED},
     [turn("user", "Q")], [], [text("best")], [text("worst")]),
    ({"prompt": "Q", "prompt_id": "x", "messages": [{"role": "user", "content": "Q"},
                                                   {"role": "assistant", "content": "A"}]},
     [turn("user", "Q"), turn("assistant", "A")], [], None, None),
    ({"questionId": "1", "question": "Q", "image": "p.png", "answers": ["A", "a"]},
     [Q, turn("assistant", "A")], ["p.png"], None, None),
    ({"question": "Q", "image": "p.png", "options": ["x", "y"], "answer": "1"},                          # AI2D
     [turn("user", IMAGE, "Q\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."),
      turn("assistant", "B")], ["p.png"], None, None),
    ({"query": "Q", "image": "p.png", "label": ["A"], "human_or_machine": 0},                            # ChartQA
     [Q, turn("assistant", "A")], ["p.png"], None, None),
    ({"image": "p.png", "ground_truth": json.dumps({"gt_parse": {"text_sequence": "A"}})},
     [turn("user", IMAGE, "Read all the text in the image."), turn("assistant", "A")], ["p.png"], None, None),
    ({"texts": ["A", None, "B"], "images": [None, "p.png", None]},
     [turn("document", "A", IMAGE, "B")], ["p.png"], None, None),
    ({"text": "A <image>", "id": "<urn>", "url": "x", "dump": "y"},
     [turn("document", "A <image>")], [], None, None),
    # GRIT, as its card shows a line, with the path of the downloaded image
    ({"key": "0", "clip_similarity_vitb32": .35, "id": 1795, "url": "https://a/b.jpg", "image": "p.png",
      "caption": "a wire hanger with a cover", "width": 1024, "height": 693,
      "noun_chunks": [[0, 13, .019422, .02763, .95933, .96746, .675]],
      "ref_exps": [[19, 26, .0196, .31054, .9622, .9603, .79], [0, 26, .019422, .02763, .95933, .96746, .675]]},
     [turn("user", IMAGE, "Describe the image in one sentence."), turn("assistant", "a wire hanger with a cover"),
      turn("user", "Locate what the sentence names, as JSON."),
      turn("assistant", '[{"bbox_2d": [19, 28, 959, 967], "label": "a wire hanger with a cover"}, '
                        '{"bbox_2d": [20, 311, 962, 960], "label": "a cover"}]')], ["p.png"], None, None),
    ({"caption": "a cat", "noun_chunks": [[0, 5, 0, 0, 1, .5, .9]], "ref_exps": [], "image": "p.png"},
     [turn("user", IMAGE, "Describe the image in one sentence."), turn("assistant", "a cat"),
      turn("user", "Locate what the sentence names, as JSON."),
      turn("assistant", '[{"bbox_2d": [0, 0, 1000, 500], "label": "a cat"}]')], ["p.png"], None, None),
    ({"conversations": ["Q", "A", "Q2", "A2"], "source": "stackexchange"},                                  # LIMA
     [turn("user", "Q"), turn("assistant", "A"), turn("user", "Q2"), turn("assistant", "A2")], [], None, None),
    ({"image": "p.png", "question": "Q", "choices": ["x", "y", "z"], "answer": 2, "hint": "H", "task": "closed choice",
      "grade": "grade2", "subject": "natural science", "topic": "t", "category": "c", "skill": "s", "lecture": "L",
      "solution": "S"},                                                                                 # ScienceQA
     [turn("user", IMAGE, "Context: H\nQ\nA. x\nB. y\nC. z\n"
           "Answer with the option's letter from the given choices directly."), turn("assistant", "C")],
     ["p.png"], None, None),
    ({"image": None, "question": "Q", "choices": ["x", "y"], "answer": 0, "hint": ""},
     [turn("user", "Q\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."),
      turn("assistant", "A")], [], None, None),
    ({"texts": [None, "A", None], "images": ["p.png", None, "q.png"], "metadata": "[]", "general_metadata": "{}"},
     [turn("document", IMAGE, "A", IMAGE)], ["p.png", "q.png"], None, None),                              # OBELICS
    ({"image": "p.png", "conversations": [{"from": "human", "value": "<image>\nHint: H\nQuestion: Q"},
                                          {"from": "gpt", "value": "The answer is B"}]},                # MathV360K
     [turn("user", IMAGE, "Hint: H\nQuestion: Q"), turn("assistant", "The answer is B")], ["p.png"], None, None),
    ({"id": "0", "data": ["Q", "A", "Q2", "A2"]},                                           # UltraChat, unfiltered
     [turn("user", "Q"), turn("assistant", "A"), turn("user", "Q2"), turn("assistant", "A2")], [], None, None),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "uuid": "u",
      "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},          # Magpie-Pro
     [turn("user", "Q"), turn("assistant", "A")], [], None, None),
    ({"conversations": [{"from": "system", "value": "S", "weight": None}, {"from": "human", "value": "Q", "weight": 0.},
                        {"from": "gpt", "value": "A", "weight": 1.}]},                                   # SlimOrca
     [turn("system", "S"), turn("user", "Q"), turn("assistant", "A")], [], None, None),
    # An image that no turn mentions comes first; <image> without an image is text, and so it is in an answer.
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                        {"from": "gpt", "value": "A"}], "image": ["p.png", "q.png"]},
     [turn("system", "S"), turn("user", IMAGE, IMAGE, "Q"), turn("assistant", "A")], ["p.png", "q.png"], None, None),
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "images": ["p.png"]},
     [Q, turn("assistant", "A")], ["p.png"], None, None),
    ({"conversations": [{"from": "human", "value": "use <image> tags in html"}, {"from": "gpt", "value": "<image>\n"}]},
     [turn("user", "use <image> tags in html"), turn("assistant", "<image>\n")], [], None, None),
    ({"messages": [{"role": "user", "content": "an <image> tag"}, {"role": "assistant", "content": "<image>"}]},
     [turn("user", "an <image> tag"), turn("assistant", "<image>")], [], None, None),
    ({"chosen": [{"role": "user", "content": "an <image> tag"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "an <image> tag"}, {"role": "assistant", "content": "B"}]},
     [turn("user", "an <image> tag")], [], A, [text("B")]),
    ({"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "write <image>"}],
      "image": "p.png"}, [Q, turn("assistant", "write <image>")], ["p.png"], None, None),
]


@pytest.mark.parametrize("row, messages, images, chosen, rejected", READ)
def test_every_format_is_read_as_published(tmp_path, row, messages, images, chosen, rejected):
    listed = tmp_path / "list.json"
    listed.write_text("\ufeff" + json.dumps([row]))      # some editors begin with a byte-order mark
    lines = JSONL(write(tmp_path / "t.jsonl", "", {"text": "é" * 50}, "  ", row))
    for read in (lines[1], JSONL(listed)[0]):
        assert read.messages == messages and read.images == [str(tmp_path / image) for image in images]
        assert read.chosen == chosen and read.rejected == rejected


@pytest.mark.parametrize("row, complaint", [
    ({"texts": [None], "images": ["https://a/b.png"]}, "by its address .https://a/b.png.: download it"),
    ({"question": "Q", "image": "p.png", "options": ["x"], "answer": "1"}, "the answer 1 is none of 1 options"),
    ('{"text": "A"', "not JSON"), ("[1]", "no fields"), ({"txt": "A"}, "txt, which fit no known format"),
    ({"messages": [turn("user", "Q")], "imgs": []}, "unknown field imgs in the sample"),
    ({"messages": [turn("user", "Q") | {"name": "x"}]}, "unknown field name in a message"),
    ({"messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}, "unknown field video"),
    ({"messages": [{"role": "user"}]}, "no field 'content'"),
    ({"messages": [turn("tool", "Q")]}, "unknown role 'tool'"), ({"messages": []}, "0 messages"),
    ({"messages": [turn("user", IMAGE), turn("assistant", IMAGE)], "images": ["a", "b"]},
     "image in the assistant's"),
    ({"messages": [turn("user", "Q", IMAGE, IMAGE)], "images": ["p"]}, "2 image markers, and 1 images"),
    ({"conversations": [{"from": "human", "value": "<image>\n<image>\nQ"}], "image": "p"},
     "2 image markers, and 1 images"),
    ({"conversations": [{"from": "human", "value": "<image>\nQ"}], "image": None}, "but has <image>"),
    ({"messages": [{"role": "user", "content": "Q\n<image>"}]}, "but has <image>"),
    ({"conversations": [{"from": "bot", "value": "Q"}]}, "'bot'"), ({"text": 3}, "neither text nor image"),
    ('{"text": "a \\ud83d b"}', "not Unicode"),
    ({"text": "a cat", "images": ["p.png"]}, "images or videos that its format has no place for"),
    ({"conversations": [{"from": "human", "value": "<video>Q"}], "videos": ["v"]}, "images or videos"),
    ({"prompt": "<image>Q", "chosen": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "B"}]}, "but has <image>"),
    ({"messages": [turn("user", "Q")], "chosen": "A"}, "one of chosen and rejected without the other"),
    ({"messages": [turn("user", "Q")], "chosen": [turn("assistant", "A")], "rejected": "B"}, "answer that is not text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "neither text nor image"),
    ({"text": "not json", "image": "p"}, "malformed"), ({"messages": "Q"}, "malformed"),
    ('{"text": ' + "[" * 3000 + "]" * 3000 + "}", "not JSON .*recursion"),
    ('{"question": "Q", "image": "p.png", "options": ["x"], "answer": 1e400}', "the answer inf is none of"),
    ({"question": "Q", "choices": ["x", "y"], "answer": .5}, "the answer 0.5 is none of"),
    ({"question": "Q", "choices": "xy", "answer": 1}, "options is 'xy'"), ({"data": "QA"}, "turns is 'QA'"),
    ({"texts": "AB", "images": [None, None]}, "texts is 'AB'"), ({"id": 1, "text": "a\nb", "images": [3]}, "images"),
    ({"conversations": [{"from": "gpt", "value": {}}]}, "neither text nor image"),
    ({"image": [3], "question": "Q", "answer": "A"}, "malformed"), ({"image": "data:image/png;base64,aaaa" * 999,
                                                                  "question": "Q", "answer": "A"}, "by its address"),
    ({"messages": [turn("x\ny" * 999, "Q")]}, "unknown role"),
    ({"caption": "a cat", "noun_chunks": [[0, 5, 0, 0, 1.5, .5, .9]], "image": "p"}, "box is out of bounds"),
    ({"caption": "a cat", "noun_chunks": [[0, 5, 0, 0, 1, .5, .9]], "url": "https://a/b.png"}, "download it"),
    ({"chosen": [{"role": "user", "content": "Q"}], "rejected": [{"role": "system", "content": "B"}]},
     "not two answers to one prompt")])
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, row, complaint):
    lines = JSONL(write(tmp_path / "t.jsonl", {"text": "fine"}, "", row))
    assert len(lines) == 2 and lines[0].messages[0]["content"] == [text("fine")]
    with pytest.raises(BadSample, match=f"^t.jsonl line 3 .*{complaint}.*\\.$"):
        lines[1]


def answers(chosen, rejected, **row):
    return {key: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]
            for key, answer in (("chosen", chosen), ("rejected", rejected))} | row


@pytest.mark.parametrize("row", [
    answers("A", "A"), answers("A", "B", score_chosen=7., score_rejected=7.),
    answers("A", "B", score_chosen=6.5, score_rejected=7.), answers("A", "B", score_chosen=float("nan"), score_rejected=7.),
    answers("A", "B", **{"chosen-rating": 3, "rejected-rating": 5}), answers("A", "B", chosen_score=1, rejected_score=1),
    {"image": "p.png", "question": "Q", "chosen": "A", "rejected": "A"},
    {"image": "p.png", "text": json.dumps({"question": "Q", "chosen": "A", "rejected": "A"})},
    {"messages": [turn("user", "Q")], "chosen": "A", "rejected": [text("A")]},
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
     "rejected": {"from": "gpt", "value": "A"}},
    {"prompt": "Q", "completions": [r | {"response": "same"} for r in RATED]},
    {"prompt": "Q", "completions": [r | {"annotations": {"Helpfulness": {"Rating": "3"}}} for r in RATED]}])
def test_answers_of_which_none_is_better_are_no_pair(tmp_path, row):
    with pytest.raises(NoPreference, match="^t.jsonl line 1 has .*better.*\\.$"):
        JSONL(write(tmp_path / "t.jsonl", row))[0]


def test_scores_that_agree_or_are_absent_leave_a_pair(tmp_path):
    rows = [answers("A", "B", score_chosen=7.5, score_rejected=7.), answers("A", "B", score_chosen=7., score_rejected=None)]
    assert all(sample.chosen == A for sample in JSONL(write(tmp_path / "t.jsonl", *rows)))


def test_check_names_what_training_would_refuse(tmp_path, capsys):
    Image.new("RGB", (3000, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 10)).save(tmp_path / "good.png")
    rows = [dict(image=f"{name}.png", question="Q", answer="A") for name in ("wide", "good", "none")]
    path = write(tmp_path / "t.jsonl", *rows, {"messages": [turn("user", "Q")]})
    assert data.check(path) == 3
    said = capsys.readouterr().out
    assert "t.jsonl line 1" in said and "a ratio above 200" in said and "t.jsonl line 3" in said and "is missing" in said
    assert "line 4 ends without an answer" in said and f"{path}: 4 samples, of which 3 cannot be used." in said


def test_parquet_becomes_jsonl_and_image_files(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet is optional")
    import pyarrow.parquet
    raw = io.BytesIO()
    picture().save(raw, "PNG")
    rows = [{"image": {"bytes": raw.getvalue(), "path": "0.png"},
             "text": json.dumps({"question": "Q", "chosen": "A", "rejected": "B"})}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="data.py convert"):
        JSONL(tmp_path / "t.parquet")
    convert([tmp_path / "t.parquet"], tmp_path / "out")
    sample = JSONL(tmp_path / "out" / "data.jsonl")[0]
    parts = [{"type": "image", "image": {"bytes": raw.getvalue(), "path": "1.png"}}, {"type": "text", "text": "Q"}]
    for name in "ab":                                        # two shards, with parts of unlike fields
        rows = [{"messages": [{"role": "user", "content": parts}]}]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    convert([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "shards")
    shards = JSONL(tmp_path / "shards" / "data.jsonl")
    assert [s.messages for s in shards] == [[Q], [Q]] and len({*shards[0].images, *shards[1].images}) == 2
    assert sample.chosen == A and Image.open(sample.images[0]).tobytes() == picture().tobytes()


def parquet(path, *rows):
    pa = pytest.importorskip("pyarrow", reason="parquet is optional")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def encoded(image, kind):
    raw = io.BytesIO()
    image.save(raw, kind)
    return raw.getvalue()


def test_bytes_are_an_image_only_where_they_decode_as_one(tmp_path):
    """Text that is stored as bytes stays text, also where it begins as an image file would."""
    grey = Image.new("L", (2, 1), 65)
    images = {kind: encoded(grey, kind) for kind in ("PNG", "JPEG", "GIF", "PPM")}
    assert images["PPM"].isascii()                           # and yet an image
    words = ["plain", "naïve 日本語", "P5 is a road", "P5 30 30 255 and so on", "GIF89a", "", "BM", "a\nb"]
    rows = [{"text": word.encode()} for word in words]
    data.convert([parquet(tmp_path / "t.parquet", *rows)], tmp_path / "out")
    samples = JSONL(tmp_path / "out" / "data.jsonl")
    assert [sample.messages[0]["content"][0]["text"] for sample in samples] == words
    assert not list((tmp_path / "out" / "images").iterdir())
    rows = [{"image": raw, "question": b"Q", "answer": b"A"} for raw in images.values()]
    data.convert([parquet(tmp_path / "t.parquet", *rows)], tmp_path / "out")
    for sample in JSONL(tmp_path / "out" / "data.jsonl"):
        assert sample.messages == [Q, turn("assistant", "A")] and Image.open(sample.images[0]).convert("L").getpixel((0, 0)) == 65
    half = encoded(picture(), "PNG")[:3000]                  # which data.py refuses by name when it comes to it
    data.convert([parquet(tmp_path / "t.parquet", {"image": half, "question": "Q", "answer": "A"})], tmp_path / "half")
    assert open(JSONL(tmp_path / "half" / "data.jsonl")[0].images[0], "rb").read() == half
    for raw in (b"\xff\xfe\x00", b"\0", images["PNG"][:20], b"caf\xe9"):
        with pytest.raises(ValueError, match="t.parquet row 2: text holds bytes that are neither an image nor text"):
            data.convert([parquet(tmp_path / "t.parquet", {"text": b"fine"}, {"text": raw})], tmp_path / "bad")
    assert not (tmp_path / "bad" / "data.jsonl").exists()    # no half of a file under its name


def test_a_broken_image_in_a_column_of_images_is_left_to_check(tmp_path, capsys):
    rows = [{"image": {"bytes": raw, "path": "a.png"}, "question": "Q", "answer": "A"}
            for raw in (encoded(picture(), "PNG"), b"no image")]
    rows.append(rows[0] | {"image": {"bytes": rows[0]["image"]["bytes"][:3000], "path": None}})
    data.convert([parquet(tmp_path / "t.parquet", *rows)], tmp_path / "out")
    assert data.check(tmp_path / "out" / "data.jsonl") == 1              # the half has a good header
    assert "data.jsonl line 2: " in capsys.readouterr().out


def test_obelics_with_its_column_of_images_is_read_from_parquet(tmp_path):
    raw = {"bytes": encoded(picture(), "PNG"), "path": None}
    rows = [{"images": [raw, None, raw], "texts": [None, "A", None], "metadata": "[]", "general_metadata": "{}"}]
    data.convert([parquet(tmp_path / "t.parquet", *rows)], tmp_path / "out")
    [sample] = JSONL(tmp_path / "out" / "data.jsonl")
    assert sample.messages == [turn("document", IMAGE, "A", IMAGE)] and len(set(sample.images)) == 2
    assert all(Image.open(image).tobytes() == picture().tobytes() for image in sample.images)


def test_a_recipe_takes_table_12s_weights_and_refuses_unknown_fields(tmp_path):
    for name, n in (("f", 40), ("o", 40), ("x", 7)):
        write(tmp_path / f"{name}.jsonl", *[{"text": f"{name}{i}"} for i in range(n)])
    sources = [{"name": "fineweb-edu", "path": "f.jsonl"}, {"name": "obelics", "path": "o.jsonl"}]
    (tmp_path / "mix.json").write_text(json.dumps({"sources": sources, "samples": 61}))
    mixture = data.read_data(tmp_path / "mix.json")
    assert Counter(mixture.locate(i)[0] for i in range(61)) == {"fineweb-edu": 60, "obelics": 1}
    assert sum(TABLE12.values()) == 1_340_000
    for broken in ({"sources": sources, "sample": 3}, {"sources": [{"name": "a", "file": "x.jsonl"}]},
                   {"sources": sources * 2}, {"sources": [{"name": "a"}]}):
        (tmp_path / "mix.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="mix.json"):
            data.read_data(tmp_path / "mix.json")


def test_the_mixtures_of_c4_and_c5_are_known_by_name(tmp_path):
    sft, dpo = MIXTURES["sft"], MIXTURES["dpo"]
    assert sum(sft.values()) == 500_000 and sum(dpo.values()) == 150_000          # App. C.4, C.5
    assert [round(share / 5000) for share in sft.values()] == [40, 25, 15, 15, 5]
    assert dpo == {"mmpr": 100_000, "vlfeedback": 25_000, "ultrafeedback": 15_000, "rlhf-v": 10_000}
    sizes = dict(cambrian=9, scienceqa=1, mathv360k=3, lima=2, mine=5)
    for name, n in sizes.items():
        write(tmp_path / f"{name}.jsonl", *[{"text": name}] * n)
    sources = [{"name": name, "path": f"{name}.jsonl"} for name in sizes]
    (tmp_path / "mix.json").write_text(json.dumps({"mixture": "sft", "sources": sources, "samples": 300_005}))
    mixture = data.read_data(tmp_path / "mix.json")
    assert dict(zip(mixture.names, mixture.quota)) == dict(              # 75,000 are shared 1 : 3, the rest is whole
        cambrian=200_000, scienceqa=18_750, mathv360k=56_250, lima=25_000, mine=5)
    sources[2]["weight"] = 55                                             # has its own, and leaves ScienceQA the share
    (tmp_path / "mix.json").write_text(json.dumps({"mixture": "sft", "sources": sources, "samples": 300_060}))
    mixture = data.read_data(tmp_path / "mix.json")
    assert dict(zip(mixture.names, mixture.quota)) == dict(
        cambrian=200_000, scienceqa=75_000, mathv360k=55, lima=25_000, mine=5)


def test_the_recipes_of_the_docs_name_what_their_mixture_knows():
    pages = (Path(data.__file__).parent / "docs" / "recipes.md").read_text()
    recipes = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", pages, re.S)]
    assert [recipe["mixture"] for recipe in recipes] == ["distill", "dpo"]
    for recipe in recipes:
        mixture = MIXTURES[recipe["mixture"]]
        assert recipe["samples"] == sum(mixture.values())
        assert [source["name"] for source in recipe["sources"]] == list(mixture)
    for names in MIXTURES["sft"]:
        assert all(f"`{name}`" in pages for name in names.split())


@pytest.mark.parametrize("change, complaint", [
    ({"sources": None}, "sources is None"), ({"sources": []}, "needs sources"), ({"sources": [7]}, "not an object"),
    ({"path": ["x"]}, "path is ..x.."), ({"path": None}, "path is None"), ({"name": 3}, "name is 3"),
    ({"path": "x\0y"}, "the source lima: embedded null byte"), ({"path": "no.jsonl"}, "No such file"),
    ({"path": "."}, "Is a directory"), ({"path": "empty.jsonl"}, "has 0 samples"), ({"images": 3}, "images is 3"),
    ({"weight": "1"}, "weight is '1'"), ({"weight": 0}, "the weight 0"), ({"weight": float("nan")}, "the weight nan"),
    ({"weight": float("inf")}, "the weight inf"), ({"weight": -2}, "the weight -2"), ({"weight": True}, "weight is True"),
    ({"weight": 10 ** 400}, "the weight 1000"), ({"samples": 1.5}, "samples is 1.5"), ({"samples": 0}, "samples as a number"),
    ({"samples": 10 ** 30}, "samples as a number"), ({"seed": "x"}, "seed is 'x'"), ({"mixture": "c4"}, "a mixture of distill"),
    ("[" * 3000, "not JSON"), ('{"sources": ' + "[" * 3000 + "]" * 3000 + "}", "not JSON .*recursion"),
    ('{"sources": \ud83d', "not JSON"), ("{", "not JSON")])
def test_a_wrong_recipe_is_one_sentence_with_its_name(tmp_path, change, complaint):
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "empty.jsonl", "")
    recipe = {"sources": [{"name": "lima", "path": "a.jsonl"}]}
    if isinstance(change, dict):
        inside = set(change) <= {"name", "path", "images", "weight"}
        (recipe["sources"][0] if inside else recipe).update(change)
        change = json.dumps(recipe)
    (tmp_path / "mix.json").write_bytes(change.encode(errors="surrogatepass"))
    with pytest.raises((ValueError, OSError), match=complaint) as error:
        data.read_data(tmp_path / "mix.json")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# -- Mutations: a part of the campaign, the same every time

ODD = [None, [], {}, "", 0, -1, 1.5, True, float("inf"), float("nan"), 10 ** 30, [None], [[]], ["a", "b"], [{"a": 1}],
       "\ud800", "<image>", "a\nb", "\0", "x" * 5000, "http://a/b", {"bytes": "x"}, {"type": "image"}, "DEEP"]


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], path + (key,))


def mutated(row, rng):
    """A line with one place exchanged, removed, wrapped in a list, or a column added."""
    row = copy.deepcopy(row)
    *path, last = rng.choice([path for path in places(row) if path])
    at = row
    for key in path:
        at = at[key]
    how = rng.randrange(4)
    if how == 0:
        at[last] = copy.deepcopy(rng.choice(ODD))
    elif how == 1:
        del at[last]
    elif how == 2:
        at[last] = [at[last]]
    else:
        row[rng.choice("images image chosen messages text conversations caption".split())] = rng.choice(ODD)
    return json.dumps(row).replace('"DEEP"', "[" * 3000 + "]" * 3000)


def test_a_mutated_line_is_a_sample_or_one_sentence(tmp_path, processor):
    rng, seen = random.Random(0), Counter()
    picture().save(tmp_path / "p.png")
    for _ in range(600):
        line = mutated(rng.choice(READ)[0], rng)
        try:
            sample = JSONL(write(tmp_path / "t.jsonl", line))[0]
            for row in sample.rows():
                assert len(processor.encode(row).ids) == processor.length(row)
            seen["read"] += 1
        except BadSample as error:
            assert str(error).startswith("t.jsonl line 1") and str(error).endswith("."), line
            assert "\n" not in str(error) and len(str(error)) < 1000, line
            seen["refused"] += 1
    assert min(seen.values()) > 150


def test_a_mutated_recipe_is_a_mixture_or_one_sentence(tmp_path):
    rng, seen = random.Random(0), Counter()
    write(tmp_path / "a.jsonl", *[{"text": "a"}] * 5)
    recipe = {"mixture": "sft", "samples": 9, "seed": 3, "sources": [
        {"name": "lima", "path": "a.jsonl", "images": "."}, {"name": "mine", "path": "a.jsonl", "weight": 2}]}
    for _ in range(300):
        text = mutated(recipe, rng)
        (tmp_path / "mix.json").write_text(text)
        try:
            mixture = data.read_data(tmp_path / "mix.json")
            assert mixture[0].messages and mixture[len(mixture) * 3 + 1].messages
            seen["read"] += 1
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), text
            seen["refused"] += 1
    assert min(seen.values()) > 30
