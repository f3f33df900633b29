"""Damages that a file can take, each a function (content, random generator, another file's content) -> content, or None: gone."""

import json

BRACKETS = b"[" * 100_000 + b"]" * 100_000


def flip(content, random, other):
    """One bit."""
    if not content:
        return b"\x01"
    place = random.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]


def cut(content, random, other):
    """The end is missing."""
    return content[: random.randrange(len(content))] if content else None


def empty(content, random, other):
    """Nothing is left."""
    return b""


def zeros(content, random, other):
    """A block of zeros, as a lost page of a disk."""
    if not content:
        return bytes(512)
    start = random.randrange(len(content))
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def swap(content, random, other):
    """Another file of the same folder tree in its place."""
    return other


def missing(content, random, other):
    """The file is not there."""
    return None


def more(content, random, other):
    """A line of rubbish at the end."""
    return content + random.randbytes(40) + b"\n"


def other_json(content, random, other):
    """JSON of another kind, or the same with a number changed."""
    choices = [b"[]", b"{}", b"null", b"7", b'{"step": "x"}', BRACKETS]
    try:
        value = json.loads(content)
    except ValueError:
        return random.choice(choices)
    changed = json.dumps(_changed(value, random)).encode()
    return random.choice([*choices, changed, changed, changed])


def _changed(value, random):
    """One number or text somewhere inside is another."""
    if isinstance(value, dict) and value:
        key = random.choice(sorted(value))
        return value | {key: _changed(value[key], random)}
    if isinstance(value, list) and value:
        place = random.randrange(len(value))
        return [*value[:place], _changed(value[place], random), *value[place + 1 :]]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return random.choice([value + 1, -value, value * 1.5, float("nan"), 10**12])
    return f"{value}x"


DAMAGES = {f.__name__: f for f in (flip, cut, empty, zeros, swap, missing, more, other_json)}
