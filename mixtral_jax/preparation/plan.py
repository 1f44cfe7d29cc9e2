"""The plan of a preparation: which files make which shard, and a note of it that later runs must agree with.

Shards depend on the input alone, never on the number of workers: that makes the output the same for any number.
"""

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from fsspec.core import has_magic, url_to_fs

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import differing_keys
from mixtral_jax.data.cache_files import write_file
from mixtral_jax.data.files import list_files as listed_files
from mixtral_jax.data.files import other_kind
from mixtral_jax.preparation.config import PrepareConfig, PrepareSource, result_settings

ARCHIVES, PAGES, RECORDS, TABLES, TEXTS = (
    (".warc", ".wet"),
    (".html", ".htm", ".xhtml"),
    (".jsonl", ".ndjson", ".json"),
    (".parquet",),
    (".txt", ".md"),
)
COMPRESSIONS = (".gz", ".zst")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: str  # as fsspec opens it
    name: str  # below the source's directory; part of the documents' names
    size: int | None  # bytes; None where the store does not tell
    version: str  # time of modification, or whatever the store has of the kind


@dataclass(frozen=True)
class Shard:
    """Files of one source that one task reads."""

    source: str
    files: list[InputFile]


def file_kind(name: str) -> str:
    """Suffix that tells the format, without that of the compression; empty: unknown."""
    name = name.lower()
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    suffix = next((end for end in ARCHIVES + PAGES + RECORDS + TABLES + TEXTS if name.endswith(end)), "")
    return suffix


def list_files(source: PrepareSource, left_out: Counter[str] | None = None) -> list[InputFile]:
    """Lists the files of a source in a fixed order.

    Args:
        source: where they are.
        left_out: takes how many others were found there, by reason.

    Raises:
        UserError: nothing there, or a file of a kind that cannot be read.
    """
    where = f"source '{source.name}'"
    left_out = Counter() if left_out is None else left_out
    try:
        files = (_remote_files if "://" in source.path else _local_files)(source, left_out)
    except ImportError as error:
        raise UserError(f"{where}: {source.path} needs another package ({error}): install it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot find {source.path} ({type(error).__name__}): check the path") from None
    if not files:
        raise UserError(f"{where}: nothing to read at {source.path}: name a file, a directory or a glob")
    if other := next((file.path for file in files if not file_kind(file.path)), None):
        kinds = ", ".join(ARCHIVES + PAGES + RECORDS + TABLES + TEXTS)
        raise UserError(f"{where}: cannot read files such as {other}: the name must end in one of {kinds}, or .gz")
    return files


def _remote_files(source: PrepareSource, left_out: Counter[str]) -> list[InputFile]:
    system, path = url_to_fs(source.path)
    if has_magic(path):
        found = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
        folder = path[: min(path.find(mark) for mark in "*?[" if mark in path)].rpartition("/")[0]
    elif system.isdir(path):
        found, folder = system.find(path, detail=True), path.rstrip("/")
        left_out.update(other_kind(name) for name in found if not file_kind(name))
        found = {name: info for name, info in found.items() if file_kind(name)}
    else:
        found, folder = {path: system.info(path)}, path.rpartition("/")[0]
    local = isinstance(system, fsspec.get_filesystem_class("file"))  # as file://
    files = []
    for name, info in sorted(found.items()):
        if info.get("size") is None:  # a web server's list of files names them only
            info = system.info(name)
        version = next((str(info[key]) for key in ("mtime", "ETag", "LastModified") if info.get(key)), "")
        shown = name.removeprefix(folder).lstrip("/")
        files.append(InputFile(name if local else system.unstrip_protocol(name), shown, info.get("size"), version))
    return files


def _local_files(source: PrepareSource, left_out: Counter[str]) -> list[InputFile]:
    listing = listed_files(source.path, file_kind)
    left_out.update(listing.left_out)
    if listing.left_out:
        log.warning("source '%s': %d files; left out: %s", source.name, len(listing.files), listing.say())
    if not listing.files and not has_magic(source.path) and not Path(source.path).expanduser().exists():
        raise FileNotFoundError
    files = []
    for file in listing.files:
        status = file.stat()
        shown = os.fsencode(file.relative_to(listing.root)).decode("utf-8", "backslashreplace")
        files.append(InputFile(os.path.abspath(file), shown, status.st_size, str(status.st_mtime)))
    return files


def make_shards(config: PrepareConfig) -> tuple[list[Shard], dict[str, Counter[str]]]:
    """Deals the files of every source out to shards; small files share one, in their order.

    Returns:
        The shards, and by source how many files were left out for which reason.
    """
    limit = config.shard_megabytes << 20
    output = str(Path(config.output).resolve()) + "/"
    shards: list[Shard] = []
    left_out: dict[str, Counter[str]] = {source.name: Counter() for source in config.sources}
    for source in config.sources:
        group: list[InputFile] = []
        for file in list_files(source, left_out[source.name]):
            if file.path.startswith(output):
                raise UserError(f"source '{source.name}' holds the output directory {config.output}: move one of them")
            if group and sum(member.size or 0 for member in group) + (file.size or 0) > limit:
                shards.append(Shard(source.name, group))
                group = []
            group.append(file)
        shards.append(Shard(source.name, group))
    return shards, left_out


def settle_plan(config: PrepareConfig, shards: list[Shard], left_out: dict[str, Counter[str]]) -> None:
    """Notes settings and input in the output directory, or checks that they are those of the work done there.

    Raises:
        UserError: the directory holds other work.
    """
    file = plan_file(config)
    plan = json.loads(json.dumps({"settings": result_settings(config), "shards": [asdict(shard) for shard in shards]}))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(plan | {"left_out": left_out}, indent=1).encode())
        return
    old = json.loads(file.read_text())
    if changed := differing_keys(old["settings"], plan["settings"]):
        raise UserError(
            f"{config.output} was prepared with another {', '.join(changed)}: name another output or remove that one"
        )
    if old["shards"] != plan["shards"]:
        raise UserError(
            f"the input files changed since {config.output} was begun: name another output or remove that one"
        )


def load_shards(config: PrepareConfig) -> list[Shard]:
    """Reads the shards back from the plan."""
    plan = json.loads(plan_file(config).read_text())
    return [Shard(s["source"], [InputFile(**file) for file in s["files"]]) for s in plan["shards"]]


def load_left_out(config: PrepareConfig) -> dict[str, dict[str, int]]:
    """By source, how many files were left out when the plan was made, by reason."""
    return json.loads(plan_file(config).read_text())["left_out"]


def plan_file(config: PrepareConfig) -> Path:
    """Where the plan lies."""
    return Path(config.output) / "work" / "plan.json"
