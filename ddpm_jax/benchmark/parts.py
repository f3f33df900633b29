"""The part of the network that an instruction of a compiled program belongs to, by the name that JAX gave it."""

import re

# Parts by what an instruction's place has in it; the first that fits is taken.
PARTS = {
    "attention": r"_attn_\d+/",
    "normalisation": r"/norm(\d|_out)?/",
    "convolutions": r"/(conv\w*|down_\d+_downsample|up_\d+_upsample)/",
    "1x1 and dense": r"/(nin_shortcut|temb_\w+|label_embedding)/",
    "rest of the network": r"\bUNet\b",
}


def part_of(place: str) -> str:
    """The part of the network that an instruction belongs to, and its direction."""
    found = next((part for part, pattern in PARTS.items() if re.search(pattern, place)), "outside the network")
    return f"{found}, backward" if "transpose(" in place and found != "outside the network" else found
