#!/bin/sh
# Makes the folder in which test_variants.py runs the ARM engines under qemu: CPython 3.11 and its libraries from
# Debian's arm64 packages, and the wheels that the native driver and pytest need. Needs apt, pip and a network;
# changes nothing outside of the folder. The tests further need the packages g++-aarch64-linux-gnu and qemu-user.
set -eu

root=${LLMASOS_ARM_ROOT:-$HOME/.cache/llmasos-arm}
python=${PYTHON:-$(dirname "$0")/../../.venv/bin/python}
mkdir -p "$(dirname "$root")"
work=$(mktemp -d "$(dirname "$root")/arm-XXXXXX")
trap 'rm -rf "$work"' EXIT

mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/debs" "$work/wheels" "$work/root/site"
: >"$work/status"
arm_apt() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User= \
        -o Dir::State="$work" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" "$@"
}
arm_apt update
(cd "$work/debs" && arm_apt download python3.11 python3.11-minimal libpython3.11-stdlib libpython3.11-minimal \
    libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libssl3 libbz2-1.0 liblzma5 libuuid1)
for package in "$work"/debs/*.deb; do dpkg-deb -x "$package" "$work/root"; done

# The versions that are tested with elsewhere.
wanted=$("$python" -m pip list --format freeze |
    grep -E '^(numpy|msgspec|msgpack|psutil|tokenizers|safetensors|llguidance|pytest|pytest-timeout|iniconfig|pluggy|packaging|[Pp]ygments)==')
"$python" -m pip download --quiet --disable-pip-version-check --dest "$work/wheels" --no-deps --python-version 311 \
    --only-binary :all: --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux_2_31_aarch64 $wanted
for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/root/site"; done

qemu-aarch64 -L "$work/root" -E PYTHONPATH="$work/root/site" "$work/root/usr/bin/python3.11" \
    -c 'import ctypes, hashlib, llguidance, msgpack, msgspec, numpy, psutil, pytest, safetensors, tokenizers'
rm -rf "$root"
mv "$work/root" "$root"
echo "$root is ready; now: pytest tests/drivers/test_variants.py"
