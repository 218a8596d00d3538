"""Words of the world: noun phrases, prompts, plans, and the facts behind indirect prompts."""

import itertools
from collections.abc import Iterator

import numpy as np

from t2i_rl.core.prompts import Prompt
from t2i_rl.shapes.scene import BASE_SHAPES, COLORS, LARGE_SHAPES, RELATIONS, SIZES, TEXTURES, Object, Scene, radii

NUMBERS = {2: "two", 3: "three", 4: "four"}
FRAMES = (
    "{}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "draw {}",
    "show {}",
    "{} on a light background",
    "just {}",
)
COLOR_FACTS = {
    "ripe lemons": "yellow",
    "fresh grass": "green",
    "a ripe tomato": "red",
    "a clear sky": "blue",
    "coal": "black",
    "ripe plums": "purple",
    "a carrot": "orange",
    "the go signal": "green",
    "the stop signal": "red",
    "a banana": "yellow",
}
NUMBER_FACTS = {
    "wheels on a bicycle": 2,
    "wheels on a tricycle": 3,
    "wheels on a car": 4,
    "legs of a cat": 4,
    "eyes of a cat": 2,
}
_GRID_ROWS, _GRID_COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


def plural(shape: str) -> str:
    """`cross` -> `crosses`, `circle` -> `circles`."""
    return shape + ("es" if shape.endswith("s") else "s")


def article(words: str) -> str:
    """The noun phrase with its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def clause(shape: str, count: int = 1, **attributes) -> dict:
    """One GenEval `include` clause; attributes that are None are left out."""
    return {"class": shape, "count": count, **{key: value for key, value in attributes.items() if value is not None}}


def _name(include: dict) -> str:
    words = [include.get(key) for key in ("size", "texture", "color")]
    return " ".join([word for word in words if word] + [include["class"]])


def _prompt(tag: str, body: str, include: list[dict], exclude: list[dict] | None = None, **extra) -> Iterator[Prompt]:
    meta = {"include": include, **({"exclude": exclude} if exclude else {}), **extra}
    for number, frame in enumerate(FRAMES):
        yield Prompt(id=f"{tag}/{number}/{body.replace(' ', '_')}", text=frame.format(body), tag=tag, meta=meta)


def enumerate_prompts(tag: str, size: int = 32) -> Iterator[Prompt]:
    """Every prompt of one task, in every phrasing.

    Metadata is GenEval's; in `position`, clause 0 is the reference.

    Raises:
        KeyError: no such task.
    """
    shapes = BASE_SHAPES if size == 32 else LARGE_SHAPES
    yield from _TASKS[tag](shapes)


def _single_object(shapes):
    for shape in shapes:
        yield from _prompt("single_object", article(shape), [clause(shape)])


def _two_object(shapes):
    for a, b in itertools.permutations(shapes, 2):
        yield from _prompt("two_object", f"{article(a)} and {article(b)}", [clause(a), clause(b)])


def _counting(shapes):
    for shape, count, color in itertools.product(shapes, NUMBERS, (None, *COLORS)):
        body = " ".join(filter(None, (NUMBERS[count], color, plural(shape))))
        exclude = [{"class": shape, "count": count + 1}]
        yield from _prompt("counting", body, [clause(shape, count, color=color)], exclude)


def _colors(shapes):
    for shape, color in itertools.product(shapes, COLORS):
        yield from _prompt("colors", article(f"{color} {shape}"), [clause(shape, color=color)])


def _pairs(shapes):
    objects = [clause(shape, color=color) for shape in shapes for color in COLORS]
    return itertools.permutations(objects, 2)


def _position(shapes):
    for (subject, reference), relation in itertools.product(_pairs(shapes), RELATIONS):
        if subject["class"] == reference["class"]:
            continue
        body = f"{article(_name(subject))} {relation} {article(_name(reference))}"
        yield from _prompt("position", body, [reference, {**subject, "position": [relation, 0]}])


def _color_attr(shapes):
    for a, b in _pairs(shapes):
        if a["class"] != b["class"] and a["color"] != b["color"]:
            yield from _prompt("color_attr", f"{article(_name(a))} and {article(_name(b))}", [a, b])


def _texture(shapes):
    for shape, texture, color in itertools.product(BASE_SHAPES, TEXTURES, (None, *COLORS)):
        include = clause(shape, texture=texture, color=color)
        yield from _prompt("texture", article(_name(include)), [include])


def _size(shapes):
    for (a, b), color in itertools.product(itertools.permutations(BASE_SHAPES, 2), (None, *COLORS)):
        large, small = clause(a, size="large", color=color), clause(b, size="small", color=color)
        yield from _prompt("size", f"{article(_name(large))} and {article(_name(small))}", [large, small])


def _colored(shape: str, color: str) -> dict:
    return clause(shape, color=color)


def _complex(shapes):
    colors = list(COLORS)
    for (a, b, c), (i, relation) in itertools.product(itertools.permutations(shapes, 3), enumerate(RELATIONS)):
        for j, k, m in itertools.product(range(len(colors)), (1, 3, 5), (2, 6)):
            three_colors = [colors[(j + shift) % len(colors)] for shift in (0, k, m + i)]
            if len(set(three_colors)) < 3:
                continue
            subject, reference, third = map(_colored, (a, b, c), three_colors)
            body = f"{article(_name(subject))} {relation} {article(_name(reference))} and {article(_name(third))}"
            yield from _prompt("complex", body, [reference, {**subject, "position": [relation, 0]}, third])


def _negation(shapes):
    pairs = itertools.permutations(shapes, 2)
    for (shape, absent), count, color in itertools.product(pairs, (1, 2, 3), (None, *COLORS)):
        words = " ".join(filter(None, (color, shape if count == 1 else plural(shape))))
        body = f"{article(words) if count == 1 else f'{NUMBERS[count]} {words}'} and no {absent}"
        yield from _prompt("negation", body, [clause(shape, count, color=color)], [{"class": absent, "count": 1}])


def _knowledge(shapes):
    for shape, (thing, color) in itertools.product(shapes, COLOR_FACTS.items()):
        body, rewrite = f"{article(shape)} in the color of {thing}", article(f"{color} {shape}")
        include = [clause(shape, color=color)]
        yield from _prompt("knowledge", body, include, rewrite=rewrite, explanation=f"{thing}: {color}")
    for shape, (thing, count) in itertools.product(shapes, NUMBER_FACTS.items()):
        body, rewrite = f"as many {plural(shape)} as {thing}", f"{NUMBERS[count]} {plural(shape)}"
        exclude = [{"class": shape, "count": count + 1}]
        include = [clause(shape, count)]
        yield from _prompt("knowledge", body, include, exclude, rewrite=rewrite, explanation=f"{thing}: {count}")


_TASKS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
    "texture": _texture,
    "size": _size,
    "complex": _complex,
    "negation": _negation,
    "knowledge": _knowledge,
}
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
EXTRA_TASKS = ("texture", "size", "complex", "negation", "knowledge")


def place_name(item: Object, size: int) -> str:
    """Where an object's centre lies on a 3x3 grid, as `top left` or `middle center`."""
    third = size / 3
    return f"{_GRID_ROWS[min(int(item.y // third), 2)]} {_GRID_COLUMNS[min(int(item.x // third), 2)]}"


def object_name(item: Object, size: int) -> str:
    """`red circle`; texture and size are named only where they are not the plain ones."""
    texture = None if item.texture == "solid" else item.texture
    return _name(clause(item.shape, texture=texture, color=item.color, size=size_word(item, size)))


def size_word(item: Object, size: int) -> str | None:
    """`small`, `large`, or None for the usual size of the canvas."""
    if size == 32:
        return None
    return next((word for word in SIZES if item.r in radii(size, word)), None)


def plan(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The semantic plan ("CoT") of a scene: how many objects, then each with attributes and place.

    With a generator the order of the objects and the phrasing vary; without one they are canonical
    (reading order).
    """
    items = sorted(scene.objects, key=lambda item: (item.y, item.x))
    inverted = False
    if rng is not None:
        items = [items[i] for i in rng.permutation(len(items))]
        inverted = rng.random() < 0.25
    count = "one object." if len(items) == 1 else f"{NUMBERS[len(items)]} objects."
    form = "at the {place} {name}." if inverted else "{name} at the {place}."
    names = [article(object_name(item, scene.size)) for item in items]
    places = [place_name(item, scene.size) for item in items]
    return " ".join([count, *(form.format(name=name, place=place) for name, place in zip(names, places, strict=True))])
