# Sourced from the repository's root by run_train.sh and tests/run.sh: chooses the
# Python to use, and on a machine without PyTorch makes an environment in .venv.

requirements=${requirements:-requirements.txt}

if [ ! -e .venv ] && python3 -c 'import torch' 2>/dev/null; then
    PYTHON=python3
else
    PYTHON=.venv/bin/python
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python 3.10 or newer is needed: $(python3 --version 2>&1)" >&2
        exit 2
    fi
    # The copy is made last, so that an interrupted or outdated install is taken up.
    installed=.venv/installed-${requirements//\//-}
    if ! cmp -s "$requirements" "$installed"; then
        echo "installing into .venv, which takes a few minutes and about 6 GB" >&2
        python3 -m venv .venv
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cp "$requirements" "$installed"
    fi
fi
