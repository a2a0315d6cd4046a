"""The command line: what starts, what is told, what the exit code is."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from data.records import ManifestError
from data.video import VideoError
from jaxgrpo import cli
from jaxgrpo.config import Config, ConfigError
from models.qwen2_5_vl.config import ModelConfigError
from models.qwen2_5_vl.weights import WeightError

CLONE = Path(cli.__file__).parents[1]
CONFIG = "run_dir: runs/a\nmodel: {path: m}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, main: Any) -> None:
    """Puts a module with this `main` where `from jaxgrpo import NAME` finds it."""
    module = types.ModuleType(f"jaxgrpo.{name}")
    module.__dict__["main"] = main
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(f"jaxgrpo.{name}", module, raising=False)


@pytest.mark.parametrize(
    ("command", "module"), [("train", "train"), ("sft", "sft"), ("eval", "evaluate")]
)
def test_a_command_runs_its_module_with_the_overridden_config(
    command: str, module: str, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    stand_in(monkeypatch, module, seen.append)
    assert cli.main([command, config_file, "seed=3", "mesh.data=-1"]) == 0
    assert [c.seed for c in seen] == [3]


def test_options_may_stand_between_overrides(
    config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, str, bool]] = []
    stand_in(
        monkeypatch, "rescore", lambda run, c, json: seen.append((run, c.seed, c.data.train, json))
    )
    assert cli.main(["rescore", "runs/a", config_file, "seed=3", "--json", "data.train=b"]) == 0
    assert seen == [("runs/a", 3, "b", True)]
    with pytest.raises(SystemExit):
        cli.main(["rescore", "runs/a", config_file, "--jsno", "seed=3"])
    assert "unrecognized arguments: --jsno; see jaxgrpo rescore -h" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["source", "float32", "bfloat16"])
def test_export_takes_a_source_a_place_a_type_and_a_step(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, str, int | None]] = []
    stand_in(monkeypatch, "export", lambda *arguments: seen.append(arguments))
    assert cli.main(["export", "runs/a", "out", f"dtype={dtype}", "step=40"]) == 0
    assert seen == [("runs/a", "out", dtype, 40)]
    cli.main(["export", "runs/a", "out"])
    assert seen[1] == ("runs/a", "out", "source", None)


def test_verify_takes_a_model_a_video_and_its_options_and_gives_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def main(model: str, video: str | None, **options: Any) -> int:
        seen.append((model, video, options))
        return 1

    stand_in(monkeypatch, "verify", main)
    assert cli.main(["verify", "m"]) == 1
    cli.main(["verify", "m", "a.mp4", "--dtype", "bfloat16", "--no-logits", "--json"])
    defaults = {"dtype": "float32", "logits": True, "as_json": False}
    chosen = {"dtype": "bfloat16", "logits": False, "as_json": True}
    assert seen == [("m", None, defaults), ("m", "a.mp4", chosen)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["export", "a", "b", "dtype=float16"], "expected source or bfloat16 or float32"),
        (["export", "a", "b", "dtyp=float32"], "unknown key dtyp (did you mean 'dtype'?)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert expected in told
    assert "Traceback" not in told


def test_a_mistyped_key_is_told_with_the_nearest(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", config_file, "optim.learning_rat=1"]) == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("what and how"),
        ManifestError("what and how"),
        ModelConfigError("what and how"),
        WeightError("what and how"),
        FileNotFoundError("what and how"),
    ],
)
def test_the_packages_own_errors_are_the_users_mistakes(error: Exception) -> None:
    assert cli.user_mistake(error) == "what and how"


def test_a_video_that_cannot_be_read_is_the_users_mistake() -> None:
    assert "cut short" in str(cli.user_mistake(VideoError("truncated", "a.mp4 is cut short")))


def test_a_file_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "gone.mp4").read_bytes()
    assert cli.user_mistake(caught.value) == f"{tmp_path / 'gone.mp4'}: No such file or directory"


def test_a_hub_out_of_reach_is_told_with_the_mend() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    told = cli.user_mistake(OfflineModeIsEnabled("cannot reach the hub"))
    assert told is not None
    assert "model.path as a local directory" in told


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), OSError("x")])
def test_a_bug_keeps_its_traceback(
    error: Exception, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(config: Config) -> None:
        raise error

    stand_in(monkeypatch, "train", main)
    with pytest.raises(type(error)):
        cli.main(["train", config_file])


def test_the_traceback_of_a_mistake_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXGRPO_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("command", "module", "told"),
    [
        ("train", "train", "the same command goes on"),
        ("sft", "sft", "the same command goes on"),
        ("eval", "evaluate", "no scores were written"),
        ("export", "export", "nothing was exported"),
        ("inspect", "inspection.main", "no report was written"),
    ],
)
def test_ctrl_c_says_what_is_left(
    command: str,
    module: str,
    told: str,
    config_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(*arguments: Any) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, module, main)
    out = [str(tmp_path / "out")] if command == "export" else []
    assert cli.main([command, config_file, *out]) == 130
    assert capsys.readouterr().err.startswith(f"\ninterrupted; {told}")


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process with nothing but `path` put in front of sys.path."""
    prelude = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n"
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_and_mistakes_need_no_jax() -> None:
    code = (
        "from jaxgrpo import cli\n"
        "assert cli.main(['train', 'nowhere.yaml']) == 2\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('jax', 'flax', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = run_python(code, CLONE)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("stray", ["models.py", "data/__init__.py", "rewards/other.py"])
def test_a_stray_module_that_shadows_a_package_is_named(tmp_path: Path, stray: str) -> None:
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_text("")
    code = "from jaxgrpo import cli; sys.exit(cli.main(['train', 'nowhere.yaml']))"
    done = run_python(code, tmp_path, CLONE)
    if stray == "rewards/other.py":  # a folder without __init__.py shadows nothing
        assert "nowhere.yaml does not exist" in done.stderr
    else:
        name = Path(stray).parts[0]
        assert done.returncode == 2
        assert f"finds {(tmp_path / name).resolve()}, not {CLONE}" in done.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_PACKAGES", ("jaxgrpo", "modelz"))
    with pytest.raises(ConfigError, match="'modelz' is missing.*pip install -e"):
        cli.check_packages()
