"""A small lexicon of English words with known alternatives: the common words for colour, texture, place and number.

The lexicon is small on purpose. The attribute words are those of T2I-CompBench's colour, shape and texture prompts
(Huang et al., NeurIPS 2023) and similar words. A word that is in no list is never changed.
"""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": (
        *("red", "orange", "yellow", "green", "cyan", "turquoise", "blue", "purple", "pink", "brown", "black", "white"),
        *("gray", "grey", "gold", "golden", "silver", "beige", "maroon", "navy", "teal", "violet"),
    ),
    "shape": (
        *("round", "circular", "square", "rectangular", "triangular", "oval", "cubic", "cubical", "spherical"),
        *("conical", "cylindrical", "pyramidal", "oblong", "teardrop", "diamond", "pentagonal", "hexagonal"),
    ),
    "texture": ("solid", "striped", "dotted", "spotted", "checkered", "plaid", "floral"),
    "material": (
        *("wooden", "metallic", "metal", "leather", "rubber", "plastic", "fabric", "glass", "stone", "ceramic"),
        *("paper", "fluffy", "furry", "woolen", "velvet"),
    ),
    "size": ("tiny", "small", "little", "big", "large", "huge", "giant"),
    "height": ("tall", "short", "low"),
    "length": ("long", "short"),
    "age": ("old", "young", "new", "ancient", "modern"),
    "state": ("open", "closed", "empty", "full", "wet", "dry", "clean", "dirty", "broken"),
    "light": ("bright", "dark", "sunny", "cloudy", "rainy", "snowy"),
}
SYNONYMS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            ("gray", "grey", "silver"),
            ("gold", "golden", "yellow"),
            ("cyan", "turquoise", "teal"),
            ("blue", "navy"),
            ("purple", "violet"),
            ("round", "circular", "spherical", "oval"),
            ("square", "cubic", "cubical", "rectangular"),
            ("triangular", "pyramidal", "conical"),
            ("oblong", "rectangular", "oval"),
            ("dotted", "spotted"),
            ("checkered", "plaid"),
            ("metallic", "metal"),
            ("fluffy", "furry", "woolen", "velvet", "fabric"),
            ("tiny", "small", "little"),
            ("big", "large", "huge", "giant"),
            ("short", "low"),
            ("old", "ancient"),
            ("new", "modern", "young"),
            ("dark", "cloudy", "rainy"),
            ("bright", "sunny"),
            ("wet", "rainy"),
        ),
    )
)
CONTRARIES: dict[str, str] = {  # words whose only safe alternative is the opposite: others may be true at the same time
    **{"open": "closed", "closed": "open", "empty": "full", "full": "empty", "wet": "dry", "dry": "wet"},
    **{"clean": "dirty", "dirty": "clean", "broken": "clean", "bright": "dark", "dark": "bright"},
}
NUMBERS: dict[str, int] = {
    word: number
    for number, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), start=1
    )
}
RELATIONS: dict[str, str] = {  # directed relations and their opposites, longest phrases first
    "on the left side of": "on the right side of",
    "on the right side of": "on the left side of",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "on the left of": "on the right of",
    "on the right of": "on the left of",
    "at the top of": "at the bottom of",
    "at the bottom of": "at the top of",
    "on the top of": "on the bottom of",
    "on the bottom of": "on the top of",
    "in front of": "behind",
    "on top of": "underneath",
    "left of": "right of",
    "right of": "left of",
    "underneath": "on top of",
    "beneath": "above",
    "below": "above",
    "under": "above",
    "above": "below",
    "behind": "in front of",
    "inside": "outside",
    "outside": "inside",
}
NEARNESS: tuple[str, ...] = (  # relations without an opposite
    *("on the side of", "on side of", "adjacent to", "close to", "next to", "near", "beside"),
)
_DETERMINERS = "a an the this that these those some its his her their my your our another each every"
_BOUNDARIES = """
and or but with without in on at of to from by for near next beside between against over under above below behind inside
outside into onto through across around along while as is are was were has have had being be there who which that where
when front top bottom wearing holding sitting standing riding
"""
DETERMINERS = frozenset(_DETERMINERS.split())
BOUNDARIES = frozenset(_BOUNDARIES.split())  # words that end a noun phrase

# Symmetric verbs: subject and object can be exchanged without a change of meaning.
MUTUAL = frozenset(
    ("facing", "meeting", "touching", "kissing", "hugging", "fighting", "adjoining", "resembling", "including")
)

# Irregular past forms, without -ed or -ing. Captions use them after their subject.
_VERBS = """
lay sat stood hung rose fell swam spun grew shone cast lit flew ran slid sank shook drove rode stuck swept crept hid
held wore ate drank slept leapt lept blew broke kept made met read sang sought struck swung threw told took wound wrote
sped led left found felt bent built burnt shot
"""
_PRONOUNS = "its his her their he she it they him them who whose himself herself itself themselves"
_PICTURES = "photo photograph picture image painting drawing sketch illustration rendering render"
VERBS = frozenset(_VERBS.split())
PRONOUNS = frozenset(_PRONOUNS.split())
PICTURES = frozenset(_PICTURES.split())
SHADES = frozenset(("dark", "bright", "light", "pale", "deep"))  # before a colour word they belong to the colour
