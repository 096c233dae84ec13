"""Every kernel of ssm.py, compiled for GPUs that are not there, and what the compiler made of it.

    python tests/aot.py 86 9B 9B-packed 90 8B       A10G and H100, each followed by its shapes;
    python tests/aot.py 90 56B                      a JSON line per kernel, 2 s each

A driver that only answers "which GPU?" stands in for CUDA and every launch stops after compiling,
so that the arguments are specialised (type, equal to 1, divisible by 16) as in a real launch.
Tensors are on the meta device: shapes and strides without memory. Works on Triton 3.6 to 3.9.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"        # as Triton has had it so far
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import ssm

SHAPES = {"9B": (128, 80, 8, 128), "8B": (128, 64, 8, 128), "56B": (256, 64, 8, 256)}  # h, p, g, n


class NoDriver:
    """Says which GPU to compile for and nothing else."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")


@contextlib.contextmanager
def compile_only(arch):
    """Collects (kernel name, kernel compiled to PTX) of every launch inside; nothing runs."""
    compiled, run, active = [], JITFunction.run, driver._active
    assemble = CUDABackend.make_cubin

    def compile(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))

    driver.set_active(NoDriver(arch))
    JITFunction.run, CUDABackend.make_cubin = compile, lambda *_: b""       # `facts` assembles
    try:
        yield compiled
    finally:
        JITFunction.run, CUDABackend.make_cubin, driver._active = run, assemble, active


def transposed_accumulators(ttir):
    """Dots with an operand that is a transposed dot result, in whatever way it came there.

    Follows values back from every tt.dot, through operations, branches and loops, but not through
    loads: a tt.trans on the way that can reach another tt.dot is the pattern. A name means what its
    region or one around it gave it: regions side by side use the same names again.
    """
    made_by = collections.defaultdict(list)                 # value -> (operation, operands), ...
    regions = [(None, [], {})]                              # result, carried values, names inside

    def define(name):
        value = regions[-1][2][name] = f"{name} of line {number}"
        return value

    def resolve(operand):
        name, _, k = operand.partition("#")
        value = next((names[name] for _, _, names in reversed(regions) if name in names), name)
        return value + f"#{k}" * bool(k)

    for number, line in enumerate(ttir.splitlines()):
        if line.strip().startswith("}") and len(regions) > 1:
            closed = regions.pop()
            if line.rstrip().endswith("else {"):
                regions.append((closed[0], [], {}))
        match = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?\"?([a-z_]+\.[\w.]+)", line)
        if not match:
            continue
        name, operation = match.groups()
        operands = [resolve(m) for m in re.findall(r"%\w+(?:#\d+)?", line.split(operation, 1)[1])]
        value = define(name) if name else None
        if operation in ("scf.for", "scf.if", "scf.while"):
            carried = re.findall(r"(%\w+) = (%[\w#]+)", line.partition("iter_args(")[2])
            starts = [resolve(start) for _, start in carried]
            regions.append((value, [], {}))
            regions[-1][1].extend(define(inner) for inner, _ in carried)
            for inner, start in zip(regions[-1][1], starts):
                made_by[inner].append((operation, [start]))
        elif line.rstrip().endswith("{"):
            regions.append((None, [], {}))                  # tt.func, tt.reduce and the like
        elif operation == "scf.yield":
            result, carried, _ = regions[-1]
            for k, operand in enumerate(operands):
                for target in (result, f"{result}#{k}", *carried[k:k + 1]):
                    made_by[target].append((operation, [operand]))
        elif value:
            made_by[value].append((operation, operands))

    def reaches(value, turned, seen):
        if (value, turned) in seen:
            return False
        seen.add((value, turned))
        return any(turned if operation == "tt.dot" else
                   any(reaches(m, turned or operation == "tt.trans", seen) for m in operands)
                   for operation, operands in made_by[value] if operation != "tt.load")

    dots = [operands for made in list(made_by.values()) for operation, operands in made
            if operation == "tt.dot"]
    return sum(reaches(operand, False, set()) for operands in dots for operand in operands[:2])


def facts(name, kernel):
    """What there is to judge about a compiled kernel."""
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    log = subprocess.run([get_ptxas(kernel.metadata.target.arch).path, "-v", f"--gpu-name={target}",
                          "-o", os.devnull, "-"], input=ptx, capture_output=True, text=True,
                         check=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return dict(kernel=name, shared=kernel.metadata.shared, spill=max(int(stores), int(loads)),
                registers=int(re.search(r"Used (\d+) registers", log).group(1)),
                wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"),
                dots=kernel.asm["ttir"].count("tt.dot "),
                transposed=transposed_accumulators(kernel.asm["ttir"]))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_everything(h, p, g, n, packed, t=8192):
    """Forward and backward of a layer's scan, batch 1, on views of the convolution's output."""
    fp32 = dict(dtype=torch.float32)
    xBC = empty(1, t, h * p + 2 * g * n).requires_grad_()
    x, B, C = xBC.split([h * p, g * n, g * n], -1)
    y, _ = ssm.ssd_triton(x.unflatten(2, (h, p)), empty(1, t, h, **fp32), empty(h, **fp32),
                          B.unflatten(2, (g, n)), C.unflatten(2, (g, n)), empty(h, **fp32),
                          seq_idx=empty(1, t, dtype=torch.int64) if packed else None)
    torch.autograd.grad(y, xBC, torch.empty_like(y))


def bad_kernels():
    """A dot's result transposed into another dot, straight, by a branch and by a loop: what the
    check above must find.
    """
    tl = ssm.tl

    @triton.jit
    def bad(a, b, out, n: tl.constexpr, turns, way: tl.constexpr):
        i = tl.arange(0, n)
        at = i[:, None] * n + i[None, :]
        right = tl.load(b + at)
        product = tl.dot(tl.load(a + at), right)
        if way == "branch":
            if turns > 1:
                product = product * 2
        if way == "loop":
            for _ in range(0, turns):
                product = tl.dot(tl.trans(product.to(tl.bfloat16)), right)
        else:
            product = tl.where(i[:, None] > i[None, :], product, 0.0).to(tl.bfloat16)
            product = tl.dot(tl.trans(product), right)
        tl.store(out + at, product)

    for way in ("straight", "branch", "loop"):
        bad[1,](empty(64, 64), empty(64, 64), empty(64, 64, dtype=torch.float32), n=64, turns=3,
                way=way)


def print_facts(arch, function, *arguments, **options):
    """Print a JSON line for every kernel that the function launches."""
    with compile_only(arch) as compiled:
        function(*arguments, **options)
    for name, kernel in compiled:
        print(json.dumps(dict(arch=arch) | options | facts(name, kernel)), flush=True)


def main(words):
    ssm.INTERPRETED = True                              # meta tensors are taken
    for word in words:
        if word.isdigit():
            arch = int(word)
            ssm.generation = lambda device: arch // 10
            print_facts(arch, bad_kernels)
        else:
            print_facts(arch, launch_everything, *SHAPES[word.removesuffix("-packed")],
                        packed=word.endswith("-packed"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main(sys.argv[1:])
