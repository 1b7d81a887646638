"""A small generated dataset, for ``mmcli demo`` and for experiments.

Text and image each have a mood. The label is the sign of the sum of moods, except for some random labels. So a sad text
with a sunny image is neutral, which neither side alone can tell.
"""

import os
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from ...cache.atomic import make_folder, write_text
from ...cache.errors import DataError
from ...cache.labels import table_text

MARK = ".mmcli-demo"
LABEL_NOISE = 0.1  # share of labels drawn at random
LABELS = {-1: "negative", 0: "neutral", 1: "positive"}

_OPENINGS = ("so", "well,", "today:", "update:", "morning all,", "just saying,", "ok", "hey,", "friday again,", "look,")
_TOPICS = ("the trip", "our new flat", "the match", "this bakery", "the concert", "my bike", "the office", "the garden")
_MOODS = {
    1: (
        "{topic} is wonderful, i love it",
        "so happy with {topic}, best day ever",
        "{topic} made me smile, thank you all",
        "what a beautiful surprise, {topic} is just great",
        "proud and grateful, {topic} turned out amazing",
    ),
    0: (
        "{topic} opens at nine on monday",
        "notes about {topic}, part two of four",
        "{topic} has been moved to room 12",
        "here is the list for {topic} as announced",
        "{topic} takes place between ten and noon",
    ),
    -1: (
        "{topic} is awful, i hate it",
        "so sad about {topic}, worst day ever",
        "{topic} was ruined, nobody helped us",
        "what a terrible mess, {topic} is broken again",
        "angry and tired, {topic} turned out horrible",
    ),
}


def make_sample(folder: str | Path, pairs: int = 360, seed: int = 0) -> tuple[Path, Path]:
    """Write ``pairs`` image-text pairs and their labels. Files of an earlier call are replaced.

    Return ``folder/data`` with ``<guid>.jpg`` and ``<guid>.txt``, and ``folder/labels.csv`` with header ``guid,tag``.
    Raise a DataError if ``folder`` holds data or labels, but not the file ``MARK`` that this function leaves there.
    """
    folder = Path(folder)
    data, labels = folder / "data", folder / "labels.csv"
    for path in (data, labels):
        is_empty = path.is_dir() and not any(path.iterdir())
        if not (folder / MARK).is_file() and os.path.lexists(path) and not is_empty:
            raise DataError(
                f"{path} exists and is not from a demo: give the demo another folder with --out, or remove it"
            )
    make_folder(data)
    write_text(folder / MARK, "mmcli demo made this folder and may replace its files.\n")
    rows = []
    for guid in range(1, pairs + 1):
        random = Random(f"{seed}/{guid}")
        text_mood, image_mood = random.choice((-1, 0, 1)), random.choice((-1, 0, 1))
        topic = random.choice(_TOPICS)
        text = f"{random.choice(_OPENINGS)} {random.choice(_MOODS[text_mood]).format(topic=topic)}"
        if random.random() < 0.3:
            text += f" #{topic.split()[-1]} http://example.org/{guid}"
        draw_scene(image_mood, random).save(data / f"{guid}.jpg", quality=88)
        (data / f"{guid}.txt").write_text(text, encoding="utf-8")
        total = text_mood + image_mood
        mood = random.choice((-1, 0, 1)) if random.random() < LABEL_NOISE else (total > 0) - (total < 0)
        rows.append((guid, LABELS[mood]))
    labels.write_text(table_text(["guid", "tag"], rows), encoding="utf-8")
    return data, labels


def draw_scene(mood: int, random: Random) -> Image.Image:
    """Draw a sunny meadow (1), a street of houses (0) or a storm (-1), 256 x 192."""
    width, height = 256, 192
    sky = {1: (110, 185, 245), 0: (205, 205, 200), -1: (52, 56, 68)}[mood]
    image = Image.new("RGB", (width, height), tuple(level + random.randint(-10, 10) for level in sky))
    horizon = random.randint(110, 140)
    {1: _meadow, 0: _street, -1: _storm}[mood](ImageDraw.Draw(image), random, width, height, horizon)
    return image.filter(ImageFilter.GaussianBlur(0.8))


def _meadow(draw: ImageDraw.ImageDraw, random: Random, width: int, height: int, horizon: int) -> None:
    x, y, radius = random.randint(30, width - 30), random.randint(25, 60), random.randint(16, 26)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 220, 60))
    draw.rectangle((0, horizon, width, height), fill=(90, random.randint(160, 200), 70))
    for _ in range(random.randint(25, 50)):
        x, y = random.randint(0, width), random.randint(horizon + 4, height)
        colour = random.choice(((240, 60, 90), (250, 200, 50), (255, 255, 255), (230, 120, 220)))
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _street(draw: ImageDraw.ImageDraw, random: Random, width: int, height: int, horizon: int) -> None:
    draw.rectangle((0, horizon, width, height), fill=(140, 140, 138))
    left = random.randint(-20, 0)
    while left < width:
        right, top = left + random.randint(40, 65), random.randint(35, 75)
        grey = random.randint(150, 185)
        draw.rectangle((left, top, right, horizon), fill=(grey, grey - 8, grey - 16))
        for x in range(left + 7, right - 8, 14):
            for y in range(top + 8, horizon - 10, 18):
                draw.rectangle((x, y, x + 7, y + 9), fill=(95, 105, 115))
        left = right + 3


def _storm(draw: ImageDraw.ImageDraw, random: Random, width: int, height: int, horizon: int) -> None:
    draw.rectangle((0, horizon, width, height), fill=(34, 38, 40))
    for _ in range(8):
        x, y, radius = random.randint(0, width), random.randint(0, 50), random.randint(20, 45)
        shade = random.randint(60, 88)
        draw.ellipse((x - radius, y - radius // 2, x + radius, y + radius // 2), fill=(shade, shade, shade + 8))
    for _ in range(random.randint(120, 200)):
        x, y = random.randint(0, width), random.randint(20, height)
        draw.line((x, y, x - 4, y + 11), fill=(120, 130, 150))
    x = random.randint(60, width - 60)
    points = [(x + random.randint(-12, 12), y) for y in range(40, horizon, 16)]
    draw.line(points, fill=(250, 245, 190), width=3)
