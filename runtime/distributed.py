"""Where a rank stands in TP × KVP × SPP, and what it says to the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from runtime.attention import Partial, merge
from runtime.cores import calm_gloo
from runtime.stage_line import StageLine
from specs import ParallelSpec


class Mesh:
    """One rank among tp × kvp × spp: rank = (stage · kvp + group) · tp + shard.

    A mesh of one rank talks to nobody and needs no process group.
    """

    def __init__(self, parallel: ParallelSpec, rank: int = 0) -> None:
        self.tp, self.kvp, self.spp = parallel.tp, parallel.kvp, parallel.spp
        self.rank = rank
        self.stage, rest = divmod(rank, self.kvp * self.tp)
        self.group, self.shard = divmod(rest, self.tp)
        self._tp_group: dist.ProcessGroup | None = None
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._line_on: StageLine | None = None  # to the next stage, on CPUs
        self._line_back: StageLine | None = None

    def connect(self, store: Store, device: torch.device, timeout_s: float) -> None:
        """Meet the other ranks: gloo between CPUs, with lines of its own between
        stages, NCCL between GPUs. A collective that takes longer than
        ``timeout_s`` fails."""
        world = self.tp * self.kvp * self.spp
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        if self.tp > 1:
            for first in range(0, world, self.tp):  # every rank has to make every group
                group = dist.new_group(list(range(first, first + self.tp)))
                if first <= self.rank < first + self.tp:
                    self._tp_group = group
        if device.type == "cpu":
            calm_gloo()
            self._meet_stages(store)

    def _meet_stages(self, store: Store) -> None:
        # The last stage answers first, since it calls nobody; then the one before it, which has called it.
        if self.stage < self.spp - 1:
            self._line_on = StageLine.call(store, f"stage line {self.rank}")
        if self.stage > 0:
            self._line_back = StageLine.answer(store, f"stage line {self.rank_of(stage=self.stage - 1)}")

    def disconnect(self) -> None:
        """Leave the process group, and the stages before and after."""
        for line in (self._line_on, self._line_back):
            if line is not None:
                line.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def rank_of(self, *, stage: int | None = None, group: int | None = None) -> int:
        """The rank with this one's place in the dimensions that aren't given."""
        stage = self.stage if stage is None else stage
        group = self.group if group is None else group
        return (stage * self.kvp + group) * self.tp + self.shard

    # -- tensor parallelism -----------------------------------------------------------------------------

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the tensor-parallel ranks, in place."""
        if self.tp > 1:
            dist.all_reduce(x, group=self._tp_group)
        return x

    def gather_columns(self, x: Tensor) -> Tensor:
        """[rows, columns] of each tensor-parallel rank as [rows, tp · columns]."""
        if self.tp == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp)]
        dist.all_gather(parts, x.contiguous(), group=self._tp_group)
        return torch.cat(parts, dim=-1)

    # -- pipeline stages --------------------------------------------------------------------------------

    def send_on(self, x: Tensor) -> None:
        """Hand activations to the next stage; returns before they are there, on CPUs as long as the system
        holds what hasn't been received: some 4 MB."""
        if self._line_on is not None:
            self._line_on.send(x)
            return
        while len(self._sent) >= self.spp:
            work, _ = self._sent.popleft()
            work.wait()
        sending = dist.isend(x, self.rank_of(stage=self.stage + 1))
        assert sending is not None
        self._sent.append((sending, x))

    def receive(self, x: Tensor) -> Tensor:
        """Fill ``x`` with the activations that the previous stage sent next."""
        if self._line_back is not None:
            self._line_back.receive(x)
            return x
        dist.recv(x, self.rank_of(stage=self.stage - 1))
        return x

    # -- KV parallelism ---------------------------------------------------------------------------------

    def merge_shards(
        self, out: Tensor, lse: Tensor, shared: Sequence[tuple[slice, tuple[int, ...]]]
    ) -> Tensor:
        """Merge this group's partial attention with that of the other groups that take part.

        Args:
            out: [tokens, heads, head_dim] over this group's keys; overwritten.
            lse: [tokens, heads].
            shared: rows and groups of each piece that several groups take part in; every group has the
                same pieces in the same order, if in other rows.
        """
        received: dict[int, list[Partial]] = {}
        buffers: dict[int, tuple[Tensor, Tensor]] = {}
        transfers = []
        for peer in sorted({group for _, groups in shared for group in groups} - {self.group}):
            mine = [rows for rows, groups in shared if peer in groups]
            to_send = _pack(torch.cat([out[rows] for rows in mine]), torch.cat([lse[rows] for rows in mine]))
            to_receive = torch.empty_like(to_send)
            buffers[peer] = (to_send, to_receive)
            other = self.rank_of(group=peer)
            transfers += [dist.P2POp(dist.isend, to_send, other), dist.P2POp(dist.irecv, to_receive, other)]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        for peer, (_, buffer) in buffers.items():
            sizes = [rows.stop - rows.start for rows, groups in shared if peer in groups]
            outs, lses = _unpack(buffer, out, lse, sum(sizes))
            received[peer] = list(zip(torch.split(outs, sizes), torch.split(lses, sizes), strict=True))[::-1]
        for rows, groups in shared:
            # In shard order, which is the same for everybody: all groups go on with equal bits.
            parts = [
                (out[rows], lse[rows]) if group == self.group else received[group].pop() for group in groups
            ]
            out[rows] = merge(parts)[0]
        return out


def _pack(out: Tensor, lse: Tensor) -> Tensor:
    """Both as one run of bytes, the fp32 first."""
    return torch.cat([lse.reshape(-1).view(torch.uint8), out.reshape(-1).view(torch.uint8)])


def _unpack(buffer: Tensor, out: Tensor, lse: Tensor, tokens: int) -> Partial:
    """The inverse of :func:`_pack`, in the types and shapes of ``out`` and ``lse``, for ``tokens`` rows."""
    border = tokens * lse[0].numel() * lse.element_size()
    packed_lse, packed_out = buffer[:border].view(lse.dtype), buffer[border:].view(out.dtype)
    return packed_out.view(tokens, *out.shape[1:]), packed_lse.view(tokens, *lse.shape[1:])
