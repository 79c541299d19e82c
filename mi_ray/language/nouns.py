"""Singular and plural of English nouns, by rules and a list of irregular nouns."""

import re

_IRREGULAR = {
    **{"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese"},
    **{"foot": "feet", "tooth": "teeth", "ox": "oxen", "leaf": "leaves", "loaf": "loaves", "shelf": "shelves"},
    **{"half": "halves", "calf": "calves", "wolf": "wolves", "elf": "elves", "scarf": "scarves", "thief": "thieves"},
    **{"knife": "knives", "wife": "wives", "life": "lives", "bus": "buses", "gas": "gases", "lens": "lenses"},
    **{"cactus": "cacti", "octopus": "octopuses", "walrus": "walruses", "iris": "irises", "canvas": "canvases"},
    **{"snowman": "snowmen", "policeman": "policemen", "policewoman": "policewomen", "fireman": "firemen"},
    **{"potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "mango": "mangoes", "quiz": "quizzes"},
    **{"axe": "axes", "ache": "aches", "headache": "headaches", "movie": "movies", "cookie": "cookies"},
    **{"pie": "pies", "tie": "ties", "zombie": "zombies", "smoothie": "smoothies", "brownie": "brownies"},
    **{"selfie": "selfies", "hoodie": "hoodies", "collie": "collies"},
}
_SINGULAR = {plural: singular for singular, plural in _IRREGULAR.items()}
_THE_SAME = "sheep fish goldfish deer shrimp moose salmon trout squid bison swine aircraft spacecraft series species"
_PAIRS = """
scissors pants trousers shorts jeans glasses sunglasses goggles headphones binoculars pliers tweezers clothes pajamas
tights leggings cattle
"""
_UNCHANGED, _ONLY_PLURAL = frozenset(_THE_SAME.split()), frozenset(_PAIRS.split())


def is_plural(noun: str) -> bool:
    """Whether the last word of the noun can follow a number above one."""
    word = _last(noun)
    if word in _UNCHANGED or word in _ONLY_PLURAL or word in _SINGULAR:
        return True
    return word.endswith("s") and word not in _IRREGULAR and not word.endswith(("ss", "us", "is"))


def is_singular(noun: str) -> bool:
    """Whether the last word of the noun can follow `a` or `one`."""
    return _last(noun) in _UNCHANGED or not is_plural(noun)


def plural(noun: str) -> str:
    """The plural of a singular noun. Only the last word changes."""
    word = _last(noun)
    if word in _UNCHANGED or word in _ONLY_PLURAL:
        return noun
    if word in _IRREGULAR:
        return _ending(noun, word, _IRREGULAR[word])
    if re.search("[^aeiou]y$", word):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")


def singular(noun: str) -> str | None:
    """The singular of a plural noun; None if it has no singular, such as scissors."""
    word = _last(noun)
    if word in _ONLY_PLURAL:
        return None
    if word in _UNCHANGED:
        return noun
    if word in _SINGULAR:
        return _ending(noun, word, _SINGULAR[word])
    if re.search("[^aeiou]ies$", word) and len(word) > 4:
        return noun[:-3] + "y"
    return noun[:-2] if re.search("(ss|x|zz|ch|sh)es$", word) else noun[:-1]


def _last(noun: str) -> str:
    return re.split(r"[\s-]", noun.lower())[-1]


def _ending(noun: str, word: str, other: str) -> str:
    return noun[: len(noun) - len(word)] + other
