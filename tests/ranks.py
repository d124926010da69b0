"""Two processes of torch.distributed on a CPU."""

import subprocess
import sys
import textwrap
from pathlib import Path

START = """
import copy, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import fastattn
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
"""
# past the end of the interpreter, where a thread of PyTorch's aborts now and then
END = """
import os
print("done", flush=True)
os._exit(0)
"""


def run_by_two_ranks(program: str, folder: Path) -> None:
    """The program has torch, dist, fastattn and its `rank`; it may import tests. Both have to come to its end."""
    path = folder / "program.py"
    path.write_text(START + textwrap.dedent(program) + END)
    command = [sys.executable, str(path)]
    arguments = [str(folder / "rendezvous"), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "done" in out, error[-2000:]
