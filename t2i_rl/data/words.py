"""Words for made prompts: everyday objects, colours, textures, shapes; articles and plurals.

The objects are 79 of COCO's 80 under GenEval's names, and more.
"""


def _words(text: str) -> tuple[str, ...]:
    """Words of one or several parts, by the commas between them."""
    return tuple(" ".join(word.split()) for word in text.split(","))


OBJECTS = _words("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
    bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining
    table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
    microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush
""")
MORE_OBJECTS = _words("""
    lamp, candle, mirror, pillow, basket, bucket, ladder, hammer, guitar, violin, drum,
    camera, helmet, sock, hat, scarf, shirt, jacket, shoe, necklace, watch, coin, envelope,
    globe, telescope, teapot, plate, jar, desk, stool, shelf, rug, door, fence, statue,
    fountain, leaf, mushroom
""")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEXTURES = ("metallic", "wooden", "glass", "plastic", "leather", "rubber", "fluffy", "woollen", "paper", "stone")
SHAPES = (
    *("round", "square", "oval", "triangular", "rectangular"),
    *("conical", "spherical", "cubic", "cylindrical", "star-shaped"),
)
NUMBERS = {2: "two", 3: "three", 4: "four"}

_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "broccoli": "broccoli",
    "scissors": "scissors",
    "shelf": "shelves",
    "leaf": "leaves",
    "computer mouse": "computer mice",
    "bus": "buses",
    "tv": "tvs",
}


def with_article(words: str) -> str:
    """`a car`, `an orange`, and `scissors` as they are."""
    if words.split()[-1] == "scissors":
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(noun: str) -> str:
    """More than one of it."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "sh", "ch", "x", "z")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"
