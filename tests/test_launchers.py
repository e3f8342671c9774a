"""Any launcher starts the same run: torchrun, SLURM's srun and two machines, one of which may vanish.

The machines are two network namespaces with a link between them; SLURM's commands are small stand-ins.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, logged, run_zero2, zero2_command
from test_commands import bash, write_program
from test_trainer import FAST, start

from train_llava.training.checkpointing import last_complete_checkpoint

RUN = [*FAST, "--train_type", "full", "--max_steps", "60", "--save_steps", "5", "--save_total_limit", "2"]
STEP = "SLURM_JOB_ID=30123 SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 MASTER_PORT="


VARIABLES = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"


def launched(folder: Path, settings: str) -> str:
    """The words that run_zero2.sh gives its launcher in front of the module, and the host file."""
    words = 'echo "${@: 1:$#-4}"; cat "$HOSTFILE" "$ERROR_DIR/hosts" 2>/dev/null || true'
    write_program(folder / "bin" / "deepspeed", words)
    torchrun, srun = f"-c*run.main*) shift 2; {words} ;;", f"-mtrain_llava.train) echo python3 -m {VARIABLES} ;;"
    write_program(
        folder / "bin" / "python3", f'case "$1$2" in {torchrun} {srun} *) exec {sys.executable} "$@" ;; esac'
    )
    done = bash(folder, f"{settings} bash {ROOT}/run_zero2.sh --data_path data", folder / "bin")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_zero2_starts_torchrun_and_finds_its_place_under_slurm(tmp_path):
    cpu = "DS_ACCELERATOR=cpu CPU_RANKS=2"
    assert launched(tmp_path, f"{cpu} LAUNCHER=torchrun") == "--master-port 1 --nproc-per-node 2 -m\n"
    hosts = "# two\na slots=8\nb slots=4\n"
    (tmp_path / "hosts").write_text(hosts)
    node = "LAUNCHER=torchrun HOSTFILE=hosts NODE_RANK=1 MASTER_ADDR=a"
    words = "--master-port 1 --nnodes 2 --node-rank 1 --master-addr a --nproc-per-node 4 -m\n"
    assert launched(tmp_path, node) == words + hosts
    # A task a node starts the node's ranks; more tasks are the ranks themselves
    hosts = "node0 slots=2\nnode1 slots=2\n"
    a_node = f"{cpu} {STEP} SLURM_STEP_NODELIST=gpu-[01-02] SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=1"
    words = launched(tmp_path, a_node).split(" --hostfile ")
    assert words[0] == "--master_port 20123 --log_level critical"
    assert words[1].partition(" ")[2] == "--master_addr gpu-01 --no_ssh --node_rank 1 --module\n" + hosts
    words = "--master-port 20123 --nnodes 2 --node-rank 1 --master-addr gpu-01 --nproc-per-node 2 -m\n"
    assert launched(tmp_path, f"{a_node} LAUNCHER=torchrun") == words + hosts
    for nodes, first in (("a,b", "a"), ("gpu-[01-04,07],x", "gpu-01"), ("n[3,5]", "n3"), ("r[1-2]-ib,c", "r1-ib")):
        a_rank = f"SLURM_STEP_NODELIST={nodes} SLURM_STEP_NUM_TASKS=16 SLURM_STEP_TASKS_PER_NODE='8(x2)'"
        place = launched(tmp_path, f"{STEP} {a_rank} SLURM_PROCID=11 SLURM_LOCALID=3")
        assert place == f"python3 -m 11 3 16 8 {first} 20123\n"
    for settings, message in (
        ("LAUNCHER=torchrun HOSTFILE=hosts", "torchrun starts one node: set NODE_RANK and MASTER_ADDR"),
        ("LAUNCHER=srun", "LAUNCHER=srun is none of deepspeed, torchrun and, in a step of SLURM, srun"),
    ):
        done = bash(tmp_path, f"{settings} bash {ROOT}/run_zero2.sh --data_path data", tmp_path / "bin")
        assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, 10.9.0.1 and 10.9.0.2, with a link between them."""
    names = [f"llava{os.getpid()}-{i}" for i in range(2)]
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, check=False).returncode:
        pytest.skip("takes root and iproute2")
    commands = [f"netns add {names[1]}", f"link add link0 netns {names[0]} type veth peer name link1 netns {names[1]}"]
    for i, name in enumerate(names):
        commands += [f"-n {name} addr add 10.9.0.{i + 1}/24 dev link{i}", f"-n {name} link set link{i} up"]
        commands.append(f"-n {name} link set lo up")
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
    yield names
    for name in names:
        for process in pids(name):
            os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=True)


def pids(machine: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def start_on(machines: list[str], command: list, environment: dict, launcher: str, hosts: Path) -> list:
    """Starts a node of a run on each machine."""
    hosts.write_text("first slots=1\nsecond slots=1\n")
    environment = environment | {"HOSTFILE": str(hosts), "MASTER_ADDR": "10.9.0.1", "LAUNCHER": launcher}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment | {"NODE_RANK": str(i), "GLOO_SOCKET_IFNAME": f"link{i}"}, text=True,
        )
        for i, name in enumerate(machines)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(llava, corpus, tmp_path_factory) -> list[float]:
    """The losses of the unbroken run, on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run_zero2(llava, corpus, folder, *RUN)
    assert done.returncode == 0, done.stderr[-3000:]
    return logged(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "victim", "link"), [("torchrun", 1, "up"), ("deepspeed", 0, "down")])
def test_a_machine_that_vanishes_ends_the_run_with_one_line(
    llava, corpus, whole, tmp_path, machines, launcher, victim, link
):
    """Its processes are killed or, as at a power cut, its link goes first. The run then goes on to the same losses."""
    command, environment = zero2_command(llava, corpus, tmp_path / "run", *RUN)
    nodes = start_on(machines, command, environment, launcher, tmp_path / "hosts")
    while last_complete_checkpoint(str(tmp_path / "run")) is None:
        assert nodes[0].poll() is None, nodes[0].communicate()[0][-3000:]
        time.sleep(0.02)
    subprocess.run(["ip", "-n", machines[victim], "link", "set", f"link{victim}", link], check=True)
    for process in pids(machines[victim]):
        os.kill(process, signal.SIGKILL)
    output = nodes[1 - victim].communicate(timeout=120)[0]
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert nodes[1 - victim].returncode == 1, output[-3000:]
    assert len(lines) == 1, output[-3000:]
    assert lines[0].startswith("error: another rank has ended or cannot be reached (")
    assert "Traceback" not in output
    subprocess.run(["ip", "-n", machines[victim], "link", "set", f"link{victim}", "up"], check=True)
    command += ["--resume_from_checkpoint", "true"]
    for node in start_on(machines, command, environment, launcher, tmp_path / "hosts"):
        output = node.communicate(timeout=240)[0]
        assert node.returncode == 0, output[-3000:]
    assert logged(tmp_path / "run") == pytest.approx(whole, abs=1e-5)


SRUN = """\
# two tasks, each on a machine of its own
i=0
for machine in $MACHINES; do
  export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_TASKS_PER_NODE="1(x2)"
  export SLURM_STEP_NODELIST="10.9.0.[1-2]" SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 GLOO_SOCKET_IFNAME=link$i
  ip netns exec $machine "${@:2}" & tasks="${tasks:-} $!"
  i=$((i + 1))
done
echo $tasks >$TASKS
for task in $tasks; do wait $task || exit 1; done"""


@pytest.mark.slow
def test_a_job_of_slurm_saves_before_its_time_is_over_and_goes_on(llava, corpus, whole, tmp_path, machines):
    write_program(tmp_path / "bin" / "srun", SRUN)
    write_program(tmp_path / "bin" / "scancel", 'echo scancel "$@" >>$CALLS; kill -TERM $(cat $TASKS)')
    write_program(tmp_path / "bin" / "scontrol", 'echo scontrol "$@" >>$CALLS')
    command, environment = zero2_command(llava, corpus, tmp_path / "run", *RUN)
    environment |= {"PATH": f"{tmp_path / 'bin'}:{environment['PATH']}", "MACHINES": " ".join(machines)}
    environment |= {"TASKS": str(tmp_path / "tasks"), "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7"}
    command = ["bash", "recipes/slurm.sbatch", *command[2:]]
    job = start(command, environment, tmp_path / "run", "checkpoint-5")
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=120)[0].decode()
    assert job.returncode == 0, output[-3000:]
    assert "SIGTERM: ending at step " in output
    assert (tmp_path / "calls").read_text() == "scancel --signal=TERM 7\nscontrol requeue 7\n"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from " in done.stdout
    assert (tmp_path / "calls").read_text().count("\n") == 2  # a job that has ended does not ask for more time
    assert logged(tmp_path / "run") == pytest.approx(whole, abs=1e-5)
