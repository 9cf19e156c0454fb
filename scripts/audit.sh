#!/usr/bin/env bash
# Known vulnerabilities of the packages that are installed: scripts/audit.sh PYTHON [ARGUMENTS OF pip-audit]
# Needs the network. pip-audit lives in a separate folder, so it does not audit itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
shift

tool=.audit
if [ ! -x "$tool/bin/pip-audit" ]; then
    "$python" -m venv "$tool"
    "$tool/bin/python" -m pip install --quiet pip-audit
fi
# releases as PyPI knows them: torch 2.13.0+cpu is 2.13.0 there
"$python" -m pip freeze --exclude-editable | sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p' >"$tool/installed.txt"
# --strict: a package that could not be looked up is a failure and no pass
"$tool/bin/pip-audit" --strict --no-deps --disable-pip --requirement "$tool/installed.txt" "$@"
