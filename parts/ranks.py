"""Many processes at one model: what they share and split. One process is a special case throughout.

--shard is PyTorch's FSDP2, for where one device cannot hold what trains; a shard is a DTensor.
"""
import sys
import warnings
from dataclasses import dataclass
from typing import Optional

import torch
import torch.distributed as dist


@dataclass
class Ranks:
    """This process's number, of how many, and its device; made by loop.start_processes."""
    rank: int
    world: int
    device: torch.device
    lock: Optional[object] = None        # see loop.claim

    def sum(self, t):
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def first(self, function, *args):
        """function(*args) on rank 0 -> its value, on all ranks. If it raises ValueError or OSError
        all ranks end, rank 0 with the sentence."""
        result = [None, None]
        if self.rank == 0:
            try:
                result[0] = function(*args)
            except (ValueError, OSError) as error:
                result[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(result)
        if result[1]:
            sys.exit(result[1] if self.rank == 0 else 1)
        return result[0]

    def end(self):
        self.wait()
        if self.world > 1:
            dist.destroy_process_group()
        if self.lock:
            self.lock.close()


def shard(ranks, *models):
    """Splits each mixer and each MLP among the ranks, with its gradients and optimiser state; models
    may share them.

    It is put together on every rank while it runs, and gradients are summed as they are split again.
    Embeddings, head, norms and the vision tower stay whole: ranks call some of those a different
    number of times in a step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if ranks.world > 1:
        # FSDP2 warns of views among a module's outputs: the mixer's state, which training drops.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        layers = [layer for model in models for layer in model.layers]
        # Each once, though teacher and student share most; parts are taken from the CPU.
        for unit in dict.fromkeys(part for layer in layers for part in (layer.self_attn, layer.mlp)):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            # The loop divides by its count, so this is a sum; newer versions do it as one on CPUs.
            unit.set_reduce_scatter_divide_factor(1.0)
            getattr(unit, "set_force_sum_reduction_for_comms", lambda on: None)(True)
    for model in models:
        model.to(ranks.device)


def split_sharded(parameters):
    """-> the whole ones, the sharded ones: two kinds of tensors that no one operation may mix."""
    return [[p for p in parameters if hasattr(p, "full_tensor") == sharded]
            for sharded in (False, True)]


def gather_shard(t, ranks):
    """A shard put together, on rank 0 (None elsewhere); any other tensor as it is."""
    if not hasattr(t, "full_tensor"):
        return t
    t = t.full_tensor()
    return t.cpu() if ranks.rank == 0 else None


def load_like(t, like):
    """A checkpoint's whole tensor, on the device of `like` and split as it is."""
    if t.dim() and hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)
    # Copies, for t is a view of the checkpoint's file, which a later save removes. AdamW counts its
    # steps on the CPU, in a tensor without dimensions.
    return t.to(like.device, copy=True) if t.dim() else t.clone()


def reduce_gradients(ranks, parameters, count):
    """Gradients of the sum of losses over all ranks, divided by the count over all ranks."""
    for p in parameters:
        if p.requires_grad and p.grad is None:            # no use for it in this rank's samples
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in split_sharded(parameters)[0] if p.grad is not None]
    if ranks.world > 1 and grads:                         # those of shards are sums already
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, total in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(total.view_as(g))
    for p in parameters:
        if p.grad is not None:
            p.grad /= count


def clip_gradients(ranks, parameters, bound):
    """Scales gradients whose norm is above `bound` down to it. -> the norm before."""
    whole, shards = ([p.grad for p in part if p.grad is not None]
                     for part in split_sharded(parameters))
    shards = [g.to_local() for g in shards]
    square = torch.nn.utils.get_total_norm(whole).to(ranks.device) ** 2      # alike on all ranks
    norm = (square + ranks.sum(torch.nn.utils.get_total_norm(shards).to(ranks.device) ** 2)).sqrt()
    if norm > bound:
        torch._foreach_mul_(whole + shards, (bound / norm).item())
    return norm
