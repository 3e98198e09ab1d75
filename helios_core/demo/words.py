"""The demo model's small world in words: what they mean, what a prompt names, and the ways to say a scene.

It knows no pictures and imports no torch: the control plane and the command line read it too. `world.py` draws.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, fields, replace

Words = dict[str, tuple[str, ...]]  # meaning ▸ the words for it
Colour = tuple[float, ...]  # RGB in [0, 1]

COLOURS: dict[str, Colour] = {
    name: tuple(value / 255 for value in rgb)
    for name, rgb in {
        "red": (215, 45, 40),
        "orange": (245, 140, 30),
        "yellow": (245, 215, 50),
        "green": (50, 165, 70),
        "blue": (45, 85, 210),
        "purple": (125, 60, 185),
        "pink": (245, 130, 185),
        "white": (240, 240, 240),
    }.items()
}
SHAPES: Words = {  # what is drawn ▸ its words
    "disc": ("sun", "moon", "ball", "disc", "circle"),
    "square": ("square", "box"),
    "diamond": ("diamond", "kite"),
}
GROUNDS: Words = {"sea": ("sea", "ocean"), "hills": ("hills", "mountains"), "field": ("field", "desert")}
MOTIONS: Words = {
    "left": ("left",),
    "right": ("right",),
    "rising": ("rising", "up"),
    "sinking": ("sinking", "down", "falling"),
    "pulsing": ("pulsing", "breathing"),
    "still": ("still", "resting"),
}
SKY = "sky"
# What the model was taught of these. The scorer knows the others too, so that it can tell one from the other.
TAUGHT_SHAPES = {shape: SHAPES[shape] for shape in ("disc",)}
TAUGHT_MOTIONS = {motion: MOTIONS[motion] for motion in ("left", "right", "still")}


@dataclass(frozen=True)
class Scene:
    """What a video of this world shows; None for what a prompt left open."""

    object_colour: str | None = None
    shape: str | None = None
    ground_colour: str | None = None
    ground: str | None = None
    sky_colour: str | None = None
    motion: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """The attributes that are not open, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


def read_prompt(prompt: str) -> Scene:
    """What the prompt names, as far as this world has words for it."""
    text = " ".join(re.findall(r"[a-z]+", prompt.lower()))
    colour = rf"(?:\b({'|'.join(COLOURS)}) )?"

    def noun(words: Words) -> tuple[str | None, str | None]:
        """The meaning of the first of the words that stands in the text, and the colour before it."""
        found = re.search(colour + rf"\b({'|'.join(word for each in words.values() for word in each)})\b", text)
        return (_meaning(words, found[2]), found[1]) if found else (None, None)

    shape, object_colour = noun(SHAPES)
    ground, ground_colour = noun(GROUNDS)
    motion, _ = noun(MOTIONS)
    return Scene(
        object_colour=object_colour,
        shape=shape,
        ground_colour=ground_colour,
        ground=ground,
        sky_colour=noun({SKY: (SKY,)})[1],
        motion=motion,
    )


def _meaning(words: Words, word: str) -> str:
    return next(meaning for meaning, each in words.items() if word in each)


def vocabulary() -> Words:
    """The words that the model was taught by kind, synonyms too."""
    kinds: dict[str, Words] = {"thing": TAUGHT_SHAPES, "ground": GROUNDS, "motion": TAUGHT_MOTIONS}
    said = {kind: tuple(word for each in words.values() for word in each) for kind, words in kinds.items()}
    return {"colour": tuple(COLOURS), **said, "sky": (SKY,)}


# ---- Captions -------------------------------------------------------------------------------------------------------

TEMPLATES = (
    "{thing} over {ground}, {motion}{sky}",
    "{thing} {motion} over {ground}{sky}",
    "{thing} above {ground}, {motion}{sky}",
    "{ground}{sky}, {thing} {motion}",
    "{motion}, {thing} over {ground}{sky}",
)
SKIES = (" under a {} sky", ", {} sky", " and a {} sky", " in a {} sky")
LEADS = {"left": ("drifting ", "moving ", "going "), "up": ("moving ", "going "), "still": ("standing ", "")}
LEADS |= {"right": LEADS["left"], "down": LEADS["up"]}  # what may stand before a word of motion
PLURALS = ("hills", "mountains")
DEFINITE = 0.2  # share of the nouns with "the"
HELD_OUT = frozenset(  # (thing, ground): colours that no caption of the training names together
    {
        ("red", "blue"),
        ("orange", "purple"),
        ("yellow", "green"),
        ("green", "pink"),
        ("blue", "yellow"),
        ("purple", "white"),
        ("pink", "orange"),
        ("white", "red"),
    }
)


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A scene of which only the sky's colour may be open, with a pair of colours that is held out, or one that is not.

    The colour of the sky is another than that of the thing.
    """
    while True:
        pair = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
        sky = rng.choice(list(COLOURS)) if rng.random() < 0.5 else None
        if (pair in HELD_OUT) == held_out and pair[0] not in (pair[1], sky):
            shape, ground, motion = (rng.choice(list(words)) for words in (TAUGHT_SHAPES, GROUNDS, TAUGHT_MOTIONS))
            return Scene(pair[0], shape, pair[1], ground, sky, motion)


def opened(scene: Scene, rng: random.Random) -> Scene:
    """The scene with some attributes left open, but not all, so that a prompt need not name everything."""
    kept = rng.choice(("shape", "ground", "motion"))
    hidden = {name for name in scene.named if name != kept and rng.random() < 0.5}
    hidden |= {colour for noun, colour in (("shape", "object_colour"), ("ground", "ground_colour")) if noun in hidden}
    return replace(scene, **dict.fromkeys(hidden))


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the ways to say a scene, of which something must be named."""
    thing = _noun(SHAPES, scene.shape, scene.object_colour, rng)
    ground = _noun(GROUNDS, scene.ground, scene.ground_colour, rng)
    word = rng.choice(MOTIONS[scene.motion]) if scene.motion else ""
    motion = rng.choice(LEADS.get(word, ("",))) + word
    sky = rng.choice(SKIES).format(scene.sky_colour) if scene.sky_colour else ""
    if thing and ground and motion:
        return rng.choice(TEMPLATES).format(thing=thing, ground=ground, motion=motion, sky=sky)
    said = " over ".join(part for part in (thing, ground) if part) + sky + (f", {motion}" if motion else "")
    return said.strip(" ,")


def _noun(words: Words, meaning: str | None, colour: str | None, rng: random.Random) -> str:
    if meaning is None:
        return ""
    word = rng.choice(words[meaning])
    said = f"{colour} {word}" if colour else word
    if rng.random() < DEFINITE:
        return f"the {said}"
    if word in PLURALS:
        return said
    return f"an {said}" if said[0] in "aeiou" else f"a {said}"


def gibberish(rng: random.Random) -> str:
    """Words that mean nothing here."""
    words = range(rng.randint(1, 5))
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in words)
