"""The example that writes a cache with Ray Data; `make test-ray` installs Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import byte_llama
import pytest

from fusedkd.cache import verify
from fusedkd.cli import main

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="Ray is not installed: `make test-ray`")

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import sys
import ray, ray_cache
ray.init(num_cpus=4, include_dashboard=False)
print(ray_cache.main(sys.argv[1:]), "tokens")
"""


def workers(parent: int) -> Iterator[int]:
    """Ray's actors with a teacher, below this process."""
    for child in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
        try:
            name = Path(f"/proc/{child}/cmdline").read_bytes()
            yield from workers(child)
        except OSError:  # it has ended
            continue
        if name.startswith(b"ray::") and b"MapWorker" in name:
            yield child


@pytest.mark.parametrize("kept", [("--top-k", "20"), ("--hidden", "int8")], ids=["top", "int8"])
def test_two_actors_of_which_one_is_killed(tmp_path: Path, kept: tuple[str, str]) -> None:
    teacher, data, output = tmp_path / "teacher", tmp_path / "text.txt", tmp_path / "cache"
    byte_llama.build(0).save_pretrained(teacher)
    byte_llama.tokenizer().save_pretrained(teacher)
    data.write_text("\n\n".join(path.read_text() for path in sorted(EXAMPLES.glob("*.py"))))
    words = ["--teacher", str(teacher), "--data", str(data), "--shard-mb", "0.004", *kept]
    words += ["--batch-size", "2"]
    paths = [str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    call = [sys.executable, "-c", RUN, *words, "--max-length", "32", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    killed = []
    with subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True) as run:
        while run.poll() is None:
            if not killed and len(list(output.glob("shard-*.json"))) > 5:
                killed = [*workers(run.pid)][:1]
                for worker in killed:
                    os.kill(worker, signal.SIGKILL)
            time.sleep(0.01)
        said = run.stdout.read() if run.stdout else ""
    assert run.returncode == 0 and len(killed) == 1
    assert "tokens" in said and verify(output)[1] == []
    whole = ["cache", *words, "--max_length", "32", "--output", str(tmp_path / "whole")]
    assert main([*whole, "--device", "cpu"]) == 0
    one, other = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "whole", output)
    )
    assert one == other and len(one) > 30
