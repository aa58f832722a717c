#!/usr/bin/env bash
# PostgreSQL's programs, from Debian's packages, where they are missing and may be installed. Debian starts a cluster of its own
# on port 5432 when the package is installed; ours is another, on another port.
set -euo pipefail
if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "PostgreSQL is not installed; run: sudo apt-get install postgresql" >&2
    exit 1
fi
echo "Installing PostgreSQL ..."
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null
