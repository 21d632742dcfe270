# Sourced by demo.sh and test.sh: `prepare_environment REQUIREMENTS` makes .venv and installs what the file lists, once.
prepare_environment() {
    local requirements=$1 base=${PYTHON:-python3} stamp
    stamp=.venv/.installed-$(cat requirements*.txt | sha256sum | cut -c1-16)-$requirements
    if [ ! -x .venv/bin/python ]; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
            return 2
        }
        "$base" -m venv .venv || {
            rm -rf .venv
            echo "error: $base cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
            return 2
        }
    fi
    if [ ! -e "$stamp" ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
}
