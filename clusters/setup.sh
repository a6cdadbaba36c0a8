#!/bin/bash
# Install the environment of a node: Python 3.11, the versions of requirements.txt, and sigray itself.
# `ray up` runs this over ssh after the file mounts; a run without changes takes a second.
#   bash ~/sigray/clusters/setup.sh
set -euo pipefail
UV_VERSION=0.13.9
cd ~/sigray

if ! grep -q sigray-env ~/.bashrc 2>/dev/null; then
  printf 'export PATH="$HOME/sigray-env/bin:$PATH"\nexport RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0\n' >> ~/.bashrc
fi
WANTED=$(cat requirements.txt pyproject.toml clusters/setup.sh | sha256sum)
if [ "$(cat ~/sigray-env/.wanted 2>/dev/null)" = "$WANTED" ]; then exit 0; fi

if ! python3 -m uv --version 2>/dev/null | grep -qF "$UV_VERSION"; then
  python3 -m pip --version >/dev/null 2>&1 || { sudo apt-get update -qq; sudo apt-get install -y -qq python3-pip; }
  python3 -m pip install --quiet --user "uv==$UV_VERSION"
fi
python3 -m uv venv --quiet --clear --python 3.11 ~/sigray-env
python3 -m uv pip install --quiet --compile-bytecode --python ~/sigray-env/bin/python -r requirements.txt
python3 -m uv pip install --quiet --python ~/sigray-env/bin/python --no-deps --no-build-isolation -e .
# A TPU host has one of these devices; the extra pins the libtpu of torch-xla 2.9.
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  python3 -m uv pip install --quiet --python ~/sigray-env/bin/python 'torch_xla[tpu]==2.9.0'
fi
echo "$WANTED" > ~/sigray-env/.wanted
