"""What others have written is data: no code of theirs is run, and nothing of this process is told to them."""

import ast
import json
import runpy
from pathlib import Path

import pytest

from mixtral_jax.config import SourceConfig, UserError
from mixtral_jax.config_loading import load_config, parse_config
from mixtral_jax.data.sources import check_sources, iter_documents
from mixtral_jax.evaluation import loading
from mixtral_jax.runs.checkpoint import find_checkpoint
from mixtral_jax.verbs import VERBS
from tests.evaluation.checkpoint import make_run
from tests.imports import modules
from tests.small_run import write_config
from tests.weights.models import small
from tests.weights.synthetic import classic, write
from tests.weights.test_bad_sources import make_tokenizer

# By their last name: what runs code that it is given, or may where it is asked to.
RUN = {
    "eval",
    "exec",
    "__import__",
    "system",
    "popen",
    "read_pickle",
    "full_load",
    "unsafe_load",
    "load_all",
    "Unpickler",
}
UNPICKLE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}  # modules
# The reader that knows tensors alone, and writes them without objects.
MAY_NAME_PICKLES = {"weights.torch_files"}
ASKS_TO_RUN = {"trust_remote_code", "allow_pickle", "shell"}


def dangerous(path: Path, *, unpickles: bool = False) -> list[str]:
    """Lists what in a file may run code that comes from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = set[str]()
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            asked = {
                word.arg
                for word in node.keywords
                if not (isinstance(word.value, ast.Constant) and not word.value.value)
            }
            names = {name.split(".")[-1]} & RUN | asked & ASKS_TO_RUN
            if name in ("yaml.load", "yaml.compose"):
                names |= {name} - {name for word in node.keywords if ast.unparse(word.value) == "yaml.SafeLoader"}
        if isinstance(node, ast.Import) and not unpickles:
            names = {alias.name.split(".")[0] for alias in node.names} & UNPICKLE
        if isinstance(node, ast.ImportFrom) and not unpickles:
            names = {str(node.module).split(".")[0]} & UNPICKLE
        found += sorted(names)
    return found


@pytest.mark.parametrize("name", modules())
def test_nothing_runs_what_it_reads(name):
    assert not dangerous(modules()[name], unpickles=name in MAY_NAME_PICKLES)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import pickle\npickle.load(file)", ["pickle"]),
        ("from torch import load", ["torch"]),
        ("np.load(file, allow_pickle=True)", ["allow_pickle"]),
        ("load_dataset(name, trust_remote_code=trusted)", ["trust_remote_code"]),
        ("load_dataset(name, trust_remote_code=False)", []),
        ("yaml.load(text, Loader=yaml.Loader)", ["yaml.load"]),
        ("yaml.load(text, Loader=yaml.SafeLoader)", []),
        ("eval(text)\nos.system(text)", ["eval", "system"]),
    ],
)
def test_a_planted_danger_is_seen(tmp_path, text, names):
    (tmp_path / "planted.py").write_text(text)
    assert dangerous(tmp_path / "planted.py") == names


def leave_code(directory: Path, *names: str) -> Path:
    """Writes Python files that leave a mark where they are run; returns the mark."""
    mark = directory / "was-run"
    for name in names:
        (directory / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    return mark


def test_a_script_that_lies_in_a_source_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "someone" / "something"
    folder.mkdir(parents=True)
    (folder / "text.jsonl").write_text('{"text": "one"}\n')
    mark = leave_code(folder, "something", "text", "__init__", "conftest")
    assert list(iter_documents(SourceConfig(name="mine", path=str(folder)))) == ["one"]
    # A hub's library looks for a folder first; that of a hub's own scripts is the same of its calls.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: None)
    hub = SourceConfig(name="far", hub="someone/something")
    check_sources([hub])
    with pytest.raises(UserError, match=r"cannot read 'someone/something' from the data hub \(.*scripts are no longer"):
        list(iter_documents(hub))
    assert not mark.exists()
    runpy.run_path(str(folder / "something.py"))
    assert mark.exists()  # which is what would have been seen


def test_code_in_a_release_is_not_run(tmp_path):
    model, release = small(), tmp_path / "release"
    write(release, "hf", classic(model, "bfloat16"), model, "bfloat16")
    (release / "tokenizer.model").write_bytes(make_tokenizer(model.vocab_size))
    words = {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", "tokenization_x.Fast"]}}
    (release / "tokenizer_config.json").write_text(json.dumps(words))
    (release / "generation_config.json").write_text(json.dumps({"custom_generate": "generate"}))
    config = json.loads((release / "config.json").read_text())
    code = ("modeling_x", "configuration_x", "tokenization_x", "generate", "__init__", "sitecustomize")
    mark = leave_code(release, *code)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "configuration_x.Config"}
    (release / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json has auto_map=.*, which is not a Mixtral: no such feature"):
        VERBS["import"]([str(release), str(tmp_path / "import")])
    del config["auto_map"]
    (release / "config.json").write_text(json.dumps(config))
    VERBS["import"]([str(release), str(tmp_path / "import")])
    VERBS["export"]([str(tmp_path / "import"), str(tmp_path / "export"), "--format", "hf"])
    assert not mark.exists()
    assert not list((tmp_path / "export").glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "export").glob("*.json"))


def test_no_program_is_run_that_a_checkpoint_points_to(tmp_path, monkeypatch):
    """Compiled programs lie in directories of caches; that of a checkpoint's configuration may come with it."""
    run, places = make_run(tmp_path), []
    assert f"cache_dir: {tmp_path}/cache" in find_checkpoint(run)[0].read_meta(2)["config"]
    monkeypatch.setattr(loading, "keep_compiled", places.append)
    loading.load_model(str(run), [])
    loading.load_model(str(run), ["data.cache_dir=mine"])
    assert places == ["", "mine"]


def test_a_configuration_of_a_checkpoint_cannot_ask_for_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = write_config(tmp_path).read_text()
    asking = text.replace("name: words", "name: '${oc.env:SECRET}'")
    assert parse_config(asking).data.sources[0].name == "hunter2"  # a person may ask
    with pytest.raises(
        UserError, match=r"the checkpoint's refers to other values \(\$\{\.\.\.\}\), .*: write them out"
    ):
        parse_config(asking, where="the checkpoint's", saved=True)
    bundle = tmp_path / "from" / "checkpoints" / "1"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").touch()
    (bundle / "meta.json").write_text(json.dumps({"config": "model: {num_layers: '${oc.env:SECRET}'}"}))
    (tmp_path / "more.yaml").write_text(f"init_from: {tmp_path / 'from'}\n")
    with pytest.raises(UserError, match=r"the configuration in .*/1 refers to other values"):
        load_config(tmp_path / "more.yaml")
