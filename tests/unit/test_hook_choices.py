"""``hooks``, ``trackers`` and ``profile`` in a config: what is refused before anything starts, what a plan makes of
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from dstrain.api.planning import check_code_here
from dstrain.cli.config import mistakes_in
from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config, override, read_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.launch.environment import default_environment
from dstrain.planning import hook_specs
from dstrain.planning.checks import refuse
from dstrain.planning.hook_specs import HookSpec, check_trackers_here, variables_of
from dstrain.planning.plan import Plan
from dstrain.plugins import PluginError, check_plugin, load_plugin
from tests.support.plans import plan

WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"trackers": ["tensorbord"]}, ["unknown tracker 'tensorbord'", "did you mean tensorboard?"]),
    ({"trackers": ["comet"]}, ["unknown tracker 'comet'", "known trackers: tensorboard, wandb, mlflow"]),
    ({"trackers": "wandb"}, ["must be a list"]),
    ({"trackers": ["wandb", {"name": "wandb"}]}, ["wandb is listed twice"]),
    ({"trackers": [{"project": "p"}]}, ["each entry must be a name"]),
    ({"trackers": [{"name": "wandb", "projct": "p"}]}, ["unknown option 'projct'", "did you mean project?"]),
    (
        {"trackers": [{"name": "tensorboard", "dir": "d"}]},
        ["unknown option 'dir' of tensorboard", "has none"],
    ),
    ({"trackers": [{"name": "wandb", "project": 3}]}, ["project of wandb must be a text"]),
    ({"trackers": [{"name": "wandb", "tags": "a"}]}, ["tags of wandb must be a list of texts"]),
    ({"trackers": [{"name": "wandb", "mode": "of"}]}, ["mode of wandb must be online or offline"]),
    ({"trackers": [{"name": "wandb", "api_key": "x"}]}, ["api_key of wandb", "credential", "environment"]),
    ({"trackers": [{"name": "mlflow", "uri": "http://me:pw@host"}]}, ["uri of mlflow", "credential"]),
    ({"hooks": ["my_module"]}, ["'my_module' must have the form my_module:MyHook"]),
    ({"hooks": ["../evil:Hook"]}, ["must have the form"]),
    (
        {"hooks": [{"name": "m:H", "option": {}}]},
        ["unknown key 'option'", "did you mean"],
    ),
    ({"hooks": [{"name": "m:H", "options": []}]}, ["options of m:H must be a mapping of KEY: VALUE"]),
    ({"hooks": [{"name": "m:H", "optional": "yes"}]}, ["optional of m:H must be true or false"]),
    ({"hooks": [3]}, ["each entry must be a name"]),
    ({"profile": {"steps": [3]}}, ["profile = {'steps': [3]}: steps: must have 2 items"]),
    ({"profile": {"steps": [4, 3]}}, ["first step (4) must not be after the last (3)"]),
    ({"profile": {"steps": [0, 3]}}, ["steps:", "greater than or equal to 1"]),
    ({"profile": {"steps": [1, 3], "rank": [0]}}, ["rank:", "not permitted"]),
    ({"profile": {"steps": [1, 3], "ranks": []}}, ["ranks: must have 1 items"]),
    ({"profile": True}, ["profile = True"]),
]


@pytest.mark.parametrize(("values", "words"), WRONG, ids=[json.dumps(values) for values, _ in WRONG])
def test_what_is_wrong_is_refused_with_its_line(
    values: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n" + json.dumps(values)[1:-1])
    with pytest.raises(DstrainError) as caught:
        load_config(config_file=str(file))
    assert caught.value.where == f"{file}:2" and caught.value.exit_code == 2
    assert not [word for word in words if word not in caught.value.message], caught.value
    [name] = values
    with pytest.raises(ValidationError):
        RunConfig(**values)
    assert caught.value.hint and name in (caught.value.hint + caught.value.message)


RIGHT: list[dict[str, Any]] = [
    {"trackers": []},
    {"trackers": ["tensorboard", "wandb", "mlflow"]},
    {"trackers": [{"name": "wandb", "project": "p", "entity": "e", "group": "g", "tags": ["a"], "mode": "offline"}]},
    {"trackers": [{"name": "mlflow", "uri": "http://host:5000", "experiment": "e"}]},
    {"hooks": ["a.b_c.d:Hook", {"name": "m:H"}, {"name": "m:H", "options": {"x": [1, {"y": None}]}, "optional": True}]},
    {"profile": {"steps": [1, 1]}},
    {"profile": {"steps": [1, 10], "ranks": [0, 3]}},
]  # fmt: skip


@pytest.mark.parametrize("values", RIGHT, ids=json.dumps)
def test_what_is_right_is_so_for_editors_and_in_a_run_folder(values: dict[str, Any], tmp_path: Path) -> None:
    jsonschema.validate(values, json_schema())
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    resolved = load_config(config_file=str(file))
    kept = tmp_path / "config.yaml"
    kept.write_text(resolved.to_yaml())
    assert read_config(kept).config == resolved.config
    assert override(resolved, {}).config == resolved.config


@pytest.mark.parametrize(
    "values",
    [values for values, _ in WRONG if "twice" not in _[0] and "be after" not in _[0]],
    ids=json.dumps,
)
def test_editors_see_most_of_what_is_wrong(values: dict[str, Any]) -> None:
    if values == {"trackers": [{"name": "mlflow", "uri": "http://me:pw@host"}]}:
        jsonschema.validate(values, json_schema())  # but for a password, which is a text too
        return
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json_schema())


def test_profiled_steps_and_ranks_are_those_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 12\nprofile:\n  steps: [10, 13]\n")
    [mistake] = mistakes_in(str(file), None, ())
    assert "profile covers steps 10 to 13, but the run has only 12" in mistake.message
    assert mistake.where == f"{file}:3" and mistake.hint and "[9, 12]" in mistake.hint
    with pytest.raises(DstrainError, match="profile names rank 2, but the ranks are 0 to 1"):
        plan(settings=("profile={steps: [1, 2], ranks: [0, 2]}",), pipeline=2, data_parallel=1)
    assert plan(settings=("profile={steps: [1, 2], ranks: [1]}",), pipeline=2, data_parallel=1).hooks


def test_a_plan_holds_its_hooks_and_says_what_is_not_covered() -> None:
    settings = (
        "trackers=[tensorboard, {name: wandb, project: p}]",
        "profile={steps: [1, 2]}",
        "hooks=['m:One', {name: 'm:Two', options: {x: 1}, optional: true}]",
    )
    made = plan(settings=settings)
    assert made.hooks == (
        HookSpec("dstrain.hooks.tensorboard_tracker:TensorBoardTracker"),
        HookSpec("dstrain.hooks.wandb_tracker:WandbTracker", {"project": "p"}),
        HookSpec("dstrain.hooks.profiler:Profiler", {"steps": [1, 2], "ranks": [0]}),
        HookSpec("m:One"),
        HookSpec("m:Two", {"x": 1}, True),
    )
    assert made.not_covered == ("hook m:One", "hook m:Two")
    assert made.origins["profile"] == "--set profile"
    assert Plan.from_record(json.loads(json.dumps(made.to_record()))) == made
    own = plan(settings=settings[:2])
    assert not own.not_covered and own.identity == made.identity == plan().identity


def test_a_plan_of_an_earlier_dstrain_has_no_hooks() -> None:
    record = plan().to_record()
    for key in ("hooks", "not_covered"):
        del record[key]
    for key in ("hooks", "trackers", "profile", "code_dirs"):
        del record["config"][key]
    earlier = Plan.from_record(json.loads(json.dumps(record)))
    assert earlier.hooks == () == earlier.not_covered and earlier.run_config.trackers == []


def test_every_hook_of_dstrain_s_own_is_there() -> None:
    for name in (*hook_specs._TRACKERS.values(), hook_specs._PROFILER):
        check_plugin(name, (), what="hook", where="")


def test_modules_are_looked_for_beside_the_config_and_where_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, configs = tmp_path / "started", tmp_path / "configs"
    for folder in (started, configs):
        folder.mkdir()
        (folder / f"in_{folder.name}.py").write_text("class H: pass\nraise SystemExit('planning runs it')\n")
    monkeypatch.chdir(started)
    (configs / "run.yaml").write_text("hooks: ['in_started:H', 'in_configs:H']\n")
    resolved = load_config(config_file="../configs/run.yaml")
    assert resolved.config.code_dirs == [str(started / "../configs"), str(started)]
    check_code_here(resolved)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(resolved.to_yaml())
    monkeypatch.chdir(elsewhere)
    check_code_here(read_config(elsewhere / "config.yaml"))
    named = load_config(config_file="config.yaml", settings=("code_dirs=[../started]",))
    assert named.config.code_dirs == [str(elsewhere / "../started")]
    with pytest.raises(PluginError, match="no module 'in_configs'"):
        check_code_here(named)
    assert load_config().config.code_dirs is None, "no path of a machine where nothing is from outside"


@pytest.mark.parametrize(
    ("name", "content", "words", "hint"),
    [
        ("hok:MyHook", "class MyHook: pass", "there is no module 'hok'", "did you mean hook?"),
        ("hook.deep:MyHook", "class MyHook: pass", "there is no module 'hook.deep'", "code_dirs: [FOLDER]"),
        ("hook:MyHok", "class MyHook: pass", "hook.py has no 'MyHok'", "did you mean MyHook?"),
        ("hook:Zzz", "import os\nfrom a import b as c\nX: int = 1\n", "has no 'Zzz'", "it has: X, c, os"),
        ("hook:Zzz", "_private = 1", "has no 'Zzz'", "it has no names"),
        ("hook.py:MyHook", "class MyHook: pass", "there is no module 'hook.py'", "hook:MyHook, without .py"),
        ("json:MyHook", "", "has no 'MyHook'", "json.py: it is hidden by the module of the same name"),
        ("hook:MyHook", "class MyHook:\n  def", "hook.py:2 can't be read: ", "fix that file"),
        ("hook:MyHook", "\0", "can't be read", "fix that file"),
        ("a_package.hook:MyHook", "", "there is no module 'a_package.hook'", "code_dirs"),
    ],
)  # fmt: skip
def test_code_that_is_not_there_is_refused_with_a_way_out(
    name: str, content: str, words: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "hook.py").write_text(content)
    (tmp_path / "json.py").touch()
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("raise SystemExit('a package is imported')")
    with pytest.raises(PluginError) as caught:
        check_plugin(name, [str(tmp_path)], what="hook", where="run.yaml:3")
    assert words in caught.value.message and f"hook {name}" in caught.value.message
    assert caught.value.where == "run.yaml:3" and hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        "class MyHook: pass",
        "def MyHook(**options): ...",
        "from elsewhere import MyHook",
        "from elsewhere import Other as MyHook",
        "from elsewhere import *",
        "def __getattr__(name): ...",
        "MyHook = make()",
        "MyHook: type = make()",
        "try:\n  from a import MyHook\nexcept ImportError:\n  pass",
        "try:\n  pass\nexcept ImportError:\n  class MyHook: pass",
        "if True:\n  pass\nelse:\n  class MyHook: pass",
        "with a:\n  for x in y:\n    def MyHook(): pass",
    ],
)
def test_code_that_may_be_there_is_not_refused(content: str, tmp_path: Path) -> None:
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('a package is imported')")
    (package / "hook.py").write_text(content)
    check_plugin("a_package.hook:MyHook", [str(tmp_path)], what="hook", where="")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("raise ValueError('at import')", "can't be imported: ValueError: at import"),
        ("import a_module_that_is_missing", "No module named 'a_module_that_is_missing'"),
        ("X = 1", "has no 'MyHook'"),
        (None, "has no module 'loaded_hook_3'"),
    ],
)
def test_code_that_can_t_be_loaded_says_why(
    content: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = ["raise", "import", "X", None].index(content and content.split()[0])
    monkeypatch.setattr("sys.path", [])
    if content is not None:
        (tmp_path / f"loaded_hook_{number}.py").write_text(content)
    with pytest.raises(PluginError, match=words) as caught:
        load_plugin(f"loaded_hook_{number}:MyHook", [str(tmp_path)], what="hook")
    assert caught.value.exit_code == 1 and f"hook loaded_hook_{number}:MyHook" in caught.value.message


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wandb").mkdir()  # what W&B leaves behind in a folder is no package
    monkeypatch.setattr("importlib.util.find_spec", _finds_none)
    for tracker in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(DstrainError, match=f"the tracker {tracker} needs") as caught:
            check_trackers_here(load_config(flags={"trackers": [tracker]}))
        assert caught.value.where == "--tracker"
        assert f"pip install 'dstrain[{tracker}]'" in str(caught.value.hint)


def _finds_none(name: str) -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None) if name == "wandb" else None


def test_a_password_in_mlflow_s_address_is_refused() -> None:
    resolved = load_config(flags={"trackers": ["mlflow"]})
    with pytest.raises(DstrainError, match="MLFLOW_TRACKING_URI contains a user name or password") as caught:
        check_trackers_here(resolved, {"MLFLOW_TRACKING_URI": "https://me:pw@host/path"})
    assert "pw" not in caught.value.message and "MLFLOW_TRACKING_USERNAME" in str(caught.value.hint)
    check_trackers_here(resolved, {"MLFLOW_TRACKING_URI": "https://host/path@x"})


def test_what_trackers_read_travels_to_the_ranks_and_no_secret_does() -> None:
    config = load_config(flags={"trackers": ["wandb", "mlflow"]}).config
    shell = {
        "WANDB_API_KEY": "s", "WANDB_MODE": "offline", "MLFLOW_TRACKING_TOKEN": "s", "MLFLOW_TRACKING_PASSWORD": "s",
        "MLFLOW_TRACKING_URI": "http://host", "WANDB_PROJECT": "p",
    }  # fmt: skip
    carried = default_environment("cpu", 1, False, carried=variables_of(config), environ=shell)
    assert {name: value for name, value in carried.items() if name in shell} == {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "http://host", "WANDB_PROJECT": "p",
    }  # fmt: skip
    assert not default_environment("cpu", 1, False, environ=shell).keys() & shell.keys()


def test_flags_name_trackers_one_by_one() -> None:
    resolved = load_config(flags={"trackers": ["tensorboard", "wandb"]})
    refuse(resolved)
    assert str(resolved.origin("trackers")) == "--tracker"
