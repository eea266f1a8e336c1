#!/usr/bin/env bash
# A browser for the test of the report's page, if this user may install one; without it that test is skipped.
set -u
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
"${sudo[@]}" timeout 300 apt-get update >/dev/null 2>&1
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y --no-install-recommends chromium >/dev/null 2>&1 ||
  echo "no browser here: the report's page is not tested; run: sudo apt-get install chromium" >&2
