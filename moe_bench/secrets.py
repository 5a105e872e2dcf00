"""Which variables are secret: told by their names, the same for scripts, records, pages and W&B."""

from __future__ import annotations

import re

_ENDINGS = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)\Z")


def is_secret(name: str) -> bool:
    """True for WANDB_API_KEY, HF_TOKEN and the like, which are never written or shown; TOKENIZER_MODEL is none."""
    return bool(_ENDINGS.search(name.upper()))
