#!/bin/sh
# Makes .venv for the demo and the tests. $PYTHON names the Python to use, 3.10 to 3.13.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" - <<'EOF'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}: name another one, "
             "as in `make demo PYTHON=python3.12`")
EOF
if "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("detectron2"))'
then
    # This Detectron2 was built against the torch beside it, so both are used, and only missing
    # packages are added. A .pth line adds the folder of both: if $python is a virtual environment,
    # --system-site-packages would add the folder of the Python below it.
    echo "Using the Detectron2 of $python"
    "$python" -m venv .venv
    own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    here=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$own')" >"$here/own_detectron2.pth"
    .venv/bin/python -m pip install --quiet -e '.[dev,notebooks]'
else
    echo "Setting up .venv (torch and its libraries take several GB, once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt
    .venv/bin/python tools/install_detectron2.py
    .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
fi
touch .venv/ready
