"""The model card: a ``README.md`` beside an adapter that says what it is, what it belongs to and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import listing
from lightning_lora.io.atomic import replacing
from lightning_lora.io.fingerprint import base_name
from lightning_lora.io.notes import tell

CARD = "README.md"
_MARK = "<!-- Written by lightning_lora; without this line it is left alone when the adapter is saved again. -->"
_SHOWN = 12


def write_card(folder: Path, metadata: Mapping[str, Any], model: str, base: str | None) -> None:
    """Write the card of an adapter; one that somebody else has written stays, and that is said.

    Args:
        folder: The adapter folder.
        metadata: What the header of its weights says.
        model: The class of the model.
        base: Name or path the base was loaded from, where it is known.

    Raises:
        OSError: If it cannot be written.
    """
    path = folder / CARD
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        tell(f"{path} was not written by lightning_lora and is left as it is; delete it to have a model card")
        return
    with replacing(path) as temporary:
        temporary.write_text(card(folder.name, metadata, model, base), encoding="utf-8")


def card(name: str, metadata: Mapping[str, Any], model: str, base: str | None) -> str:
    """Return the text of a card, the same for the same adapter."""
    front = {"base_model": base, "library_name": "peft", "tags": ["lightning-lora", str(_one(metadata["method"]))]}
    rows = {
        "base": f"`{base}` (`{model}`)" if base else f"`{model}`",
        "base fingerprint": f"`{base_name(metadata)}`",
        "base in training": _one(metadata.get("quantization")),
        **{field: _one(metadata[field]) for field in ("method", "r", "alpha", "scaling", "start") if field in metadata},
        "targets": listing([f"`{each}`" for each in metadata["targets"]], _SHOWN),
        "trained whole": listing([f"`{each}`" for each in metadata["train"]], _SHOWN) or "nothing",
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["---", *lines, "---", _MARK, "", f"# {name}", "", "| | |", "| --- | --- |", *table, "", _USE])


def _one(value: Any) -> str:
    """A field of a description: one value, or the different ones of the layers."""
    return listing(sorted({str(each) for each in value.values()}), _SHOWN) if isinstance(value, dict) else str(value)


_USE = """## Use

With [lightning_lora](https://pypi.org/project/lightning-lora), into the base it was trained on, which is checked:

```python
from lightning_lora import load_adapter, merge

load_adapter(model, "path/to/this/folder")
merge(model)  # plain layers again, if it is not to be trained further
```

With PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

Into a model on disk, without its code: `lightning-lora merge --base BASE --adapter FOLDER --out MERGED`. Whether a copy
is sound: `lightning-lora verify FOLDER`.
"""
