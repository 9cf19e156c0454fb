#!/usr/bin/env bash
# Make .venv, or bring it up to date: scripts/setup-venv.sh cpu|cuda   (called by make)
#
# PYTHON names the interpreter a new .venv is made with. A finished environment carries .venv/.ready-cpu or
# .venv/.ready-cuda; one whose installation was cut short carries .venv/.unfinished and is made again from scratch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

flavour=${1:?usage: scripts/setup-venv.sh cpu|cuda}
python=${PYTHON:-python3}
venv=.venv
requirements=requirements/$flavour.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
    echo "setup-venv: $*" >&2
    exit 1
}

# step WHAT COMMAND...: says what begins, and how long it took
number=0
step() {
    local what="[$((++number))/6] $1" begun=$SECONDS
    shift
    echo "setup-venv: $what ..."
    "$@"
    echo "setup-venv: $what: $((SECONDS - begun)) s"
}

[ -f "$requirements" ] || die "TORCH must be cpu or cuda, got '$flavour'"

# a build of PyTorch for the other kind of machine also satisfies the requirements: it has to go first
other=$([ "$flavour" = cpu ] && echo cuda || echo cpu)
if [ -e "$venv/.unfinished" ] || [ -e "$venv/.ready-$other" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    command -v "$python" >/dev/null || die "$python not found; name a Python >= 3.10 with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python >= 3.10 is needed, but $python is $("$python" --version 2>&1); name another one with PYTHON=..."
    rm -rf "$venv/bin" "$venv"/.ready-* # first, because --clear may be cut short as well
    echo "setup-venv: $venv is missing, unfinished or for the other kind of machine; making it takes minutes, once"
    step "a new $venv with $("$python" --version)" "$python" -m venv --clear "$venv"
else
    step "$venv is there" true
fi
touch "$venv/.unfinished"
rm -f "$venv"/.ready-*

# pip's bars where somebody watches, its errors only in a log
quiet=(-qq)
if [ -t 1 ]; then quiet=(); fi
install() { "$venv/bin/python" -m pip install "${quiet[@]}" "$@"; }

install_triton() {
    # a CUDA build of PyTorch pins its own Triton; a CPU build has none
    "$venv/bin/python" -m pip show --quiet triton 2>/dev/null || install 'triton==3.6.0; platform_system == "Linux"'
}

install_torchvision() {
    if [ "$flavour" = cpu ]; then
        install --no-deps torchvision==0.28.0 # without its operators, see bench/cases/libraries.py
        return
    fi
    local torch
    torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
    install --constraint "$requirements" --constraint <(echo "torch==$torch") torchvision ||
        echo "setup-venv: no torchvision for torch $torch; tests with its networks are skipped" >&2
}

step "PyTorch ($flavour)" install --requirement "$requirements"
step "Triton" install_triton
step "rir_kernels, and what tests, benchmark and training need" \
    install --constraint "$requirements" --editable '.[dev,bench,train]'
# other people's networks, for tests: their dependencies stand among ours or are never imported
step "networks: pytorchcv, timm" install --no-deps pytorchcv==0.0.74 timm==1.0.31
step "networks: torchvision" install_torchvision

rm "$venv/.unfinished"
touch "$venv/.ready-$flavour"
