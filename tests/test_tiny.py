"""tiny/: the embedded teacher is what it says, to transformers too; and the lessons that made it are right."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import collate, processor_of
from model import Qwen3VL, VisionOut
from synthdoc import World

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tiny"))
import make_teacher  # noqa: E402

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers>=5 is the oracle")


def seen_by_transformers(folder, image, ids, config):
    """What its own image processor makes of a page, as its model's arguments."""
    if config.Tower:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
        cut = GotOcr2ImageProcessorPil.from_pretrained(folder)
        return dict(pixel_values=cut(images=[image], crop_to_patches=True, return_tensors="pt")["pixel_values"].float())
    seen = transformers.AutoImageProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    return dict(pixel_values=seen["pixel_values"].float(), image_grid_thw=seen["image_grid_thw"],
                mm_token_type_ids=(ids == config.image_token_id).int())


@pytest.mark.parametrize("name", ["tiny", "tiny/internvl"])
def test_transformers_loads_the_teacher_and_gives_the_same_logits_and_answers_to_real_pages(name):
    """Its own image processor cuts the pages, so pixels, grids, weights and positions are all its own."""
    folder = ROOT / name
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ours, processor = Qwen3VL.from_pretrained(folder, torch.float32), processor_of(folder)
    right = 0
    for suite in ("reading", "reasoning"):
        for sample in (World("eval", 0, suite)[i] for i in range(10)):
            gold, sample.messages = sample.messages[1]["content"][0]["text"], sample.messages[:1]
            batch = collate([processor.encode(sample, add_generation_prompt=True)], processor.pad_id)
            inputs = dict(input_ids=batch.ids, attention_mask=batch.mask.long(),
                          **seen_by_transformers(folder, sample.images[0].convert("RGB"), batch.ids, ours.config))
            with torch.no_grad():
                want, got = theirs(**inputs).logits, ours(batch.ids, batch.mask, batch.pixels, batch.grids)
            torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
            reply = theirs.generate(**inputs, do_sample=False, max_new_tokens=16)[0, batch.ids.shape[1]:].tolist()
            answer = ours.generate(batch.ids, batch.mask, batch.pixels, batch.grids, max_new_tokens=16)[0]
            assert answer == [t for t in reply if t not in (*ours.config.eos_token_id, processor.pad_id)]
            right += processor.decode(answer).strip() == gold
    assert right >= 12                                    # of 20: these are trained weights


def test_muon_turns_a_gradient_into_its_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    for shape in ((24, 24), (16, 40), (40, 16)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        make_teacher.Muon([p], lr=1.0).step()
        u, s, vh = torch.linalg.svd(p.grad, full_matrices=False)
        inside = u.T @ -p.detach() @ vh.T / max(1, shape[0] / shape[1]) ** 0.5          # the singular values it left
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-3
        assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.3          # five steps come this near


@pytest.mark.parametrize("cells", [(4, 8), (10, 10)])
def test_a_patch_is_named_after_the_mark_under_its_centre(cells):
    world, p = make_teacher.Lessons("train", 5, cells=cells, questions=9), 8
    for kind in ("receipt", "digits", "colour", "chart"):
        rng = world.rng(3)
        page = world.page(rng, kind)
        names, at = world.patch_names(page).tolist(), 0
        for block_row in range(cells[0]):
            for block_col in range(cells[1]):
                for row, col in ((2 * block_row + i, 2 * block_col + j) for i in (0, 1) for j in (0, 1)):
                    y, x = row * p + p / 2, col * p + p / 2
                    over = [what for what, x0, y0, x1, y1 in page.marks if x0 <= x < x1 and y0 <= y < y1]
                    assert make_teacher.CLASSES[names[at]] == (over[-1] if over else "nothing")
                    at += 1


def test_lessons_never_show_evaluation_digits(monkeypatch):
    """Neither stamps on drills nor pages of digits use the last 500 scans."""
    used, stamp = [], make_teacher.stamp

    def noting(page, rng, which, *rest):
        used.extend(int(n) for n in which)
        return stamp(page, rng, which, *rest)
    monkeypatch.setattr("make_teacher.stamp", noting)
    monkeypatch.setattr("synthdoc.stamp", noting)
    world = make_teacher.Lessons("train", 0, questions=9)
    for i in range(300):
        world.exercise(i, make_teacher.LESSONS[i % 3])
    assert len(used) > 500 and max(used) < 1797 - 500


@pytest.mark.parametrize("cells", make_teacher.SIZES["internvl"])
def test_tiles_come_back_to_their_places_on_the_page(tmp_path, monkeypatch, cells):
    """What stands in a patch's place is what it shows: the page's own pixels, cell by cell, thumbnails left out."""
    monkeypatch.setattr(make_teacher, "make_tokenizer", small_tokenizer)
    make_teacher.write_folder(tmp_path, "internvl")
    processor, world = processor_of(tmp_path), World("train", 3, cells=cells)
    pages = [world.page(world.rng(i), "receipt").image for i in range(2)]
    pixels = torch.cat([torch.from_numpy(processor.patches(page)[0]) for page in pages])
    out = make_teacher.on_the_page(VisionOut(pixels.view(-1, 4 * 192), [], pixels), processor, 2, cells)
    at = 0
    for page in pages:
        exact = np.asarray(page.convert("RGB"), np.float32).transpose(2, 0, 1) / 255 * 2 - 1
        for row in range(cells[0]):
            for col in range(cells[1]):
                for y, x in ((16 * row + 8 * i, 16 * col + 8 * j) for i in (0, 1) for j in (0, 1)):
                    np.testing.assert_allclose(out.patches[at].view(3, 8, 8), exact[:, y:y + 8, x:x + 8], atol=1e-5)
                    at += 1
    assert at == len(out.patches) == 4 * len(out.tokens)


def small_tokenizer(path, special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
