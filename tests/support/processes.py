"""Start this test's functions in real processes that form a gloo group."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# what a child has to have so that it finds the modules that lie here, from wherever it is started
PATH = {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])}
TIMEOUT = 240  # seconds; a hang is a failure


def run(script: str, function: str, world: int, out: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` of tests/``script`` returns in each of ``world``
    processes.

    Raises:
        AssertionError: a process failed or hung; with its traceback.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "call").write_bytes(pickle.dumps((function, arguments)))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "FUSEDKD_TEST_OUT": str(out)}
    shared |= {"TRL_EXPERIMENTAL_SILENCE": "1", "LOCAL_WORLD_SIZE": str(world)}
    workers = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (out / f"log{rank}").open("wb")
        command = [sys.executable, str(HERE / script)]
        environment = {**os.environ, **PATH, **shared, **place}
        workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [worker.wait(TIMEOUT) for worker in workers]
    except subprocess.TimeoutExpired:
        codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    logs = [(out / f"log{rank}").read_text(errors="replace")[-3000:] for rank in range(world)]
    assert codes == [0] * world, f"exit codes {codes} (None: hung)\n" + "\n----\n".join(logs)
    return [pickle.loads((out / f"result{rank}").read_bytes()) for rank in range(world)]


def leave() -> None:
    """End this process once all have come here, and without destructors: with those, gloo now and
    then aborts (pytorch issue 190489), or its thread waits for the GIL of the one that joins it
    (75097)."""
    import torch.distributed as dist

    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(functions: dict[str, Any]) -> None:
    """To be called under ``if __name__ == "__main__"`` of the script."""
    import torch.distributed as dist

    rank, out = int(os.environ["RANK"]), Path(os.environ["FUSEDKD_TEST_OUT"])
    name, arguments = pickle.loads((out / "call").read_bytes())
    try:
        dist.init_process_group("gloo")
        result = functions[name](rank, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not waiting for the others in some destructor
    (out / f"result{rank}").write_bytes(pickle.dumps(result))
    leave()
