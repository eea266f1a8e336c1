#!/usr/bin/env bash
# Make off-screen rendering work: opengl.sh PYTHON
# Draws one picture; where that fails, installs the OpenGL libraries if this user may, and tries again.
# Exit status 0 when a picture was drawn. Never hangs: each trial is a process of its own with a time limit.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${1:-python}

try() {
  local backend
  backend=$(timeout -k 5 150 "$python" -c \
    'from svam.simulation.rendering import choose_backend; print(choose_backend())' 2>/dev/null) || return 1
  echo "rendering works (MUJOCO_GL=$backend)"
}

try && exit 0

sudo=()
may=yes
if [ "$(id -u)" -ne 0 ]; then
  sudo=(sudo -n)
  "${sudo[@]}" true 2>/dev/null || may=no
fi
if [ "$may" = yes ] && command -v apt-get >/dev/null; then
  echo "nothing renders yet: installing libegl1 libgl1 libosmesa6"
  install=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y --no-install-recommends)
  "${sudo[@]}" timeout 300 apt-get update >/dev/null 2>&1
  # Newer distributions have no libosmesa6; EGL alone suffices there.
  "${install[@]}" libegl1 libgl1 libosmesa6 >/dev/null 2>&1 || "${install[@]}" libegl1 libgl1 >/dev/null 2>&1
  try && exit 0
fi
echo "nothing renders here, which collecting and evaluating in MetaWorld need; run: sudo apt-get install libegl1 libgl1 libosmesa6" >&2
exit 1
