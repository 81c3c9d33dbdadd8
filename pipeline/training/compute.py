"""In which numbers, memory layout and form a run is computed. Fixed for a run: another choice rounds otherwise."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_APART, _NOISE = 0.25, 1e-3  # of a tensor's norm, of the largest one's: what reduced precision may do to a gradient
_SIDES = 64  # shapes a compiled model may meet: images that grow, the last batch of an evaluation


@dataclass(frozen=True)
class ComputeConfig:
    """How the forward and backward passes are computed. Weights, optimiser, averages and evaluation stay float32."""

    precision: str = "fp32"
    """fp32; bf16: matrix products in bfloat16 (autocast); fp16: in float16, the loss scaled by what fits."""
    channels_last: bool = False
    """Images with their channels innermost (NHWC), as tensor cores and oneDNN want them."""
    compile: bool = False
    """torch.compile; the result is kept in ~/.cache/millstream (or TORCHINDUCTOR_CACHE_DIR) for the next start."""
    sync_bn: bool = False
    """Batch norm over the whole step instead of each micro-batch. Only where as many workers as micro-batches train."""

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: use one of {', '.join(PRECISIONS)}")

    def autocast(self, device) -> contextlib.AbstractContextManager:
        """What the forward pass is computed under."""
        kind, dtype = torch.device(device).type, PRECISIONS[self.precision]
        return torch.autocast(kind, dtype) if dtype else contextlib.nullcontext()

    def scaler(self, device) -> torch.amp.GradScaler | None:
        """Of fp16's loss: small gradients would vanish without."""
        return torch.amp.GradScaler(torch.device(device).type) if self.precision == "fp16" else None

    def laid_out(self, module: nn.Module) -> nn.Module:
        """The module in the memory layout and with the batch norm of this configuration; names stay what they are."""
        if self.sync_bn:
            _synchronise(module)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def compiled(self, module: nn.Module) -> None:
        """Has the module's calls compiled, in place. `module.forward` stays as it was, for other shapes."""
        if not self.compile:
            return
        cache = os.path.join(os.path.expanduser("~"), ".cache", "millstream", "compiled")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SIDES)
        module.compile(dynamic=False)


def check_compiled(module: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """ValueError unless the compiled module has the gradients that it has without: torch 2.13 leaves out those of
    some max poolings on CPUs, without a word. `loss()`: of some images, drawing the same random numbers each time."""
    if module._compiled_call_impl is None:
        return
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    try:
        plain = torch.autograd.grad(loss(), list(parameters.values()))
        module._compiled_call_impl = compiled
        found = torch.autograd.grad(loss(), list(parameters.values()))
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = " ".join(str(error).partition("Set TORCH")[0].split())
        raise ValueError(f"--compile: this machine cannot compile the model ({why}): leave it out") from None
    finally:
        module._compiled_call_impl = compiled
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.copy_(old)
    norms = torch.stack(torch._foreach_norm(plain))
    away = torch.stack(torch._foreach_norm(torch._foreach_sub(plain, found)))
    # What is zero but for rounding (a bias before a norm) may differ as much as it likes.
    if (bad := (~(away <= _APART * norms + _NOISE * norms.max())).nonzero()).numel():
        name, at = list(parameters)[int(bad[0])], int(bad[0])
        raise ValueError(
            f"torch {torch.__version__} compiles this model wrongly on this machine: the gradient of {name} is off by "
            f"{away[at] / norms[at]:.0%}; leave out --compile"
        )


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose mean and variance are those of all ranks' images together.

    torch's own is for GPUs alone; this one sums over any process group, and is plain batch norm outside of one. Every
    rank must bring as many images.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(images)
        kept, images, ranks = images.dtype, images.float(), dist.get_world_size()
        count = images.numel() // images.shape[1] * ranks
        sums = _Sum.apply(torch.cat([images.sum((0, 2, 3)), images.square().sum((0, 2, 3))]))
        mean, square = sums.div(count).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_(var.detach() * (count / (count - 1)), share)
        scale = (var + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], images, scale[:, None, None]).to(kept)


class _Sum(torch.autograd.Function):
    """The sum over the ranks; so is its gradient, since every rank's loss hangs on it."""

    @staticmethod
    def forward(context, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _synchronise(module: nn.Module) -> None:
    for inside in module.modules():
        if type(inside) is nn.BatchNorm2d:
            inside.__class__ = SyncBatchNorm2d  # the same parameters, buffers and names
