"""Reads YAML files and dotted overrides into a validated `Config`."""

import dataclasses
import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixtral_jax.config import Config, NoCheckpointError, UserError
from mixtral_jax.config_checks import validate

CHECKPOINT_TOKENIZER = "checkpoint"  # value of `data.tokenizer`
RENAMED = {"kernels.products": "kernels.matmul"}  # keys of earlier versions, and what they are now
RENAMED_BACKENDS = {"blocked": "grouped_blocks"}
T = TypeVar("T")
Text = TypeVar("Text", str, str | None)
LISTS = {"sources": "[{name: mine, path: mine.txt}]", "losses": "[{name: sigmoid}]"}
NO_LIST = r"Invalid value assigned: \w+ is not a ListConfig|Invalid type assigned: \w+ is not a subclass"
PLAIN = {  # what OmegaConf says of a value, and how a user would say it
    r"Value '(.*)' could not be converted to Integer": r"'\1' is not a whole number",
    r"Value '(.*)' could not be converted to Float": r"'\1' is not a number",
    r"Value '(.*)' is not a valid bool.*": r"'\1' is neither true nor false",
    r"Cannot convert '\w+' to string: '(.*)'": r"a single text is needed, not \1",
    r"Incompatible value 'None'.*|.* is not Optional": "null is not a value of this key",
    r".*missing mandatory value.*": "a value is needed",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies dotted overrides and validates the result.

    Args:
        path: the YAML file; it says only what differs from the defaults.
        overrides: `section.key=value`, the value in YAML syntax.

    Returns:
        The validated configuration, `run_dir` filled in.

    Raises:
        UserError: unreadable file, unknown key, wrong type, missing value or contradiction.
    """
    config = parse_config(read_config_file(path), overrides, where=str(path), inherits=True)
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{Path(path).stem}")
    return config


def read_config_file(path: str | Path) -> str:
    """Reads the text of a YAML file; `UserError` when that cannot be."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the config {path}: {getattr(error, 'strerror', error)}; name a YAML file"
        ) from None


def parse_config(
    text: str,
    overrides: list[str] | None = None,
    *,
    where: str = "the config",
    saved: bool = False,
    inherits: bool = False,
) -> Config:
    """Builds a validated configuration; what is `saved`, perhaps by an earlier version, may hold old names.

    One that `inherits` and names no architecture takes it, and the tokenizer, from the checkpoint `init_from`.
    """
    below = _inherited if inherits else None
    config = parse_structured(Config, text, overrides, where=where, saved=saved, below=below)
    validate(config)
    data = {"tokenizer": home_expanded(config.data.tokenizer), "cache_dir": home_expanded(config.data.cache_dir)}
    sources = [
        dataclasses.replace(source, path=home_expanded(source.path), prepared=home_expanded(source.prepared))
        for source in config.data.sources
    ]
    run_dir, init_from = home_expanded(config.run_dir), home_expanded(config.init_from)
    return replace(config, run_dir=run_dir, init_from=init_from, data={**data, "sources": sources})


def home_expanded(path: Text) -> Text:
    """Puts the user's directory in the place of `~`, as a shell does where nothing is quoted.

    Raises:
        UserError: nobody knows that directory.
    """
    expanded = os.path.expanduser(path) if path else path
    if expanded and (expanded == "~" or expanded.startswith("~/")):
        raise UserError(
            f"{path} begins with your home directory, which is not known here: set HOME or "
            "data.cache_dir, or write it out"
        )
    return expanded


def user_path(text: str) -> Path:
    """Takes a path from the command line."""
    return Path(home_expanded(text))


def key_table() -> str:
    """Lists every key with its default, for `--help`."""
    lines = []
    for key, value in flatten(OmegaConf.to_container(_defaults(Config))).items():  # type: ignore[arg-type]
        shown = "(needed)" if value == MISSING else "null" if value is None else repr(value) if value == "" else value
        lines.append(f"  {key}={shown}")
    return "\n".join(lines)


def parse_structured(
    schema: type[T],
    text: str,
    overrides: list[str] | None = None,
    *,
    where: str,
    saved: bool = False,
    below: Callable[[Any], dict[str, Any]] | None = None,
) -> T:
    """Builds a frozen dataclass from YAML text and dotted overrides; `UserError` names what does not fit it.

    Args:
        schema: the dataclass; its fields are the keys.
        text: YAML that says only what differs from the defaults.
        overrides: `section.key=value`, the value in YAML syntax.
        where: what to call the text in an error.
        saved: whether the text may hold what has been renamed.
        below: what stands in the place of the defaults, given what text and overrides say.

    Returns:
        The configuration, every type checked, contradictions not.
    """
    if saved:
        _refuse_references(text, where)
    try:
        tree = _as_written(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where} is not valid YAML{line}: {problem}; fix the syntax") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{where} holds no sections: write lines such as 'train:' and below it, indented, 'steps: 100'")
    trees = [(where, _up_to_date(tree or {}) if saved else tree or {})]
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not an override: write key=value, such as train.steps=100")
        try:
            nested: Any = _as_written(value) if value else ""
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"the value of {key} is not YAML: {value!r}; quote it for the shell") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        trees.append((key, nested))

    merged = _merged(schema, trees)
    if below and (first := below(merged)):
        merged = _merged(schema, [(where, first), *trees])
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        sentence = _sentence(error, schema)
        inherit = ", or name a checkpoint in init_from" if below and sentence.startswith("model.") else ""
        raise UserError(f"{where}: {sentence}; add it to the file or the command line{inherit}") from None
    assert isinstance(config, schema)
    return config


def _up_to_date(tree: dict[str, Any]) -> dict[str, Any]:
    """Translates the sections of a configuration that an earlier version saved."""
    kernels = tree.get("kernels")
    if not isinstance(kernels, dict):
        return tree
    names = {old.partition(".")[2]: new.partition(".")[2] for old, new in RENAMED.items()}
    return tree | {
        "kernels": {names.get(name, name): RENAMED_BACKENDS.get(str(value), value) for name, value in kernels.items()}
    }


def _inherited(given: Any) -> dict[str, Any]:
    """The architecture of the checkpoint `init_from`, if the configuration has none of its own."""
    if not given.init_from or any(OmegaConf.is_missing(given.model, key) is False for key in ("d_model", "num_layers")):
        return {}
    root = Path(home_expanded(given.init_from))
    bundles = [bundle for place in (root, root / "checkpoints") for bundle in place.glob("[0-9]*") if bundle.is_dir()]
    newest = sorted((bundle for bundle in bundles if bundle.name.isdecimal()), key=lambda bundle: -int(bundle.name))
    for bundle in (root, *newest):
        if (bundle / "meta.json").is_file() and (bundle / "manifest.json").is_file():
            try:
                text = json.loads((bundle / "meta.json").read_text(encoding="utf-8"))["config"]
                _refuse_references(text, f"the configuration in {bundle}")
                model = _up_to_date(yaml.safe_load(text))["model"]
                return {"model": model, "data": {"tokenizer": CHECKPOINT_TOKENIZER}}
            except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
                continue  # damaged or half-copied: an older one is what will be restored
    begun = bool(newest) or (root / "meta.json").is_file()
    raise NoCheckpointError(f"init_from={given.init_from}", begun=begun)


def _refuse_references(text: str, where: str) -> None:
    """Raises `UserError` where a saved configuration is not all values: it could ask for the environment's secrets."""
    if "${" in text:
        raise UserError(f"{where} refers to other values (${{...}}), as none does that was saved here: write them out")


def _as_written(text: str) -> Any:
    """Reads YAML whose values stay the texts that they are: the type of a key decides what they mean, not their look.

    YAML alone takes 2024-01-01 for a date, 12:30:45 for a number, 010 for 8 and no for false.
    """

    def build(node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [build(entry) for entry in node.value]
        if not isinstance(node, yaml.MappingNode):
            return None if node.tag == "tag:yaml.org,2002:null" else node.value
        given: dict[Any, Any] = {}
        inherited: dict[Any, Any] = {}
        for name, value in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                for part in build(value) if isinstance(value, yaml.SequenceNode) else [build(value)]:
                    inherited = part | inherited
                continue
            key = int(name.value) if name.tag == "tag:yaml.org,2002:int" else str(name.value)
            if key in given:
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {key}", problem_mark=name.start_mark)
            given[key] = build(value)
        return inherited | given

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else build(node)


@functools.cache
def _defaults(schema: type) -> Any:
    return OmegaConf.structured(schema)


def _merged(schema: type, trees: list[tuple[str, dict[str, Any]]]) -> Any:
    """Lays trees over the defaults, one after the other; each has a name for an error."""
    merged: Any = _defaults(schema)
    for where, tree in trees:
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(tree))
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            sentence = _sentence(error, schema, where)
            raise UserError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None
    return merged


def _sentence(error: Exception, schema: type, where: str = "") -> str:
    """One line out of OmegaConf's report, in the words of a configuration: the whole key and the problem."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key")), "")
    head = re.sub(r" of type '\w+'", "", lines[0].rstrip("."))
    unknown = re.match(r"Key '(.*)' not in '(\w+)'", head)
    section = re.match(r"Merge error: \w+ is not a subclass of (\w+)Config", head)
    if key in RENAMED:
        head = f"this key is {RENAMED[key]} now: rename it"
    elif isinstance(error, TypeError) or re.match(NO_LIST, head) or (unknown and "[" in unknown[1]):
        name = re.match(rf".*?\b({'|'.join(LISTS)})\b|.*", key or where)
        assert name is not None
        head = f"a list is given as a whole, such as {name[0]}={LISTS.get(name[1], '[first, second]')}"
    elif section:
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", section[1]).lower()
        head = f"{words} is a section: give it keys with values"
    elif unknown:
        head = f"there is no key '{unknown[1]}'{head[unknown.end() :] or _remedy(unknown[1], unknown[2], schema)}"
    else:
        head = next((re.sub(said, plain, head) for said, plain in PLAIN.items() if re.match(said, head)), head)
    return head if not key or f"{where}.".startswith(f"{key}.") else f"{key}: {head}"


def _remedy(name: str, section: str, schema: type) -> str:
    """What to write in the place of a key that a section does not have."""
    keys = all_keys(schema)
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if close := difflib.get_close_matches(name, last, n=1):
        return f". Did you mean: '{last[close[0]]}'?"
    return f"; the keys are {', '.join(entry.name for entry in dataclasses.fields(_sections(schema)[section]))}"


def _sections(schema: type) -> dict[str, type]:
    """All dataclasses of a schema by their names, those that are entries of lists among them."""
    found = {schema.__name__: schema}
    for entry in dataclasses.fields(schema):
        for kind in (entry.type, *typing.get_args(entry.type)):
            found |= _sections(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
    return found


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Lists every dotted key of the configuration."""
    keys: list[str] = []
    for entry in dataclasses.fields(cls):
        if dataclasses.is_dataclass(entry.type):
            keys += all_keys(entry.type, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            keys.append(prefix + entry.name)
    return keys


def to_yaml(config: Config) -> str:
    """Writes the resolved configuration, every key, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(old: Config, new: Config) -> list[str]:
    """Lists the dotted keys in which two configurations differ."""
    return differing_keys(dataclasses.asdict(old), dataclasses.asdict(new))


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists the dotted keys in which two nested dictionaries differ."""
    left, right = flatten(old), flatten(new)
    return sorted(key for key in left | right if left.get(key) != right.get(key))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested dictionaries into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def replace(config: T, **changes: Any) -> T:
    """Copies a frozen config with changes: `replace(config, model={"d_ff": 64}, seed=1)`."""
    new = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **new)  # type: ignore[type-var]
