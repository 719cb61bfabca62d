"""The command line, `merge-callback`. It asks the library and prints; it knows nothing of how.

Results go to stdout, as tables on a terminal, as tab-separated lines elsewhere, or with --json as
one JSON value. What is said on the way goes to stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_callback.errors import CorruptVersion, MergeError, MergeRefused, VerificationError
from merge_callback.foreign import parse_json
from merge_callback.terminal import (
    plain_logs,
    print_json,
    print_markdown,
    print_table,
    say,
)

if TYPE_CHECKING:
    from merge_callback.versions import Version

OK, FAILED, DIFFERS, INTERRUPTED = 0, 1, 3, 130  # 2 is argparse's
_DATA = (
    "JSON Lines, a JSON array, CSV, Parquet, a directory of datasets, or an id on the Hub: rows of "
    "text, messages, conversations, prompt and completion, instruction and output, or input_ids, "
    "2048 tokens of each at most"
)
_EPILOG = """\
exit codes: 0 done; 1 refused or failed, with the reason on stderr; 2 wrong usage; 3 files or models
are not what they should be; 130 interrupted. Every command takes --json.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code.

    Args:
        arguments: None: those of the process.
    """
    given = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)  # for those who write code
    logging.getLogger("merge_callback").setLevel(logging.INFO)
    with plain_logs():
        return _run(given)


def _run(given: argparse.Namespace) -> int:
    try:
        code: int = given.command(given)
        return code
    except (CorruptVersion, VerificationError) as error:
        return _fail(error, DIFFERS)
    except MergeError as error:
        return _fail(error, FAILED)
    except OSError as error:
        return _fail(error, FAILED)
    except RecursionError:
        return _fail("what was read nests too deep to be shown", FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _fail(error: object, code: int) -> int:
    if isinstance(error, MergeRefused) and len(error.problems) == 1:
        error = error.problems[0]
    say(f"merge-callback: {error}")
    return code


def _merge(given: argparse.Namespace) -> int:
    from merge_callback.checkpoints import (
        base_of,
        load_adapter,
        load_processor,
        tokens_of,
        training_of,
    )
    from merge_callback.data import Data
    from merge_callback.export import check_merge, export
    from merge_callback.options import MergeOptions
    from merge_callback.rows import read_batches
    from merge_callback.store import MergeStore

    options = MergeOptions(
        save_method=given.save_method,
        rounding=given.rounding,
        rounding_minutes=given.rounding_minutes,
        verify=given.verify,
        verify_tokens=given.verify_tokens,
        min_gain_kept=given.min_gain_kept,
        max_kl=given.max_kl,
        dtype=given.dtype,
        max_shard_size=given.max_shard_size,
        progress=sys.stderr.isatty() and not given.json,
    )
    limits = given.min_gain_kept is not None or given.max_kl is not None
    if given.data is None and (options.needs_data or limits):
        what = "a limit of what is lost" if limits else f"--rounding {given.rounding}"
        raise MergeRefused([f"{what} needs --data"])
    training = training_of(given.checkpoint)
    base = base_of(given.checkpoint, given.base)
    trust = given.trust_remote_code
    processor = load_processor(given.checkpoint, base, trust_remote_code=trust)
    enough = options.calibration_tokens + options.verify_tokens
    rows = list(read_batches(given.data, processor, enough)) if given.data else None
    model = load_adapter(given.checkpoint, base, _loading(given), tokens_of(processor))
    store = MergeStore(given.output_dir)
    plan = check_merge(model, store, options)
    name = given.name or ("merged" if training.step is None else f"step-{training.step:08}")
    result = export(
        plan, store, options, name=name, processing_class=processor, training=training,
        data=Data(training=rows),
    )  # fmt: skip
    if given.json:
        paths = {method: str(path) for method, path in result.paths.items()}
        print_json({"version": result.version, "paths": paths, "manifest": result.manifest})
    else:
        print_table([{"method": m, "directory": str(p)} for m, p in result.paths.items()])
    return OK


def _loading(given: argparse.Namespace) -> Any:
    """How a base is to be loaded, as far as options say it."""
    from merge_callback.bases import Loading

    names = {field.name for field in fields(Loading)}
    said = {name: value for name, value in vars(given).items() if name in names}
    return Loading(**said | {"config": dict(given.config)})


def _list(given: argparse.Namespace) -> int:
    from merge_callback.store import push_marker

    rows = []
    versions = _store(given.root).versions()
    if not versions:
        there = _found_below(given.root, "*/*/merge_manifest.json")
        say(f"no versions in {given.root}{there}")
    for version in versions:
        manifest = version.manifest
        found = _first_model(manifest)
        rows.append(
            {
                "version": version.name,
                "kind": manifest["kind"],
                "created": manifest["created"],
                "step": manifest["step"],
                "methods": ",".join(manifest.get("save_methods", ())),
                "rounding": manifest.get("rounding"),
                "gain_kept": found.get("gain_kept"),
                "kl": found.get("kl"),
                "bytes": sum(record.size for record in version.records().values()),
                "push": "pending" if push_marker(version.path).exists() else None,
                "run": version.run,
            }
        )
    if given.json:
        print_json(rows)
    else:
        print_table([row | {"created": row["created"][:16]} for row in rows])
    return OK


def _show(given: argparse.Namespace) -> int:
    from merge_callback.versions import version_at

    version = version_at(given.version)
    manifest, files = version.manifest, version.records()
    # A rescued adapter has no report, and one may have failed.
    if given.json:
        has_one = "merge_report.json" in files
        print_json(_report_of(version) if has_one else manifest)
    elif "merge_report.md" in files:
        print_markdown(_text_of(version, "merge_report.md"))
    else:
        print_table([{key: manifest[key] for key in ("kind", "created", "step")}])
    return OK


def _verify(given: argparse.Namespace) -> int:
    from merge_callback.store import MergeStore
    from merge_callback.versions import version_at

    version = version_at(given.version)
    MergeStore(version.path.parent).verify(version)
    told = {"version": version.name, "files": len(version.records()), "sound": True}
    if given.against:
        from merge_callback.checkpoints import load_adapter
        from merge_callback.manifest import adapter_hash
        from merge_callback.options import MergeOptions
        from merge_callback.planning import make_plan

        loading = replace(_loading(given), load_in_4bit=False, as_trained=False)
        model = load_adapter(given.against, given.base, loading)
        found = adapter_hash(make_plan(model, MergeOptions(save_method="lora")))
        if found != version.manifest.get("adapter_sha256"):
            raise CorruptVersion(f"{version.path} was not made of the adapter in {given.against}")
        told["adapter"] = "same"
    print_json(told) if given.json else print_table([told])
    return OK


def _compare(given: argparse.Namespace) -> int:
    from dataclasses import asdict

    from merge_callback.checkpoints import load_processor
    from merge_callback.comparing import compare
    from merge_callback.rows import read_batches

    for directory in (given.a, given.b):
        if not Path(directory, "config.json").is_file():
            there = _found_below(directory, "*/config.json")
            raise MergeRefused(
                [f"{directory} has no config.json: it is no directory of a model{there}"]
            )
    trust = given.trust_remote_code
    processor = load_processor(given.a, given.b, trust_remote_code=trust)
    batches = list(read_batches(given.data, processor))
    found = asdict(compare(given.a, given.b, batches, trust))
    if given.json:
        print_json(found)
    else:
        print_table([{"figure": name, "value": value} for name, value in found.items()])
    if given.max_kl is None:
        return OK
    near = found["finite"] and found["kl"] is not None and found["kl"] <= given.max_kl
    return OK if near else DIFFERS


def _push(given: argparse.Namespace) -> int:
    from merge_callback.uploads import push_version

    done = push_version(
        given.version,
        given.repo_id,
        private=not given.public,
        revision=given.revision,
        progress=sys.stderr.isatty() and not given.json,
    )
    told = {"repo_id": done.repo_id, "tag": done.tag, "commit": done.commit, "url": done.url}
    print_json(told) if given.json else print_table([told])
    return OK


def _prune(given: argparse.Namespace) -> int:
    store = _store(given.root)
    runs: dict[str | None, list[Version]] = {}
    for version in store.versions():
        if version.manifest["kind"] == "merged":
            runs.setdefault(version.run, []).append(version)
    rows = []
    for run, versions in runs.items():
        best = frozenset(v.manifest["best_step"] for v in versions) - {None}
        names = {v.name: v.identity for v in versions}
        if given.yes:
            found = store.prune(given.keep, names=names, keep_steps=best)
        else:
            found = [v.name for v in store.prunable(given.keep, names=names, keep_steps=best)]
        rows += [{"version": name, "removed": given.yes, "run": run} for name in found]
    print_json(rows) if given.json else print_table(rows)
    if rows and not given.yes:
        say("nothing was removed; --yes removes them")
    return OK


def _doctor(given: argparse.Namespace) -> int:
    from merge_callback.doctor import examine

    rows = list(examine())
    print_json(rows) if given.json else print_table(rows)
    return OK


def _report_of(version: Any) -> Any:
    try:
        return parse_json(_text_of(version, "merge_report.json"))
    except ValueError as error:
        raise CorruptVersion(f"{version.path / 'merge_report.json'} is no JSON: {error}") from error


def _text_of(version: Any, name: str) -> str:
    """A file of a version, whose manifest may be that of anybody."""
    try:
        text: str = version.read(name)
        return text
    except ValueError as error:
        raise CorruptVersion(f"{version.path / name} is no text: {error}") from error


def _store(root: str | Path) -> Any:
    from merge_callback.store import MergeStore

    if not Path(root).is_dir():
        raise MergeRefused([f"{root} is no directory"])
    return MergeStore(root)


def _found_below(directory: str, pattern: str) -> str:
    """Where below a directory there is what was looked for."""
    place = Path(directory)
    names = sorted({path.relative_to(place).parts[0] for path in place.glob(pattern)})
    return f"; look into {', '.join(names)}" if names else ""


def _first_model(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    models = (manifest.get("verification") or {}).get("models") or {}
    return next(iter(models.values()), {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="merge-callback",
        description="Merge LoRA adapters into their base, and look after what was merged.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_own_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print one JSON value")
        added.set_defaults(command=run)
        return added

    merge = command("merge", _merge, "merge a saved adapter into its base")
    merge.add_argument("checkpoint", type=_path, help="directory with an adapter_config.json")
    _add_quantisation(merge)
    merge.add_argument(
        "--output-dir", type=_path, default="merged", help="where versions go [merged]"
    )
    merge.add_argument("--name", help="of the version [step-<step>, or merged]")
    methods = ("merged_4bit", "merged_16bit", "lora")
    merge.add_argument(
        "--save-method", action="append", choices=methods, help="may be repeated [as the base is]"
    )
    roundings = ("auto", "tuned", "calibrated", "stochastic", "nearest")
    merge.add_argument("--rounding", default="auto", choices=roundings, help="[auto]")
    merge.add_argument("--rounding-minutes", type=float, metavar="MINUTES")
    merge.add_argument(
        "--data", type=_path, metavar="DATA", help=_DATA + ", to round and verify with"
    )
    merge.add_argument("--no-verify", dest="verify", action="store_false")
    merge.add_argument("--verify-tokens", type=int, default=8192, metavar="N", help="[8192]")
    merge.add_argument("--min-gain-kept", type=float, metavar="SHARE")
    merge.add_argument("--max-kl", type=float, metavar="NATS")
    merge.add_argument("--dtype", help="of merged_16bit [as the base has it]")
    merge.add_argument("--max-shard-size", default="5GB", help="[5GB]")
    _add_loading(merge)

    listed = command("list", _list, "list versions, the oldest first")
    listed.add_argument("root", type=_path, help="directory of versions, e.g. <output_dir>/_merged")

    show = command("show", _show, "show the report of a version")
    show.add_argument("version", type=_path, help="directory of a version")

    verify = command("verify", _verify, "compare the files of a version with their checksums")
    verify.add_argument("version", type=_path, help="directory of a version")
    verify.add_argument(
        "--against", type=_path, metavar="CHECKPOINT", help="is it made of this adapter?"
    )
    _add_loading(verify)

    compared = command("compare", _compare, "compare what two models say")
    compared.add_argument("a", type=_path, help="directory of a model")
    compared.add_argument("b", type=_path, help="directory of another")
    compared.add_argument("--data", type=_path, metavar="DATA", required=True, help=_DATA)
    compared.add_argument("--max-kl", type=float, metavar="NATS", help="exit with 3 above it")
    _add_trust(compared)

    push = command("push", _push, "push a version to the Hub, or finish a push that was cut off")
    push.add_argument("version", type=_path, help="directory of a version")
    push.add_argument("repo_id", nargs="?", help="[where a push that was cut off was going to]")
    push.add_argument("--public", action="store_true", help="if the repository has to be made")
    push.add_argument("--revision", default="main", help="branch with the newest version [main]")

    prune = command(
        "prune", _prune, "remove old versions, never a best step's; without --yes, list them"
    )
    prune.add_argument("root", type=_path, help="directory of versions")
    newest = "the newest N of each run"
    prune.add_argument("--keep", type=_at_least_1, required=True, metavar="N", help=newest)
    prune.add_argument("--yes", action="store_true", help="remove them")

    command("doctor", _doctor, "tell what matters to a merge on this machine")
    return parser


def _add_quantisation(command: Any) -> None:
    """How a 16-bit base is quantised, where the checkpoint does not say it."""
    command.add_argument(
        "--load-in-4bit",
        action=argparse.BooleanOptionalAction,
        help="quantise a 16-bit base, or leave it as it is [as in training; else it is left]",
    )
    command.add_argument("--load-in-8bit", action="store_true", help="quantise it to 8 bits")
    command.add_argument(
        "--quant-type", choices=("nf4", "fp4"), help="of 4 bits [as in training; else nf4]"
    )
    command.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        default=None,
        help="leave the scales of 4 bits in float32 [as in training; else they are quantised]",
    )
    command.add_argument(
        "--compute-dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of products with 4-bit weights [as in training; else bfloat16]",
    )


def _add_loading(command: Any) -> None:
    """How an adapter is loaded."""
    command.add_argument(
        "--base", type=_path, help="directory or id [the one that the adapter names]"
    )
    command.add_argument(
        "--model-class", metavar="NAME", help="of transformers [as in training; else by the task]"
    )
    command.add_argument(
        "--config",
        metavar="KEY=VALUE",
        action="append",
        type=_setting,
        default=[],
        help="of the base's config, e.g. num_labels=5; may be repeated [as in training]",
    )
    command.add_argument("--device", help="[cuda where there is one]")
    _add_trust(command)


def _add_trust(command: Any) -> None:
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python that came with a model"
    )


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, at least 1")
    return int(text)


def _path(text: str) -> str:
    return os.path.expanduser(text)


def _setting(text: str) -> tuple[str, Any]:
    """A key of a config, and its value as JSON; what is no JSON is text."""
    key, separator, value = text.partition("=")
    if not (separator and all(key.split("."))):
        raise argparse.ArgumentTypeError("must be KEY=VALUE")
    try:
        return key, parse_json(value)
    except ValueError:
        return key, value


def _own_version() -> str:
    from merge_callback import __version__

    return f"merge-callback {__version__}"
