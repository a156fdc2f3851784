#!/usr/bin/env bash
# What cannot come from PyPI: a compiler, cmake, and EGL for headless rendering. Installs EGL where it may, and else
# says the exact line. Usage: scripts/check_system.sh PYTHON
set -euo pipefail

python=${1:-python3}
if ! command -v "$python" >/dev/null; then
    echo "there is no '$python' here; install Python 3.11, or name another: make PYTHON=python3.12 …" >&2
    exit 1
fi
for tool in gcc g++ cmake; do
    if ! command -v "$tool" >/dev/null; then
        echo "there is no '$tool' here; run: apt-get install -y gcc g++ cmake" >&2
        exit 1
    fi
done

has_egl() {
    "$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1"); ctypes.CDLL("libGL.so.1")' 2>/dev/null &&
        compgen -G '/usr/share/glvnd/egl_vendor.d/*.json' >/dev/null
}
if ! has_egl; then
    packages="libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri"
    line="apt-get update && apt-get install -y $packages"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "headless rendering needs EGL: $line"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y $packages >/dev/null
    else
        echo "headless rendering needs EGL; run: sudo sh -c '$line'" >&2
        exit 1
    fi
fi
