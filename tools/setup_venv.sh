#!/bin/sh
# Makes .venv with all that demo and tests need. $PYTHON: the Python to use, 3.10 to 3.13.
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
    # A Detectron2 of one's own was built against one's own torch, so both are used as they are,
    # and only what is missing is added. A .pth line, because --system-site-packages would look past
    # a virtual environment, to the Python it was made from.
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
