"""A real SLURM of two nodes on this machine, started and stopped by the tests; nothing of it is left behind."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")
PACKAGES = "slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
LINE = f"127.0.0.1 {' '.join(NODES)}  # of the tests\n"  # MASTER_ADDR is a node's name
# cred_expire: a requeued job waits that long, two minutes by default
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=5 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10
"""


def missing() -> str:
    """Why there can be no cluster here, empty when there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install --no-install-recommends {PACKAGES}"
    return "" if os.getuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """Commands of a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def call(self, *command: object, **more: str) -> str:
        """What a command printed; AssertionError with its complaint when it failed."""
        typed = [str(part) for part in command]
        done = subprocess.run(typed, env=self.env | more, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, (typed, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, …"""
        shown = self.call("scontrol", "show", "job", "-o", job)
        return next(part.partition("=")[2] for part in shown.split() if part.startswith("JobState="))

    def wait(self, what: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
        """Return when ``what`` holds; AssertionError with what ``told`` says when it does not in time."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, told()
            time.sleep(0.1)

    def finished(self, job: str) -> bool:
        """Whether a job has ended well; AssertionError when it has ended badly."""
        state = self.state(job)
        assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"), state
        return state == "COMPLETED"


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Two nodes that are idle, for as long as the context lasts."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster, daemons = Cluster(folder), []
    try:
        _write(folder)
        _name_nodes(True)
        munge = ["--foreground", "--force", "--num-threads=2", f"--socket={folder}/munge.socket"]
        munge += [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        daemons.append(_start(cluster, "munged", *munge))
        cluster.wait(lambda: (folder / "munge.socket").exists(), 20)
        daemons.append(_start(cluster, "slurmctld", "-D"))
        daemons += [_start(cluster, "slurmd", "-D", "-N", node) for node in NODES]
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        cluster.wait(lambda: _answer(cluster, idle) == "2", 60, lambda: _logs(folder))
        yield cluster
    finally:
        _stop(cluster, daemons)
        _name_nodes(False)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=ports))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)


def _name_nodes(known: bool) -> None:
    """Add our line to the hosts, or take it away, that of killed tests too. In place: containers mount the file."""
    others = HOSTS.read_text().replace(LINE, "")
    HOSTS.write_text(others + ("" if others.endswith("\n") or not others else "\n") + LINE if known else others)


def _start(cluster: Cluster, name: str, *arguments: str) -> subprocess.Popen:
    with (cluster.folder / f"{name}.out").open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig=TERM", name, *arguments],  # tests that are killed leave no daemon
            env=cluster.env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def _answer(cluster: Cluster, command: list[str]) -> str:
    done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.[lo][ou][gt]"))


def _stop(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Cancel what runs, wait for its last process, and end the daemons, the youngest first."""
    if len(daemons) > 1:
        user = pwd.getpwuid(os.getuid()).pw_name
        _answer(cluster, ["scancel", "--signal=KILL", "--full", f"--user={user}"])
        _answer(cluster, ["scancel", f"--user={user}"])
        deadline = time.monotonic() + 40
        while _answer(cluster, ["squeue", "--noheader"]) and time.monotonic() < deadline:
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
