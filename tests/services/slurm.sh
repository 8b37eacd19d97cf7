#!/usr/bin/env bash
# A SLURM cluster on this machine for tests: one controller and two nodes, each a slurmd of its own. Needs root.
#
#   slurm.sh up FOLDER             start it (again: only what is not running); prints nothing. FOLDER/slurm.conf is
#                                  SLURM_CONF. Without accounting, as on many small clusters; ended jobs are kept in
#                                  FOLDER/ended.txt (sacct --completion).
#   slurm.sh up FOLDER accounting  with slurmdbd on a MariaDB of its own; the controller forgets ended jobs at once.
#   slurm.sh down FOLDER           end its jobs and daemons
#
# A cluster has a hundred ports to itself: its daemons take the first ten, its jobs meet at the others (the number of a
# job chooses its port), so that clusters may run side by side.
set -euo pipefail
export PATH=/usr/sbin:/sbin:$PATH
verb=$1
root=$(realpath -m "$2")
accounting=${3:-}
nodes=2
here=$(dirname "$0")
export SLURM_CONF=$root/slurm.conf

# Some containers reap dead processes late, and a zombie still answers `kill -0`.
alive() { [ -s "$1" ] && grep -qs '^State:[[:space:]]*[^[:space:]ZX]' "/proc/$(cat "$1" 2>/dev/null)/status"; }

free_ports() {
    local port
    for _ in $(seq 100); do
        port=$((20000 + RANDOM % 100 * 100))
        (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || { echo $port; return 0; }
    done
    echo "slurm.sh: no free ports between 20000 and 30000" >&2
    return 1
}

wait_for() {
    for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
    echo "slurm.sh: waited 30 s for: $*" >&2
    tail -n 5 "$root"/*.log >&2 || true
    return 1
}

write_configuration() {
    local port=$1 host
    host=$(hostname)
    cat >"$SLURM_CONF" <<CONF
ClusterName=modsquad
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
FirstJobId=$((port - 20000 + 10))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that goes back into the queue waits for cred_expire (default: two minutes).
AuthInfo=socket=$root/munge.socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd-%n.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/slurmd-%n.log
# No cgroups, which containers seldom have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
GresTypes=gpu
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
MpiDefault=none
# Nodes may promise more cores than the machine has.
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=2
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
$(if [ "$accounting" ]; then accounting_lines $((port + 9)); else plain_lines; fi)
$(for i in $(seq $nodes); do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
done)
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
CONF
    # slurmd loads a cgroup plugin whatever the rest says; version 1 starts without any cgroup file system.
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$root/cgroup.conf"
    # Two GPUs, for counting: SLURM wants a device of each.
    printf 'Name=gpu File=%s\n' /dev/null /dev/zero >"$root/gres.conf"
    : >"$root/plugstack.conf"
    echo "PlugStackConfig=$root/plugstack.conf" >>"$SLURM_CONF"
}

plain_lines() {
    cat <<CONF
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$root/ended.txt
CONF
}

ready() { [ "$(sinfo --noheader --partition=normal --states=idle,alloc,mix --format=%D)" = "$nodes" ]; }

up() {
    mkdir -p "$root/state"
    for i in $(seq $nodes); do mkdir -p "$root/spool/node$i"; done
    chmod 755 "$root"
    [ -s "$root/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$root/munge.key")
    [ -s "$SLURM_CONF" ] || write_configuration "$(free_ports)"
    if ! alive "$root/munged.pid"; then
        rm -f "$root/munge.socket" "$root/munge.socket.lock"
        munged --force --socket="$root/munge.socket" --key-file="$root/munge.key" --pid-file="$root/munged.pid" \
            --log-file="$root/munged.log" --seed-file="$root/munged.seed" --num-threads=2
    fi
    if [ -e "$root/slurmdbd.conf" ]; then up_accounting; fi
    alive "$root/slurmctld.pid" || slurmctld
    for i in $(seq $nodes); do alive "$root/slurmd-node$i.pid" || slurmd -N "node$i"; done
    wait_for ready
}

stop() {
    local file=$1 program=$2 pid
    [ -s "$file" ] || return 0
    pid=$(cat "$file")
    # The number may belong to another program by now.
    case "$(readlink "/proc/$pid/exe" 2>/dev/null)" in
        */"$program" | */"$program"-wlm) ;;
        *) return 0 ;;
    esac
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do alive "$file" || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

down() {
    if alive "$root/slurmctld.pid"; then
        timeout 5 scancel --user="$(id -un)" || true
        for _ in $(seq 100); do [ -z "$(timeout 3 squeue --noheader 2>/dev/null)" ] && break; sleep 0.1; done
    fi
    for file in "$root"/slurmd-*.pid; do stop "$file" slurmd; done
    stop "$root/slurmctld.pid" slurmctld
    stop "$root/slurmdbd.pid" slurmdbd
    stop "$root/database/pid" mariadbd
    stop "$root/munged.pid" munged
}

# shellcheck source-path=SCRIPTDIR
. "$here/slurm_accounting.sh"
"$verb"
