"""A script in several processes, in each mode of examples/configs/, and on a machine without GPUs too."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
MODES = ("single", "ddp", "fsdp2", "zero2", "zero3")


def launch(mode: str, processes: int, script, *arguments, device: str = "cpu", timeout: float | None = None):
    """Run a script to its end: as it is ("single"), or under accelerate with the launch file of the mode.

    On the CPU (gloo), of which accelerate would start one process, DDP goes through torchrun; the script calls
    `shard_on_cpu` before it trains. timeout: seconds. Returns a `CompletedProcess` with its output as text.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    if mode == "single":
        launcher = []
    elif mode == "ddp" and device == "cpu":
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port]
    else:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{mode}.yaml")]
        launcher += ["--num_processes", str(processes), "--main_process_port", port]
    # DeepSpeed finds ninja, with which it builds what it needs, on the path.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launcher, script, *arguments]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=timeout)


def shard_on_cpu(mode: str) -> None:
    """accelerate chooses FSDP and DeepSpeed on accelerators only: let it take the CPU for one, with gloo.

    For trials of a mode without GPUs: it changes accelerate and transformers in this process.
    """
    import accelerate.state
    import transformers.training_args

    def backend(self, *args, **kwargs):
        return "gloo", accelerate.state.DistributedType.MULTI_GPU

    def device(self):
        self.device = torch.device("cpu")

    if mode == "single":
        return
    accelerate.state.PartialState.set_device = device  # not cpu:0, where torch.load finds nothing
    if mode != "ddp":
        accelerate.state.PartialState._prepare_backend = backend
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True


class AllGathers(TorchDispatchMode):
    """Counts calls inside it, and the elements and bytes that this process has after them."""

    def __init__(self):
        super().__init__()
        self.calls = self.elements = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allgather" in str(function):
            self.calls += 1
            for output in tree_leaves(args[0]):
                self.elements += output.numel()
                self.bytes += output.numel() * output.element_size()
        return function(*args, **kwargs or {})
