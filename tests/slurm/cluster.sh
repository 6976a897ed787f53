#!/usr/bin/env bash
# A throwaway SLURM on this machine's loopback: one controller, N nodes that are made up, no accounting.
#
#   cluster.sh with N COMMAND ...   runs a command while it is up, and takes it down
#
# Needs root, and slurmctld, slurmd, slurm-client and munge installed (apt-get). Everything lives in one temporary folder;
# no configuration of the system is read or changed. MASTER_ADDR stands for the names of the nodes, which nobody knows.
set -euo pipefail

nodes=${2:-2}
[ "${1:-}" = with ] && [ $# -gt 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
shift 2
[ "$(id -u)" = 0 ] || { echo "cluster.sh: must be root to be a cluster" >&2; exit 2; }
for program in munged slurmctld slurmd sbatch srun; do
  command -v "$program" >/dev/null || { echo "cluster.sh: $program is missing: apt-get install slurmctld slurmd slurm-client munge" >&2; exit 2; }
done

lab=$(mktemp -d "${TMPDIR:-/tmp}/slurm-XXXXXX")
mkdir "$lab/munge" "$lab/state" "$lab/log"
chmod 755 "$lab" "$lab/munge"
port=$(( 20000 + RANDOM % 20000 ))
host=$(hostname -s)
export SLURM_CONF="$lab/slurm.conf"
pids=()

stop() {
  timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null || true
  for _ in $(seq 60); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep .5; done
  for (( i = ${#pids[@]} - 1; i >= 0; i-- )); do
    # The number may by now belong to another process.
    case "$(cat "/proc/${pids[i]}/comm" 2>/dev/null)" in munged | slurmctld* | slurmd*) kill "${pids[i]}" || true ;; *) continue ;; esac
    for _ in $(seq 50); do kill -0 "${pids[i]}" 2>/dev/null || break; sleep .1; done
  done
  rm -rf "$lab"
}
trap stop EXIT

(umask 077; head -c 128 /dev/urandom > "$lab/munge/munge.key")
munged --key-file="$lab/munge/munge.key" --socket="$lab/munge/socket" --pid-file="$lab/munge/munged.pid" \
  --log-file="$lab/log/munged.log" --seed-file="$lab/munge/seed" --num-threads=2 --force 2>> "$lab/log/munged.err"
pids+=("$(cat "$lab/munge/munged.pid")")

# cred_expire: a requeued job waits so long before it starts again, by default two minutes.
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket,cred_expire=5
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool.%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd.%n.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerParameters=sched_interval=2,batch_sched_delay=1
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
JobRequeue=1
RequeueExit=99
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=128 RealMemory=1000000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld -f "$SLURM_CONF" -c
for i in $(seq "$nodes"); do mkdir "$lab/spool.node$i"; slurmd -f "$SLURM_CONF" -N "node$i"; done
for file in "$lab/slurmctld.pid" $(seq -f "$lab/slurmd.node%g.pid" "$nodes"); do
  for _ in $(seq 100); do [ -s "$file" ] && break; sleep .1; done
  pids+=("$(cat "$file")")
done
for _ in $(seq 100); do
  if [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ]; then up=1; break; fi
  sleep .2
done
[ "${up:-0}" = 1 ] || { echo "cluster.sh: the nodes did not become idle" >&2; tail -n 20 "$lab"/log/*.log >&2; exit 1; }
status=0
"$@" || status=$?
exit "$status"
