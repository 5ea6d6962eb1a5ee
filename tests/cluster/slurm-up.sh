#!/bin/bash
# Bring up a REAL Slurm cluster (munged + slurmctld + N slurmd on one host)
# on loopback, without systemd, on a bare Debian 12 machine, as root.  Idempotent.
#
#   eval "$(./slurm-up.sh)"          # prints: export SLURM_CONF=... etc. (log lines go to stderr)
#
# Environment (all optional):
#   SLURM_LAB     state directory             (default ${TMPDIR:-/tmp}/slurm-lab)
#   SLURM_NODES   emulated nodes gpu1..gpuN   (default 4)
#   SLURM_GPUS    fake GPUs per node          (default 2)
#   SLURM_CPUS    CPUs each node claims       (default 16; more than real is fine)
#   SLURM_MEM     MiB each node claims        (default 64000; likewise)
#   SLURM_PORT    slurmctld port; slurmd n listens on PORT+n; slurmdbd on PORT+90 (default 26817)
#   SLURM_SACCT   1 = also mariadb + slurmdbd so that sacct works (default 0)
#   SLURM_CGROUP  1 = enforce memory and GPU devices by cgroup v1 (real OUT_OF_MEMORY, EPERM on others' GPUs);
#                 needs the v1 hierarchies mounted under /sys/fs/cgroup (default 0)
#   SLURM_FRESH   1 = wipe job/node state first (default 0)
#   MINJOBAGE     seconds a finished job stays in squeue/scontrol (default 300)
set -euo pipefail
LAB=${SLURM_LAB:-${TMPDIR:-/tmp}/slurm-lab}; N=${SLURM_NODES:-4}; G=${SLURM_GPUS:-2}; C=${SLURM_CPUS:-16}; M=${SLURM_MEM:-64000}
PORT=${SLURM_PORT:-26817}; SACCT=${SLURM_SACCT:-0}; CG=${SLURM_CGROUP:-0}; DBDPORT=$((PORT+90)); SQLPORT=$((PORT+91))
say() { echo "slurm-up: $*" >&2; }
die() { say "FAILED: $*"; for f in "$LAB"/log/*.log; do [ -s "$f" ] && { echo "--- $f"; tail -n 6 "$f"; } >&2; done; exit 1; }
[ "$(id -u)" = 0 ] || die "must be root"

# --- packages -------------------------------------------------------------------------------
mkdir -p "$LAB"
SLURM_SACCT=$SACCT bash "$(dirname "$0")/slurm-install.sh" >&2 || die "packages"

# --- layout ---------------------------------------------------------------------------------
[ "${SLURM_FRESH:-0}" = 1 ] && [ -x "$(dirname "$0")/slurm-down.sh" ] && { SLURM_LAB="$LAB" "$(dirname "$0")/slurm-down.sh" >&2 || true; rm -rf "$LAB"/{state,spool,db,log}; }
t0=$(date +%s%N)
mkdir -p "$LAB"/{etc,state,spool,log,run,dev}; chmod 755 "$LAB" "$LAB"/{etc,run,log,dev}
cd "$LAB"
[ -s etc/munge.key ] || { (umask 277; head -c 1024 /dev/urandom > etc/munge.key); }
chmod 400 etc/munge.key
: > etc/gres.conf.new
for n in $(seq "$N"); do
  mkdir -p "spool/gpu$n"
  for g in $(seq 0 $((G-1))); do   # a GPU must be a *character device*: one of a local-use major, or a link to /dev/null
    d="dev/gpu$n-nvidia$g"; [ -c "$d" ] || mknod "$d" c 240 $((n*16+g)) 2>/dev/null || ln -sfn /dev/null "$d"
  done
  [ "$G" -gt 0 ] && echo "NodeName=gpu$n Name=gpu Type=fake File=$LAB/dev/gpu$n-nvidia[0-$((G-1))] Flags=nvidia_gpu_env" >> etc/gres.conf.new
done
mv etc/gres.conf.new etc/gres.conf
if [ "$SACCT" = 1 ]; then ACCT="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$DBDPORT
AccountingStoragePass=$LAB/run/munge.socket
AccountingStorageTRES=gres/gpu"
else ACCT="AccountingStorageType=accounting_storage/none"; fi
if [ "$CG" = 1 ]; then
  TRACK="ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
JobAcctGatherType=jobacct_gather/cgroup"
  printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no ConstrainRAMSpace=yes ConstrainSwapSpace=no ConstrainCores=no ConstrainDevices=yes > etc/cgroup.conf
else
  # OverMemoryKill: polled; such a job ends FAILED/JobLaunchFailure 0:9, not OUT_OF_MEMORY as with cgroups
  TRACK="ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherParams=OverMemoryKill"
  rm -f etc/cgroup.conf
fi
cat > etc/slurm.conf.new <<CONF
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$PORT
# loopback only: bind to the configured addresses, not 0.0.0.0
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# cred_expire also sets how long a requeued job must wait before it may start again (default 120 s)
AuthInfo=socket=$LAB/run/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
$TRACK
JobAcctGatherFrequency=2
# no PMIx (slurmd logs three harmless errors about it)
MpiDefault=none
PropagateResourceLimits=NONE
# scheduling: low latency for tests
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=64
PriorityType=priority/basic
# jobs of the partition 'scavenge' are requeued when 'gpu' needs the node (SIGTERM, 5 s grace)
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=100001
MaxJobCount=200000
# failure handling: fast
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=10
BatchStartTimeout=10
KillWait=3
UnkillableStepTimeout=15
MinJobAge=${MINJOBAGE:-300}
SlurmctldDebug=info
SlurmdDebug=info
# records
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.txt
$ACCT
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=gpu[1-$N] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((PORT+1))-$((PORT+N))] CPUs=$C RealMemory=$M$([ "$G" -gt 0 ] && echo " Gres=gpu:fake:$G") State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=60 State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=7-0 DefaultTime=60 State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=short Nodes=ALL MaxTime=1 DefaultTime=1 State=UP PriorityTier=10 PreemptMode=OFF
CONF
conf_changed=0; cmp -s etc/slurm.conf.new etc/slurm.conf 2>/dev/null || conf_changed=1
mv etc/slurm.conf.new etc/slurm.conf
export SLURM_CONF=$LAB/etc/slurm.conf

alive() { # pidfile, name: is it our daemon, still running (a zombie is not)?
  local p _ c s; p=$(cat "$1" 2>/dev/null) && [ -n "$p" ] && { read -r _ c s _ < "/proc/$p/stat"; } 2>/dev/null && [ "$c" = "($2)" ] && [ "$s" != Z ]; }
waitfor() { # seconds, command...
  local end=$(( $(date +%s%N)/1000000 + $1*1000 )); shift
  until "$@" >/dev/null 2>&1; do [ $(( $(date +%s%N)/1000000 )) -lt $end ] || return 1; sleep 0.05; done; }

# --- munge ----------------------------------------------------------------------------------
if ! alive run/munged.pid munged; then
  rm -f run/munge.socket*
  munged --key-file="$LAB/etc/munge.key" --socket="$LAB/run/munge.socket" --pid-file="$LAB/run/munged.pid" \
         --log-file="$LAB/log/munged.log" --seed-file="$LAB/run/munged.seed" </dev/null >/dev/null 2>>log/munged.err || die munged
fi
waitfor 10 munge -S "$LAB/run/munge.socket" -n || die "munge does not answer"

# --- accounting (optional) ------------------------------------------------------------------
if [ "$SACCT" = 1 ]; then
  if ! alive run/mariadbd.pid mariadbd; then
    [ -d db/mysql ] || { mkdir -p db; mariadb-install-db --no-defaults --user=root --datadir="$LAB/db" --skip-test-db --auth-root-authentication-method=normal >log/mariadb-install.log 2>&1 || die mariadb-install-db; }
    mariadbd --no-defaults --user=root --datadir="$LAB/db" --socket="$LAB/run/mysql.sock" --port=$SQLPORT --bind-address=127.0.0.1 \
      --pid-file="$LAB/run/mariadbd.pid" --innodb-buffer-pool-size=128M --innodb-flush-log-at-trx-commit=2 --skip-log-bin --skip-name-resolve --log-error="$LAB/log/mariadbd.log" </dev/null >/dev/null 2>&1 &
    waitfor 30 mariadb-admin --no-defaults --socket="$LAB/run/mysql.sock" ping || die mariadbd
  fi
  mariadb --no-defaults --socket="$LAB/run/mysql.sock" -e "CREATE DATABASE IF NOT EXISTS slurm_acct; CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct.* TO slurm@'127.0.0.1';" || die "mariadb grants"
  (umask 077; cat > etc/slurmdbd.conf <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$DBDPORT
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.socket
SlurmUser=root
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$SQLPORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CONF
  )
  # slurmdbd reads slurmdbd.conf from the directory of SLURM_CONF
  alive run/slurmdbd.pid slurmdbd || slurmdbd </dev/null >/dev/null 2>>log/slurmdbd.err || die slurmdbd
  waitfor 30 sacctmgr -n list cluster || die "slurmdbd does not answer"
fi

# --- slurmctld + slurmd's -------------------------------------------------------------------
if alive run/slurmctld.pid slurmctld; then
  [ $conf_changed = 1 ] && { scontrol reconfigure || true; }
else
  rm -f run/slurmctld.pid; slurmctld </dev/null >/dev/null 2>>log/slurmctld.err || die slurmctld
fi
waitfor 15 scontrol ping || die "slurmctld does not answer"
for n in $(seq "$N"); do
  alive "run/slurmd.gpu$n.pid" slurmd || { rm -f "run/slurmd.gpu$n.pid"; slurmd -N "gpu$n" </dev/null >/dev/null 2>>"log/slurmd.gpu$n.err" || die "slurmd gpu$n"; }
done
ready() { [ "$(sinfo -h -N -p gpu -t idle,mix,alloc -o %N | sort -u | wc -l)" = "$N" ]; }
if ! waitfor 5 ready; then
  scontrol update nodename="gpu[1-$N]" state=resume reason= 2>/dev/null || true   # after an unclean stop
  waitfor 30 ready || { sinfo -N -l >&2; die "nodes not ready"; }
fi
say "up in $(( ($(date +%s%N)-t0)/1000000 )) ms: $(sinfo -h -p gpu -o '%D x %N %t %G')"
echo "export SLURM_CONF=$LAB/etc/slurm.conf SLURM_LAB=$LAB"
