#!/usr/bin/env bash
# Debian's redis-server and libfaketime for the chaos suite, unpacked (not installed) into build/chaos. Prints the folder; elsewhere it says
# what is missing and exits with 3.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=$PWD/build/chaos
if [[ ! -x $folder/redis-server ]]; then
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || {
    echo "there is no apt-get to fetch redis-server and libfaketime with" >&2
    exit 3
  }
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  chmod 755 "$temporary"
  packages=(redis-tools libjemalloc2 liblzf1 liblua5.1-0 lua-cjson lua-bitop libhiredis0.14 libfaketime)
  fetch() { (cd "$temporary" && apt-get download -qq "${packages[@]}" >/dev/null 2>"$temporary/errors"); }
  # A fresh machine has no package lists yet; only root may get them.
  fetch || { [[ $EUID -eq 0 ]] && apt-get update -qq >&2 && fetch; } || {
    echo "redis-server and libfaketime could not be fetched: $(tail -1 "$temporary/errors")" >&2
    exit 3
  }
  mkdir -p "$folder.part"
  for package in "$temporary"/*.deb; do dpkg-deb -x "$package" "$folder.part"; done
  # One program with three names: in Debian redis-server is a link to this one.
  cat >"$folder.part/redis-server" <<'END'
#!/usr/bin/env bash
here=$(dirname "$(readlink -f "$0")")
libraries=$(echo "$here"/usr/lib/*-linux-gnu*)
LD_LIBRARY_PATH=$libraries:${LD_LIBRARY_PATH:-} exec -a redis-server "$here/usr/bin/redis-check-rdb" "$@"
END
  chmod +x "$folder.part/redis-server"
  # Another process may have been faster.
  mv -T "$folder.part" "$folder" 2>/dev/null || rm -rf "$folder.part"
fi
echo "$folder"
