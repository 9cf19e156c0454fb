"""The demo from beginning to end: each chapter prints what it finds and adds it to the results."""

import copy
import os
import time
from contextlib import contextmanager

import torch

import rir_kernels as rir
from models.rir import RiR
from rir_kernels.common import switches, versions
from rir_kernels.triton.inspect import ARCHS
from rir_kernels.triton.shapes import SHAPE_TABLE
from tooling.console import note, say, table, waiting

from . import console, data, emulated, kernels, speeds, tables, training

SCHEMA = 1
WIDTHS = {"cpu": (16, 32, 64), "cuda": (96, 192, 384)}  # the paper's thin and wide networks
STEPS = {"cpu": 60, "cuda": 200}
TEST_IMAGES = {"cpu": 512, "cuda": 10_000}  # of what --data names


def tell(args) -> dict:
    """Run every chapter. The results are plain data; results["failures"] says what was not equivalent."""
    device = torch.device("cuda" if torch.cuda.is_available() and not switches.interpreting() else "cpu")
    torch.manual_seed(args.seed)
    results = {
        "schema": SCHEMA,
        "passed": False,
        "failures": [],
        "skipped": {},
        "seconds": {},
        "speeds": [],
        "emulated": [],
    }

    with _chapter(results, "Environment"):
        images = _set_up(args, device, results)
    with _chapter(results, "A network, and its fused copy"):
        naive, fused = _fuse(images, device, args.impl, results)
    with _chapter(results, "The same function"):
        _compare(naive, fused, images.train_x[: args.batch], results)
    with _chapter(results, "The same training"):
        _train(naive, fused, images, args, results)
    with _chapter(results, "The kernels against fp64"):
        _check_kernels(device, results)
    with _chapter(results, f"The kernels, compiled for {kernels.ARCH}"):
        _compile(results)
    with _chapter(results, "The kernels' speed" if device.type == "cuda" else "The compiled kernels, emulated"):
        _measure(device, results) if device.type == "cuda" else _emulate(results)

    results["passed"] = not results["failures"]
    return results


@contextmanager
def _chapter(results, title):
    console.heading(f"{len(results['seconds']) + 1}  {title}")
    start = time.perf_counter()
    yield
    results["seconds"][title] = time.perf_counter() - start


def _require(results, passed, text, detail=""):
    console.verdict(passed, text, detail)
    if not passed:
        results["failures"].append(f"{text}: {detail}" if detail else text)


def _skip(results, chapter, reason):
    note(reason)
    results["skipped"][chapter] = reason


def _set_up(args, device, results):
    steps = args.steps or STEPS[device.type]
    if args.data:
        images = data.load(args.data, steps * args.batch, TEST_IMAGES[device.type])
    else:
        images = data.load("digits")
    if device.type == "cpu" and not args.data:
        torch.set_num_threads(1)  # images of 8x8 pixels are not worth sharing
    torch.backends.cudnn.allow_tf32 = False  # TF32 would flip ReLUs by the thousand
    threads = torch.get_num_threads()
    name = f"a CPU, {threads} of {os.cpu_count()} cores" if device.type == "cpu" else torch.cuda.get_device_name()
    environment = rir.env_report()
    results["environment"] = dict(environment)
    results["device"] = {"type": device.type, "name": name}
    results["data"] = {
        "name": images.name,
        "image": list(images.train_x.shape[1:]),
        "train": len(images.train_x),
        "test": len(images.test_x),
    }
    results["settings"] = {"steps": steps, "batch": args.batch, "seed": args.seed, "impl": args.impl}
    found = " · ".join(f"{key} {environment[key]}" for key in ("rir_kernels", "torch", "triton", "python"))
    say(f"{found} · on {name}")
    say(tables.data_line(results))
    return images.to(device)


def _fuse(images, device, impl, results):
    width = WIDTHS[device.type]
    naive = RiR(images.num_classes, in_channels=images.channels, width=width, layers=rir.reference)
    naive = naive.to(device, memory_format=torch.channels_last)
    fused = copy.deepcopy(naive)
    fusion = rir.fuse_(fused, impl=impl)
    parameters = sum(p.numel() for p in naive.parameters())
    results["network"] = {"name": "Resnet in Resnet, 18 layers", "width": list(width), "parameters": parameters}
    results["fusion"] = fusion.to_dict()
    say(tables.network_line(results))
    say(str(fusion))
    layers = sum(isinstance(module, rir.reference.RiRLayer) for module in naive.modules())
    count = len(fusion.replaced)
    _require(results, count >= layers, f"every RiR layer is fused ({layers} layers, {count} operations)")
    return naive, fused


def _compare(naive, fused, x, results):
    note(tables.BUDGET)
    results["equivalence"] = []
    for train in (True, False):
        found = rir.compare(naive, fused, x, train=train)
        results["equivalence"].append(found.to_dict())
        _require(results, found.passed, found.headline())
    both = results["equivalence"]
    say("")
    table(tables.SUMMARY_HEADER, tables.summary_rows(both), left=2)
    say("\nwhat took most of its budget:")
    table(tables.ROW_HEADER, tables.worst_rows(both), left=3)


def _train(naive, fused, images, args, results):
    settings = results["settings"]
    dtype = torch.bfloat16 if images.train_x.is_cuda else torch.float32
    eps = torch.finfo(dtype).eps
    untrained = copy.deepcopy(naive)
    networks = {"naive": naive, "fused": fused, "control": training.control_of(naive, eps, args.seed)}
    note(tables.CHAOS)
    with console.steps("training", settings["steps"]) as advance:
        curves = training.train(
            networks, images, steps=settings["steps"], batch=args.batch, seed=args.seed, dtype=dtype,
            on_step=lambda losses: advance(f"loss {losses['naive']:.4f} naive, {losses['fused']:.4f} fused"),
        )  # fmt: skip
    accuracies = {name: training.accuracy(network, images) for name, network in networks.items()}
    checks = training.judge(curves, accuracies, eps, len(images.test_y))
    checks.append(training.check_unfuse(fused, untrained, rir.unfuse_, images.test_x[:256]))
    results["training"] = training.summary(curves, accuracies, checks) | {"dtype": str(dtype).removeprefix("torch.")}
    table(tables.TRAINING_HEADER, tables.training_rows(results))
    note(tables.speed_note(results))
    for check in checks:
        _require(results, check.passed, check.name, check.detail)


def _check_kernels(device, results):
    results["kernels"] = []
    if missing := kernels.obstacle(device):
        return _skip(results, "kernels", f"Not run: the kernels need {missing}.")
    say(f"Single layers {tables.where(results)}; errors of the output and of the convolutions' gradients:")
    cases = kernels.cases(device)
    with console.steps("comparing", len(cases)) as advance:
        for case in cases:
            results["kernels"] += kernels.check(*case, device)
            advance()
    table(tables.KERNEL_HEADER, tables.kernel_rows(results["kernels"]), left=3)
    tensors = [row for case in results["kernels"] for row in case["rows"]]
    passed = sum(row["passed"] for row in tensors)
    failed = [f"{case['title']} in {case['dtype']}" for case in results["kernels"] if not case["passed"]]
    text = f"{passed} of {len(tensors)} tensors of single layers are within their budgets"
    _require(results, passed == len(tensors), text, ", ".join(dict.fromkeys(failed)))


def _compile(results):
    results["compiled"] = {"arch": kernels.ARCH, "shared_kb": ARCHS[kernels.ARCH].shared_kb, "rows": []}
    if missing := versions.triton_missing():
        return _skip(results, "compiled", f"Not compiled: that needs {missing}.")
    with waiting(f"compiling for {kernels.ARCH}: no GPU is needed for that"):
        rows = results["compiled"]["rows"] = kernels.compile_table()
    say("The convolution kernels, smallest to largest over the eleven layers of the shape table:")
    table(tables.COMPILED_SUMMARY_HEADER, tables.compiled_summary(rows))
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        _require(results, False, f"{row['shape']}, {row['op']}, {row['kernel']}", "; ".join(row["faults"]))
    _require(results, not failed, f"{len(rows) - len(failed)} of {len(rows)} kernels pass the gate")


def _emulate(results):
    if missing := emulated.obstacle():
        return _skip(
            results, "speeds", f"No speed was measured: that takes a GPU. Nor is one emulated: that needs {missing}."
        )
    note(tables.EMULATED)
    with waiting(f"executing what was compiled for {kernels.ARCH}, in bf16"):
        results["emulated"] = emulated.check()
    table(tables.KERNEL_HEADER, tables.kernel_rows(results["emulated"]), left=3)
    tensors = [row["passed"] for case in results["emulated"] for row in case["rows"]]
    text = f"{sum(tensors)} of {len(tensors)} tensors in bf16 are within their budgets, emulated"
    _require(results, all(tensors), text)


def _measure(device, results):
    if missing := kernels.obstacle(device):
        return _skip(results, "speeds", f"Not measured: the kernels need {missing}.")
    with console.steps("measuring", len(SHAPE_TABLE)) as advance:
        for shape in SHAPE_TABLE:
            results["speeds"] += speeds.measure(shape, device)
            advance(shape.name)
    say(tables.SPEEDS.format(results["device"]["name"]))
    table(tables.SPEED_HEADER, tables.speed_rows(results), left=2)
