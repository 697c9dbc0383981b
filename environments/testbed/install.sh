#!/bin/sh
# Installs, from Debian's packages, the daemons that the testbed starts, and what looks at job
# scripts; does nothing where they are.
set -eu

missing=
for pair in slurmctld:slurm-wlm slurmd:slurm-wlm munged:munge sshd:openssh-server \
            python3:python3-minimal shellcheck:shellcheck tcsh:tcsh fish:fish; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${pair%%:*}" ] \
        || missing="$missing ${pair##*:}"
done
[ -z "$missing" ] && { echo "testbed: all is installed"; exit 0; }
[ "$(id -u)" -eq 0 ] || { echo "testbed: as root, run: apt-get install$missing" >&2; exit 1; }

echo "testbed: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086  # a list of package names, one word each
apt-get install -y -qq --no-install-recommends $missing
