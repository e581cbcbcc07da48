#!/usr/bin/env bash
# Prints the folder in which prometheus and promtool are. On a Debian machine without them their package is unpacked (not installed)
# into build/prometheus; elsewhere it says what is missing and exits with 3.
set -euo pipefail
cd "$(dirname "$0")/../.."

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
  dirname "$(command -v promtool)"
  exit
fi
folder=$PWD/build/prometheus
if [[ ! -x $folder/usr/bin/promtool ]]; then
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
    echo "prometheus and promtool are not on PATH, and there is no apt-get to fetch them with: install Prometheus" >&2
    exit 3
  }
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  chmod 755 "$temporary"
  fetch() { (cd "$temporary" && apt-get download -qq prometheus >/dev/null 2>"$temporary/errors"); }
  # A fresh machine has no package lists yet; only root may get them.
  fetch || { [[ $EUID -eq 0 ]] && apt-get update -qq >&2 && fetch; } || {
    echo "prometheus is not on PATH and could not be fetched: $(tail -1 "$temporary/errors")" >&2
    exit 3
  }
  mkdir -p "$folder.part"
  dpkg-deb -x "$temporary"/prometheus_*.deb "$folder.part"
  # Another process may have been faster.
  mv -T "$folder.part" "$folder" 2>/dev/null || rm -rf "$folder.part"
fi
echo "$folder/usr/bin"
