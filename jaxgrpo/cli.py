"""The command line: `jaxgrpo COMMAND`, such as inspect, train, eval and export; see `--help`.

A command imports what it needs when it runs, so that `jaxgrpo --help` and a mistyped config key
answer at once. A user's mistake (any `ValueError` subclass of our four packages, a missing file,
the hub out of reach) is one line, `error: ...`, and exit code 2; `JAXGRPO_TRACEBACK=1` shows where
it was raised. SIGTERM saves and ends `sft` and `train` with exit code 75, see `preemption`.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jaxgrpo
from jaxgrpo import config, preemption, strict_yaml

_GOES_ON = "the same command goes on from the last checkpoint, if there is one yet"
_AFTER_INTERRUPTION = {
    "inspect": "no report was written",
    "sft": _GOES_ON,
    "train": _GOES_ON,
    "select": "what was sampled is kept: the same command goes on",
    "eval": "no scores were written",
    "convert": "nothing was converted",
    "pack": "nothing was packed",
    "export": "nothing was exported",
    "plan": "nothing was planned",
    "rescore": "nothing was scored",
    "verify": "the verdict is missing",
}
_PACKAGES = ("jaxgrpo", "models", "rewards", "data")

# Of `convert`: what each kind reads, and its options besides --videos.
_KINDS = {
    "temporal-r1": ("the paper's JSON or JSONL files, or YAML files of datasets", ("root", "seed")),
    "video-r1": ("Video-R1's JSON files", ()),
    "charades-sta": ("charades_sta_train.txt, charades_sta_test.txt", ("durations",)),
    "activitynet-captions": ("train.json, val_1.json, val_2.json", ()),
    "next-gqa": ("val.csv, test.csv", ("spans", "paths")),
    "mvbench": ("MVBench's JSON files, one a task", ()),
    "video-mme": ("Video-MME's rows as JSON or JSONL", ()),
    "tempcompass": ("TempCompass's multi-choice.json", ()),
}
_KIND_OPTIONS: dict[str, dict[str, Any]] = {
    "root": {
        "default": ".",
        "help": "the coming data.root, where the YAML's data_folder is absolute (default: .)",
    },
    "seed": {"type": int, "default": 0, "help": "of sampling_strategy random (default: 0)"},
    "durations": {
        "action": "append",
        "metavar": "FILE",
        "help": "Charades_v1_train.csv or Charades_v1_test.csv; may be given several times",
    },
    "spans": {
        "action": "append",
        "metavar": "FILE",
        "help": "gsub_val.json or gsub_test.json; may be given several times",
    },
    "paths": {"action": "append", "metavar": "FILE", "help": "map_vid_vidorID.json"},
}


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The `key=value` options of `jaxgrpo export`."""

    dtype: Literal["source", "bfloat16", "float32"] = "source"
    step: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code of the process."""
    options = _parse(arguments)
    # transformers would advise to install PyTorch; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names from files may be no valid Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_packages()
        return _run(options)
    except preemption.Preempted as end:
        print(f"\n{end}", file=sys.stderr)
        return preemption.EXIT_CODE
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_AFTER_INTERRUPTION[options.command]}", file=sys.stderr)
        return _failed(130)
    except Exception as error:
        message, code = user_mistake(error), 2
        if message is None:
            message, code = _lost_process(error), 1
        if message is None or os.environ.get("JAXGRPO_TRACEBACK") == "1":
            _failed(code)
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        return _failed(code)


def _lost_process(error: Exception) -> str | None:
    if "jax" not in sys.modules:  # a mistake that was found before, like one in the config
        return None
    from jaxgrpo.processes import lost_process

    return lost_process(error)


def _failed(code: int) -> int:
    """The exit code of a command that failed; of several processes none waits for long."""
    if "jax" in sys.modules:
        from jaxgrpo.processes import end_soon

        end_soon(code)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand behind options, where argparse expects none."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if unknown := [word for word in others if word.startswith("-") or "overrides" not in options]:
        known = f"see jaxgrpo {options.command} -h"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {known}")
    if others:
        options.overrides += others
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxgrpo", description="GRPO for video LLMs in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxgrpo {jaxgrpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in (
        ("inspect", "before renting anything: the items, prompts and frames a run would train on"),
        ("sft", "supervised fine-tuning: the cold start, or a baseline"),
        ("select", "sample every training item, and keep those whose rewards disagree"),
        ("train", "GRPO, the main job: evaluates, trains, evaluates again"),
        ("eval", "greedy evaluation of a model directory or a run"),
        ("pack", "write the manifests and their clips as ArrayRecord shards"),
        ("rescore", "what another reward would make of a run's stored completions"),
        ("plan", "what training will need on a TPU slice or GPUs; neither is needed for it"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        if name == "inspect":
            command.add_argument(
                "--out", metavar="DIR", help="the folder to write (default: run_dir + -inspect)"
            )
            command.add_argument(
                "--show",
                action="append",
                default=[],
                metavar="ID",
                help="show this item too; may be given several times",
            )
            command.add_argument("--json", action="store_true", help="figures for programs")
        if name == "plan":
            command.add_argument("--topology", required=True, help="such as v5e:8x8 or h100:8")
            command.add_argument("--slices", type=int, default=1, help="TPU slices of that shape")
            command.add_argument("--json", action="store_true", help="figures for programs")
        if name == "rescore":
            command.add_argument("run", metavar="RUN", help="a run directory, or an evaluation's")
            command.add_argument("--json", action="store_true", help="figures for programs")
        command.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/*.yaml")
        if name == "pack":
            command.add_argument("out", metavar="OUT", help="the folder to make")
            command.add_argument(
                "--without-clips",
                action="store_true",
                help="pack the rows and what probing found; the clips stay in data.root",
            )
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="values that replace the file's, such as run_dir=runs/1 optim.learning_rate=2e-6",
        )
    summary = "write a Hugging Face directory for transformers and vLLM"
    command = commands.add_parser("export", help=summary, description=summary)
    command.add_argument("source", metavar="SOURCE", help="a run directory or a model directory")
    command.add_argument("out", metavar="OUT", help="the directory to make")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dtype: source (the default: each weight's own type), bfloat16 or float32; step: of "
        "the run's checkpoint (the default: the newest)",
    )
    _add_verify(commands)
    _add_convert(commands)
    return parser


def _add_verify(commands: Any) -> None:
    """The parser of `verify`."""
    summary = "whether jaxgrpo computes with a model what transformers does"
    command = commands.add_parser("verify", help=summary, description=summary)
    command.add_argument("model", metavar="MODEL", help="a model directory or a hub id")
    command.add_argument(
        "video", metavar="VIDEO", nargs="?", help="what both sides look at (default: made for it)"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what both sides compute in (default: float32)",
    )
    command.add_argument(
        "--no-logits",
        action="store_true",
        help="only the files, the processor and the tokenizer: no model is loaded",
    )
    command.add_argument("--json", action="store_true", help="figures for programs")


def _add_convert(commands: Any) -> None:
    """The parser of `convert`, with one of its own for each kind."""
    summary = "turn published annotation files into a manifest"
    kinds = commands.add_parser("convert", help=summary, description=summary).add_subparsers(
        dest="kind", required=True, metavar="KIND"
    )
    for kind, (files, names) in _KINDS.items():
        command = kinds.add_parser(kind, help=files, description=f"{kind}: {files}")
        command.add_argument("inputs", nargs="+", metavar="IN", help=files)
        command.add_argument("out", metavar="OUT", help="the manifest to write, OUT.jsonl")
        command.add_argument(
            "--videos",
            metavar="PATTERN",
            help="a video's path below data.root, {id} being what the file calls it, such as "
            "'charades/{id}.mp4'",
        )
        for name in names:
            command.add_argument(f"--{name}", **_KIND_OPTIONS[name])


def _run(options: argparse.Namespace) -> int:
    """Runs the command; its exit code."""
    if options.command == "export":
        raw: dict[str, Any] = {}
        for assignment in options.overrides:
            strict_yaml.override(raw, assignment)
        chosen = strict_yaml.build(ExportOptions, raw, "jaxgrpo export")
        from jaxgrpo import export

        export.main(options.source, options.out, chosen.dtype, chosen.step)
        return 0
    if options.command == "convert":
        from jaxgrpo import convert

        convert.main(options.kind, options.inputs, options.out, vars(options))
        return 0
    if options.command == "verify":
        from jaxgrpo import verify

        return verify.main(
            options.model,
            options.video,
            dtype=options.dtype,
            logits=not options.no_logits,
            as_json=options.json,
        )
    settings = config.load(options.config, options.overrides)
    if options.command == "plan":
        from jaxgrpo import topology

        # Before a device is touched: the simulated ones are made then.
        topology.before_jax_starts(topology.find(options.topology, options.slices))
        from jaxgrpo import plan

        return plan.main(settings, options.topology, options.slices, options.json)
    if options.command == "inspect":
        from jaxgrpo.inspection import main as inspection

        return inspection.main(settings, options.out, options.json, options.show)
    if options.command == "rescore":
        from jaxgrpo import rescore

        rescore.main(options.run, settings, options.json)
        return 0
    if options.command == "pack":
        from jaxgrpo import pack

        pack.main(settings, options.out, not options.without_clips)
        return 0
    if options.command == "eval":
        from jaxgrpo import evaluate

        evaluate.main(settings)
        return 0
    if options.command == "select":
        with preemption.watching("SIGTERM: what was sampled is kept; the same command goes on"):
            from jaxgrpo import select

            select.main(settings)
        return 0
    with preemption.watching():
        if options.command == "sft":
            from jaxgrpo import sft

            sft.main(settings)
        else:
            from jaxgrpo import train

            train.main(settings)
    return 0


def check_packages() -> None:
    """Makes sure that `import models`, `rewards` and `data` find the folders beside this one.

    Raises:
      ConfigError: one is missing, or a stray module of that name is found first.
    """
    root = Path(__file__).resolve().parent.parent
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise config.ConfigError(
                f"the package {name!r} is missing: jaxgrpo runs from its clone, so run "
                "`pip install -e .` there, in an environment of its own"
            )
        places = spec.submodule_search_locations  # None for a module that is one file
        found = Path(next(iter(places)) if places else str(spec.origin)).resolve()
        if found != root / name:
            raise config.ConfigError(
                f"`import {name}` finds {found}, not {root / name}: rename or remove it, or start "
                "jaxgrpo from another folder and in an environment of its own"
            )


def user_mistake(error: Exception) -> str | None:
    """What to tell the user about `error`, or None if it is not a mistake of theirs."""
    package = type(error).__module__.partition(".")[0]
    if package == "huggingface_hub":
        return f"{error}\nWithout the hub, give model.path as a local directory."
    if isinstance(error, ValueError) and package in _PACKAGES:
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, FileNotFoundError) else None


if __name__ == "__main__":
    sys.exit(main())
