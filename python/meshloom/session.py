"""Any PyTorch model under an HDP plan: slices, attention over the ranks of a unit, gradient sums.

A step: `PlanSession.plan(documents)` gives this rank's units; each is run forward and backward with
`attention` (or a model whose attention is `meshloom`, see meshloom.integrations.transformers) and
its `weighted_loss`; `sync_gradients` then sums over ranks. What comes out is the gradient of the mean
loss over all targets of all documents, whatever the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from meshloom import _runtime, planning
from meshloom._errors import InvalidArgument, PlanError
from meshloom._plan import CostModel, Layout, SampleInfo, StepPlan

if TYPE_CHECKING:
    from meshloom import _core
else:
    _core = _runtime.core

# Elements of one all-reduce: few calls, and little memory beside the gradients.
_BUCKET_ELEMENTS = 1 << 24
_NO_TARGET = -100


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, share: Any, scale: float, window: int
    ) -> torch.Tensor:
        out, lse = share.attention_forward(q, k, v, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (share, scale, window)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        share, scale, window = ctx.rest
        dq, dk, dv = share.attention_backward(dout.contiguous(), q, k, v, out, lse, scale, window)
        return dq, dk, dv, None, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    unit: PlannedUnit,
    scale: float | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of this rank's tokens over whole documents; differentiable.

    q [T, Hq, D]; k, v [T, Hkv, D] with Hkv dividing Hq; T tokens in the unit's order. `window`: tokens
    a query sees, itself included; 0: all before it. Every rank of the unit makes the same calls in the
    same order, backward included. Returns [T, Hq, D].
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    idle = unit.share.tokens.numel() == 0
    if idle:  # the one token stands for none: it sees nothing, and nobody sees it
        padding = torch.zeros_like(q[:1])
        q, k, v = q[:0], k[:0], v[:0]
    q, k, v = (x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in (q, k, v))
    out: torch.Tensor = _Attention.apply(q, k, v, unit.share, scale, window)  # type: ignore[no-untyped-call]
    return torch.cat([out, padding]) if idle else out


@dataclass(frozen=True)
class PlannedUnit:
    """This rank's share of a unit of the plan.

    A share may hold no token, where documents are shorter than the unit has ranks. Models can't run on
    none, so it then holds one that is no target and that no other sees: T is 1, and its gradients are 0.
    """

    slot: int
    ranks: list[int]
    samples: list[int]
    share: _core.UnitShare = field(repr=False)
    loss_tokens_of_step: int = field(repr=False)

    @staticmethod
    def _or_one(values: torch.Tensor, value: int) -> torch.Tensor:
        return values if values.numel() else values.new_full((1,), value)

    @property
    def tokens(self) -> torch.Tensor:
        """Token ids, int64 [T]: document by document, of each this rank's two ranges."""
        return self._or_one(self.share.tokens, 0)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token in its document, int64 [T]."""
        return self._or_one(self.share.positions, 0)

    @property
    def labels(self) -> torch.Tensor:
        """The next token of the document, -100 where it is no target, int64 [T]."""
        return self._or_one(self.share.labels, _NO_TARGET)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keywords for a transformers model whose attention implementation is `meshloom`."""
        return {
            "input_ids": self.tokens[None],
            "position_ids": self.positions[None],
            "use_cache": False,
            "meshloom_unit": self,
        }

    def weighted_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """This share's part of the mean cross-entropy over all targets of the step.

        logits [T, vocabulary] or [1, T, vocabulary]. Summed over units and ranks it is the loss.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        total = torch.nn.functional.cross_entropy(flat, self.labels, ignore_index=_NO_TARGET, reduction="sum")
        return total / self.loss_tokens_of_step


class PlanSession:
    """Plans each batch of documents over a communicator's ranks. Every rank makes the same calls."""

    def __init__(
        self,
        world: _core.Communicator,
        *,
        capacity_tokens: int,
        strategy: planning.Strategy = "balanced",
        cost: CostModel | None = None,
        exchanges: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        """`capacity_tokens`: most tokens of one unit on one rank; `exchanges`: as in meshloom.plan."""
        self.world = world
        self.capacity_tokens = capacity_tokens
        self.last_plan: StepPlan | None = None
        self._strategy = planning.instance(strategy)
        self._cost = cost
        self._exchanges = exchanges
        self._device = torch.device(device)
        self._step = 0

    def plan(self, documents: Sequence[Any]) -> Iterator[PlannedUnit]:
        """This rank's units of one step, in order; document i is sample i.

        Documents are meshloom.data.Document, mappings {tokens, loss_mask}, or token lists, the same on
        every rank. Raises PlanError where the ranks' plans differ, InvalidArgument without a target.
        """
        source = _core.documents_of_sequence(list(documents), "batch")
        loaded = {index: source[index] for index in range(len(source))}
        plan = planning.plan(
            [
                SampleInfo(id=index, tokens=len(document), loss_tokens=document.loss_tokens)
                for index, document in loaded.items()
            ],
            layout=Layout(hdp=self.world.size), capacity_tokens=self.capacity_tokens,
            strategy=self._strategy, cost=self._cost, exchanges=self._exchanges, step=self._step,
        )
        self._check_equal(plan)
        self._step += 1
        self.last_plan = plan
        targets = plan.total_loss_tokens()
        if targets == 0:
            raise InvalidArgument(f"[session.plan] none of {len(loaded)} documents has a target")
        return self._units(plan, loaded, targets)

    def _units(
        self, plan: StepPlan, documents: dict[int, _core.Document], targets: int
    ) -> Iterator[PlannedUnit]:
        for slot, placed in enumerate(plan.slots):
            for index, unit in enumerate(placed.units):
                if self.world.rank not in unit.ranks:
                    continue
                mine: Any = {sample: documents[sample] for sample in unit.samples}
                share = _core.UnitShare(plan, slot, index, self.world, mine, self._device)
                yield PlannedUnit(slot, list(unit.ranks), list(unit.samples), share, targets)

    def _check_equal(self, plan: StepPlan) -> None:
        own = torch.tensor([plan.hash() & (2**62 - 1)])
        hashes = self.world.all_gather(own, [1] * self.world.size).result().tolist()
        odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if odd:
            raise PlanError(
                f"[session.plan] step {self._step}: ranks {odd} planned otherwise than rank 0; every"
                " rank has to give the same documents and options"
            )

    def sync_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums `.grad` over ranks, in fp32 or wider. Call it once after the step's last backward."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        bucket: list[torch.nn.Parameter] = []
        size = 0
        for parameter in trained:
            if bucket and (size + parameter.numel() > _BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
                self._sum(bucket)
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        if bucket:
            self._sum(bucket)

    def _sum(self, bucket: list[torch.nn.Parameter]) -> None:
        wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
        flat = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(wide) for p in bucket
        ])
        self.world.all_reduce_(flat, purpose="gradients").wait()
        offset = 0
        for parameter in bucket:
            part = flat[offset : offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
            parameter.grad = part if parameter.grad is None else parameter.grad.copy_(part)
            offset += parameter.numel()
