"""A picture beside the map of its density (Fig. 2): what `density.py IMAGE...` draws."""
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# rho~:  0                .33              .67            1     bright: like its neighbours
RAMP = [(255, 249, 232), (246, 180, 106), (178, 58, 92), (26, 12, 56)]


def _colour(tilde):                           # (h, w) in [0, 1] -> an image along RAMP
    stops = np.linspace(0, 1, len(RAMP))
    rgb = [np.interp(tilde, stops, channel) for channel in zip(*RAMP)]
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8))


def draw_map(image, rho, long_side=560):
    """image: PIL; rho (h, w), one value per visual token -> a PIL image in RGB: the picture beside its
    map, over a strip that says how to read it. The map is min-max normalised for this picture and
    laid over a faint grey print of it, one square per visual token."""
    rho = torch.as_tensor(rho).float().cpu().numpy()
    low, high = float(rho.min()), float(rho.max())
    scale, gap, strip = long_side / max(image.size), 12, 40
    size = tuple(max(1, round(side * scale)) for side in image.size)
    photo = image.convert("RGB").resize(size, Image.LANCZOS if scale < 1 else Image.NEAREST)
    heat = _colour((rho - low) / max(high - low, 1e-5)).resize(size, Image.NEAREST)
    heat = Image.blend(heat, photo.convert("L").convert("RGB"), 0.22)

    sheet = Image.new("RGB", (max(2 * size[0] + 3 * gap, 560), size[1] + 2 * gap + strip), "white")
    middle, row = sheet.width // 2, size[1] + 2 * gap + 8
    sheet.paste(photo, (middle - gap // 2 - size[0], gap))
    sheet.paste(heat, (middle + gap // 2, gap))
    sheet.paste(_colour(np.linspace(0, 1, 160)[None].repeat(12, 0)), (middle - 80, row))
    pen, font, ink = ImageDraw.Draw(sheet), ImageFont.load_default(13), (70, 70, 80)
    pen.text((middle - 92, row + 6), f"like its neighbours  {low:.3f}", ink, font, anchor="rm")
    pen.text((middle + 92, row + 6), f"{high:.3f}  distinct", ink, font, anchor="lm")
    return sheet
