"""What earlier versions called keys and values of the configuration."""

from typing import Any

RENAMED = {"kernels.products": "kernels.matmul"}
RENAMED_BACKENDS = {"blocked": "grouped_blocks"}


def up_to_date(tree: dict[str, Any]) -> dict[str, Any]:
    """Translates the sections of a configuration that an earlier version saved."""
    kernels = tree.get("kernels")
    if not isinstance(kernels, dict):
        return tree
    names = {old.partition(".")[2]: new.partition(".")[2] for old, new in RENAMED.items()}
    return tree | {
        "kernels": {names.get(name, name): RENAMED_BACKENDS.get(str(value), value) for name, value in kernels.items()}
    }
