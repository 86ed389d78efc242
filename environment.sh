# Sourced from the repository's root by run_train.sh and tests/run.sh: chooses the
# Python to use, and where something is missing makes an environment in .venv.

requirements=${requirements:-requirements.txt}
packages=${packages:-torch torchvision av diffusers matplotlib numpy PIL safetensors tensorboard tomli torchmetrics tqdm}

# Looked for only, since importing them all takes seconds; a broken one tells so itself,
# when it is used. A folder that an uninstalled package left has no origin.
has_packages() {
    # shellcheck disable=SC2086
    python3 -c 'import sys
from importlib.util import find_spec
specs = map(find_spec, sys.argv[1:])
sys.exit(not all(spec and spec.origin for spec in specs))' $packages 2>/dev/null
}

if [ ! -e .venv ] && has_packages; then
    PYTHON=python3
else
    PYTHON=.venv/bin/python
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python 3.10 or newer is needed: $(python3 --version 2>&1)" >&2
        exit 2
    fi
    # The note is written last, so that an interrupted or outdated install is taken up.
    wanted=$(cat requirements.txt "$requirements")
    installed=.venv/installed-${requirements//\//-}
    if [ "$wanted" != "$(cat "$installed" 2>/dev/null)" ]; then
        echo "installing into .venv, which takes a few minutes and about 6 GB" >&2
        # A PyTorch that the machine has is kept.
        python3 -c 'import torch' 2>/dev/null && system=--system-site-packages
        python3 -m venv ${system:-} .venv
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        printf '%s' "$wanted" > "$installed"
        # The tests' requirements hold the others.
        printf '%s' "$(cat requirements.txt requirements.txt)" \
            > .venv/installed-requirements.txt
    fi
fi
