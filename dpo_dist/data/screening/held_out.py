"""Which prompts are held out: a function of the prompt's words and a seed, and of no other row.

So a prompt stands on one side only, whatever pairs it has, in whatever source; data that grow
move no prompt; a larger fraction keeps what a smaller one held out; and the choice is the same for
every tokenizer and chat template.
"""

import hashlib


def is_held_out(prompt_words: str, fraction: float, seed: int) -> bool:
    """Whether a prompt belongs to the `fraction` of prompts that is held out."""
    digest = hashlib.blake2b(prompt_words.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") < fraction * 2.0**64
