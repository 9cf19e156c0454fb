"""The command line."""

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cases.selection import Selection, batch_of, known
from bench.first import STEPS
from bench.schema import DTYPES, IMPLS, SUITES, ResultsError, load, load_all
from bench.simulate.command import add_simulate

ROOT = Path(__file__).resolve().parent
STAND_IN = "on a stand-in for a GPU: what is measured means nothing"
PIECES = ("first", "gpu")
DOCUMENTS = ("choose", "report", "compare", "check", "headline", "memory", "traffic", "architectures", "simulate")
COMMANDS = ("all", *SUITES, *PIECES, "tune", *DOCUMENTS)


def main(arguments: Sequence[str]) -> int:
    """Runs one command; the exit status."""
    # the suites are what the command is for: they need no name
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["all", *arguments]
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options, arguments)
    except (ResultsError, ValueError) as error:
        parser.error(str(error))


def _parser():
    parser = argparse.ArgumentParser(prog="python -m bench", description="The benchmark of rir_kernels.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name in ("all", *SUITES):
        _add_measuring(commands, name)
    _add_pieces(commands)
    tune = commands.add_parser("tune", help="the fastest tile of each shape, for rir_kernels/triton/tiling/tiles/")
    tune.add_argument("--out", type=Path, default=Path("out/tiles"), metavar="DIR", help="default: %(default)s")
    tune.add_argument("--shapes", **_some, help="rows of the shape table; default: all")
    tune.add_argument("--batch", **_some, help="images; default: 256")
    tune.add_argument("--dtype", **_some, help=f"{', '.join(DTYPES)}; default: bf16 and fp16")
    tune.add_argument("--candidates", type=int, default=10, metavar="N", help="tiles of each; default: %(default)s")
    tune.add_argument("--minutes", type=float, help="begin nothing after that; what is there is kept")
    tune.set_defaults(run=_tune)
    choose = commands.add_parser("choose", help='which implementation "auto" takes on this device, from results')
    choose.add_argument("paths", nargs="+", type=Path, help="files or folders")
    choose.set_defaults(run=_choose)
    report = commands.add_parser("report", help="Markdown, figures and a page from result files")
    report.add_argument("paths", nargs="*", type=Path, default=[Path("out/bench")], help="files or folders")
    report.add_argument("--out", type=Path, help="where it is written; default: beside the results")
    report.set_defaults(run=_report)
    compare = commands.add_parser("compare", help="two result files, row by row")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--fail-if-slower", default="5%", metavar="LIMIT", help="default: %(default)s")
    compare.set_defaults(run=_compare)
    check = commands.add_parser("check", help="whether the committed results are of the current code")
    check.set_defaults(run=_check)
    headline = commands.add_parser(
        "headline", help="write the README's and docs/memory.md's figures and tables from the committed results"
    )
    headline.set_defaults(run=_headline)
    memory = commands.add_parser("memory", help="what a training step keeps for backward, counted without a GPU")
    memory.add_argument("--out", type=Path, default=Path("out/memory"), metavar="DIR", help="default: %(default)s")
    memory.add_argument("--networks", **_some, help="such as resnet18; default: all")
    memory.add_argument("--batch", default="256", metavar="N", help="images; default: %(default)s")
    memory.set_defaults(run=_memory)
    traffic = commands.add_parser(
        "traffic", help="how often a layer passes over memory, counted, written into the README with its picture"
    )
    traffic.set_defaults(run=_traffic)
    architectures = commands.add_parser("architectures", help="fuse_ on the networks of other libraries: is all well?")
    architectures.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="default: %(default)s")
    architectures.add_argument("--only", **_some, help="networks with this in their names, such as timm/resnet")
    architectures.set_defaults(run=_architectures)
    add_simulate(commands)
    return parser


def _add_measuring(commands, name):
    parser = commands.add_parser(
        name, help="all three suites, and the report (the default)" if name == "all" else f"the {name} suite"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--name", help="of the file, without .json; default: the suite's")
    parser.add_argument("--quick", action="store_true", help="few shapes, few samples: a first look")
    parser.add_argument("--ops", **_some, help="ops of the suite, such as rir_layer")
    parser.add_argument("--shapes", **_some, help="rows of the shape table, such as 96@32")
    parser.add_argument("--batch", **_some, help="images; default: 256 on a GPU, 4 on a CPU, models have their own")
    parser.add_argument("--dtype", **_some, help=f"{', '.join(DTYPES)}; default: all on a GPU, fp32 on a CPU")
    parser.add_argument("--impl", **_some, help=f"{', '.join(IMPLS)}; default: all that are there")
    parser.add_argument("--minutes", type=float, help="begin nothing that could end later; what is there is kept")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that the file has, and measure the others"
    )
    parser.add_argument("--overlap", action="store_true", help="launches overlap the one ahead (RIR_KERNELS_OVERLAP=1)")
    parser.add_argument("--dry", action="store_true", help=STAND_IN)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(run=_measure, suites=SUITES if name == "all" else (name,))


def _add_pieces(commands):
    first = commands.add_parser("first", help="the first minutes on a GPU: compiled, exact, how fast")
    whole = commands.add_parser("gpu", help="the whole run on a GPU, piece by piece: call it until nothing is missing")
    for parser, run in ((first, _first), (whole, _gpu)):
        parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
        parser.add_argument("--minutes", type=float, default=8.0, help="then it ends; default: %(default)s")
        parser.add_argument("--dry", action="store_true", help=STAND_IN)
        parser.set_defaults(run=run)
    first.add_argument("--step", choices=STEPS, help="one step, in this process")
    first.add_argument("--seconds", type=float, default=600.0, help="that one step may take; default: %(default)s")
    first.add_argument("--retry", action="store_true", help="with --step: try again what failed before")


_some = {"nargs": "+", "default": [], "metavar": "NAME"}


def _measure(options, arguments):
    if options.overlap:
        os.environ["RIR_KERNELS_OVERLAP"] = "1"
    if options.dry:
        from bench.measure.stand_in import check_folder, stand_in

        check_folder(options.out)
        options.device, options.dry = "cuda", False
        with stand_in():
            return _measure(options, arguments)
    from bench.measure.run import refused_ours, run_suite
    from tooling import console

    if options.name and len(options.suites) > 1:
        raise ValueError("--name is for one suite: pass kernels, layers or models before it")
    suites = {suite: importlib.import_module(f"bench.cases.{suite}") for suite in options.suites}
    selection = Selection(
        device_type=options.device,
        ops=known("--ops", options.ops, tuple(op for suite in suites.values() for op in suite.OPS)),
        shapes=tuple(options.shapes),
        batches=tuple(batch_of(text) for text in options.batch),
        dtypes=known("--dtype", options.dtype, tuple(DTYPES)),
        quick=options.quick,
    )
    impls = known("--impl", options.impl, IMPLS) or _default_impls(options)
    cases = {name: found for name, suite in suites.items() if (found := suite.cases(selection))}
    if not cases:
        raise ValueError("nothing to measure: no case has these --ops, --shapes and --batch together")
    if options.device == "cpu":
        console.say("This is a CPU: the Triton kernels do not run here, and these times say nothing about them.")
    refused = []
    for suite in cases:
        path = options.out / f"{options.name or suite}.json"
        results = run_suite(
            suite, cases[suite], selection, impls, path,
            command=arguments, minutes=options.minutes, resume=options.resume,
        )  # fmt: skip
        refused += refused_ours(results)
    if len(options.suites) > 1:
        _report(argparse.Namespace(paths=[options.out], out=None), arguments)
    for line in refused:
        console.say(f"refused: {line}")
    return 1 if refused else 0


def _default_impls(options):
    # its search takes minutes, where a first look is to take seconds
    return tuple(impl for impl in IMPLS if not (options.quick and impl == "compile_max_autotune"))


def _first(options, arguments):
    from bench.first import steps
    from bench.measure.stand_in import check_folder

    if options.dry:
        check_folder(options.out)
    if options.step:
        good = steps.run_step(
            options.step, options.out, arguments, dry=options.dry, retry=options.retry, seconds=options.seconds
        )
        return 0 if good else 1
    return 0 if steps.run_all(options.out, options.minutes, dry=options.dry) else 1


def _gpu(options, _arguments):
    from bench.gpu import run_all
    from bench.measure.stand_in import check_folder

    if options.dry:
        check_folder(options.out)
    return 0 if run_all(options.out, options.minutes, dry=options.dry) else 1


def _tune(options, _arguments):
    from bench.measure import timing
    from bench.measure.tune import tune
    from tooling import console

    if not torch.cuda.is_available():
        raise ValueError("tune: tiles are measured on a CUDA device, and there is none")
    selection = Selection("cuda", shapes=tuple(options.shapes), batches=tuple(batch_of(text) for text in options.batch))
    path = tune(
        selection.chosen_shapes(quick=()),
        known("--dtype", options.dtype, tuple(DTYPES)) or ("bf16", "fp16"),
        torch.device("cuda"),
        options.out,
        candidates=options.candidates,
        settings=timing.Settings(rounds=9),
        minutes=options.minutes,
    )
    console.say(f"copy {path} to rir_kernels/triton/tiling/tiles/ to have these tiles chosen on this device")
    return 0


def _choose(options, _arguments):
    from bench.measure.choose import choose
    from tooling import console

    console.say(f"wrote {choose(load_all(*options.paths))}")
    return 0


def _report(options, _arguments):
    from bench.report import write
    from tooling import console

    out = options.out or (options.paths[0] if options.paths[0].is_dir() else options.paths[0].parent)
    for path in write(load_all(*options.paths), out):
        console.say(f"wrote {path}")
    return 0


def _compare(options, _arguments):
    from bench.report.compare import compare, parse_limit
    from tooling import console

    limit = parse_limit(options.fail_if_slower)
    comparison = compare(load(options.before), load(options.after), limit)
    console.say(str(comparison))
    return 1 if comparison.failed else 0


def _check(_options, _arguments):
    from bench.report.check import check
    from tooling import console

    found = check(ROOT / "results")
    for path, text, _ in found:
        console.say(f"{path.relative_to(ROOT.parent)}: {text}")
    if not found:
        console.say("no results are committed")
    return 1 if any(failed for _, _, failed in found) else 0


def _headline(_options, _arguments):
    from bench.memory import document
    from bench.report.headline import update
    from tooling import console

    readme = ROOT.parent / "README.md"
    console.say(f"{readme.name}: {'updated' if update(readme, ROOT / 'results') else 'up to date already'}")
    changed = document.update(ROOT.parent)
    console.say(f"counted memory: {', '.join(path.name for path in changed) or 'up to date already'}")
    return 0


def _memory(options, arguments):
    from bench.memory.networks import NETWORKS
    from bench.memory.run import run
    from tooling import console

    names = known("--networks", options.networks, tuple(NETWORKS))
    path = run(names, batch_of(options.batch), options.out, command=arguments)
    console.say(f"wrote {path}" if path else "nothing could be counted")
    return 0 if path else 1


def _traffic(_options, _arguments):
    from bench.report.traffic import update
    from tooling import console

    console.say(f"traffic: {', '.join(map(str, update(ROOT.parent))) or 'up to date already'}")
    return 0


def _architectures(options, _arguments):
    from bench.tools.architectures.run import chosen, run

    return 1 if any(record.defects for record in run(chosen(options.only), options.out)) else 0
