#!/bin/bash
# slurm-install.sh - install what slurm-up.sh needs, on Debian or Ubuntu as root.  Idempotent; exit 1 and one line if it cannot be had.
#   SLURM_SACCT   1 = also mariadb + slurmdbd (default 0)
set -u
need=(); has() { command -v "$1" >/dev/null 2>&1; }
has slurmctld || need+=(slurmctld); has slurmd || need+=(slurmd); has sbatch || need+=(slurm-client); has munged || need+=(munge)
if [ "${SLURM_SACCT:-0}" = 1 ]; then
  has slurmdbd || need+=(slurmdbd); has mariadbd || need+=(mariadb-server)
  [ -e /usr/lib/"$(uname -m)"-linux-gnu/slurm-wlm/accounting_storage_mysql.so ] || need+=(slurm-wlm-mysql-plugin)
fi
[ ${#need[@]} = 0 ] && exit 0
has apt-get || { echo "slurm-install: not here, and no apt-get: ${need[*]}" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "slurm-install: not here, and only root can install: ${need[*]}" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
said=$(apt-get update -qq 2>&1); said+=$(apt-get install -y -qq --no-install-recommends "${need[@]}" 2>&1) && exit 0
echo "slurm-install: apt-get install ${need[*]} failed: $(tail -n 3 <<< "$said" | tr '\n' ' ')" >&2
exit 1
