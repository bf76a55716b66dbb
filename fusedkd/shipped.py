"""Files that come with the package: recipes, and what accelerate launches with."""

from __future__ import annotations

from pathlib import Path

# What each kind is, and where a checkout has it; an installed package has it in itself.
FOLDERS = {"recipes": "recipes", "configs": "examples/configs"}
HERE = Path(__file__).resolve().parent


def shipped(kind: str) -> dict[str, Path]:
    """The YAML files of one kind, "recipes" or "configs", by what ``--config`` calls them."""
    inside = HERE / kind
    folder = inside if inside.is_dir() else HERE.parent / FOLDERS[kind]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
