"""formats.py against lines as they are published, each with the sample it should become, written by hand."""
import io
import json
from collections import Counter

import pytest
from PIL import Image

import data
from formats import JSONL, TABLE12, BadSample, convert
from test_data import IMAGE, picture, text, turn, write

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
    ({"conversations": [{"from": "human", "value": "Q"}], "image": "p"}, "0 image markers, and 1 images"),
    ({"conversations": [{"from": "bot", "value": "Q"}]}, "'bot'"), ({"text": 3}, "neither text nor image"),
    ('{"text": "a \\ud83d b"}', "not Unicode"),
    ({"text": "a cat", "images": ["p.png"]}, "images or videos that its format has no place for"),
    ({"conversations": [{"from": "human", "value": "<video>Q"}], "videos": ["v"]}, "images or videos"),
    ({"prompt": "<image>Q", "chosen": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}],
      "rejected": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "B"}]}, "but has <image>"),
    ({"messages": [turn("user", "Q")], "chosen": "A"}, "one of chosen and rejected without the other"),
    ({"messages": [turn("user", "Q")], "chosen": [turn("assistant", "A")], "rejected": "B"}, "answer that is not text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "neither text nor image"),
    ({"text": "not json", "image": "p"}, "malformed"), ({"messages": "Q"}, "malformed")])
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, row, complaint):
    lines = JSONL(write(tmp_path / "t.jsonl", {"text": "fine"}, "", row))
    assert len(lines) == 2 and lines[0].messages[0]["content"] == [text("fine")]
    with pytest.raises(BadSample, match=f"^t.jsonl line 3 .*{complaint}.*\\.$"):
        lines[1]


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
