#!/usr/bin/env bash
# A real Slurm cluster of two nodes on one machine: slurm.sh up FOLDER | down FOLDER, as root.
#
# nodea is this machine, nodeb a network namespace of its own behind a veth pair, so that nothing
# can rely on loopback. Needs Debian's slurm-wlm, munge and iproute2. `up` ends when both nodes are
# idle; then SLURM_CONF=FOLDER/slurm.conf makes sbatch, srun and squeue talk to it.
set -eEuo pipefail
command=$1
folder=$(realpath "$2")
SUBNET=10.98.7
LINK=dpo0 # the same name on both sides, so that one GLOO_SOCKET_IFNAME would fit both
export SLURM_CONF="$folder/slurm.conf"

down() {
    local pid_file namespace="" pid
    [ -f "$folder/namespace" ] && namespace=$(<"$folder/namespace")
    for pid_file in "$folder"/*.pid; do
        [ -f "$pid_file" ] || continue
        pid=$(<"$pid_file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    if [ -n "$namespace" ]; then
        ip link del "$LINK" 2>/dev/null || true
        ip netns del "$namespace" 2>/dev/null || true
    fi
}

up() {
    local namespace="dpo-dist-$$"
    mkdir -p "$folder/state"
    echo "$namespace" >"$folder/namespace"
    ip link del "$LINK" 2>/dev/null || true # left by a test run that was killed
    ip netns add "$namespace"
    ip link add "$LINK" type veth peer name "$LINK" netns "$namespace"
    ip addr add "$SUBNET.1/24" dev "$LINK"
    ip link set "$LINK" up
    ip -n "$namespace" addr add "$SUBNET.2/24" dev "$LINK"
    ip -n "$namespace" link set "$LINK" up
    ip -n "$namespace" link set lo up

    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 0400 "$folder/munge.key"
    chmod 0755 "$folder"
    # --force: the folder of a test is not one that munge likes
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munge.seed" --num-threads=2 2>"$folder/munged.err"

    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)($SUBNET.1)
SlurmctldPort=16817
SlurmUser=root
AuthInfo=socket=$folder/munge.sock
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
# no cgroups in a container, and two nodes that each claim the cores of the whole machine
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
# quick on purpose: a lost step is noticed, and a waiting job started, within seconds
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=nodea NodeHostname=$(hostname) NodeAddr=$SUBNET.1 Port=16818 CPUs=4
NodeName=nodeb NodeHostname=$(hostname) NodeAddr=$SUBNET.2 Port=16819 CPUs=4
PartitionName=main Nodes=nodea,nodeb Default=YES MaxTime=INFINITE State=UP
CONF
    slurmctld -c 2>"$folder/slurmctld.err"
    slurmd -N nodea
    # nodeb has a folder of its own under $folder/blind: what a file system is that it does not see.
    # Not `ip netns exec`, which would hide the cgroups that slurmd looks for.
    mkdir -p "$folder/blind"
    # shellcheck disable=SC2016
    nsenter --net="/run/netns/$namespace" unshare --mount bash -c \
        'mount -t tmpfs none "$1" && exec slurmd -N nodeb' bash "$folder/blind"
    for _ in $(seq 100); do
        [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | tr -d ' ')" = 2 ] && return
        sleep 0.2
    done
    sinfo
    tail -n 20 "$folder"/*.log "$folder"/*.err
    return 1
}

case $command in
up)
    trap 'down' ERR
    up
    ;;
down) down ;;
*)
    echo "usage: slurm.sh up|down FOLDER" >&2
    exit 2
    ;;
esac
