"""The parameters of a pass, by bucket, and the lists that the operators take of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

from .bucket import Bucket, telling_of

_grad = attrgetter("grad")


@dataclass
class Selection:
    """Some parameters of a bucket, by their rows, and their gradients of one pass.

    Attributes:
        telling: positions of a few that tell for all whether somebody has written to them.
        norm: that of exp_avg, along which these were perturbed, where w has no backup and is worked out from w'.
        elsewhere: w' while a signal's handler runs, where there is no backup to keep it in.
    """

    bucket: Bucket
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    offsets: Sequence[int]
    rows: Sequence[int]
    indices: Sequence[int]
    layouts: Tensor
    telling: Sequence[int]
    norm: Tensor | None = None
    elsewhere: list[Tensor] | None = None

    @classmethod
    def of(cls, bucket: Bucket) -> Selection:
        """All parameters of a bucket, without gradients."""
        return cls(
            bucket, bucket.params, (), bucket.offsets, bucket.rows, bucket.indices, bucket.layouts, bucket.telling
        )

    def at(self, positions: Sequence[int]) -> Selection:
        """The parameters at these positions of this selection, without gradients."""
        return Selection(
            self.bucket,
            [self.params[i] for i in positions],
            (),
            [self.offsets[i] for i in positions],
            [self.rows[i] for i in positions],
            [self.indices[i] for i in positions],
            self.layouts[list(positions)],
            telling_of(len(positions)),
            self.norm,
        )

    def with_grads(self, grads: Sequence[Tensor]) -> Selection:
        """The same parameters with these gradients."""
        others = (self.offsets, self.rows, self.indices, self.layouts, self.telling, self.norm)
        return Selection(self.bucket, self.params, grads, *others)

    def as_now(self) -> Selection:
        """The same parameters with the gradients that they have now."""
        return self.with_grads(list(map(_grad, self.params)))

    def trained(self) -> Selection:
        """What of these is trained, with exp_avg in the place of gradients."""
        positions = [i for i, param in enumerate(self.params) if param.requires_grad]
        chosen = self if len(positions) == len(self.params) else self.at(positions)
        return chosen.with_grads([self.bucket.averages[row] for row in chosen.rows])

    def with_gradients(self, last: Selection | None = None) -> Selection:
        """What of these has a gradient now, with it.

        last: such a choice of before, whose lists serve again if it is the same.
        """
        grads = [grad for grad in map(_grad, self.params) if grad is not None]
        chosen = self
        if len(grads) < len(self.params):
            positions = [i for i, param in enumerate(self.params) if param.grad is not None]
            same = last is not None and last.rows == [self.rows[i] for i in positions]
            chosen = last if last is not None and same else self.at(positions)
        return chosen.with_grads(grads)

    def backups(self) -> list[Tensor]:
        """The stretches of the bucket's backup that belong to these parameters."""
        return list(map(self.bucket.backup_of, self.rows))

    def lacks_hessian(self) -> bool:
        """Whether one of these parameters has never had a Hessian."""
        without = self.bucket.without_hessian
        return bool(without) and not without.isdisjoint(self.rows)

    def check_current(self) -> None:
        """ValueError where a parameter has changed its shape or memory format since its state was made."""
        for row in self.rows:
            self.bucket.check_current(row)


def chosen(buckets: Sequence[Bucket], last: dict[Bucket, Selection], with_averages: bool) -> list[Selection]:
    """Of each bucket what has a gradient, with it; or with_averages what is trained, with exp_avg for gradients.

    last: the choices of the call before, without gradients; their lists serve again where they are the same.
    """
    if with_averages:
        found = [Selection.of(bucket).trained() for bucket in buckets]
    else:
        found = [Selection.of(bucket).with_gradients(last.get(bucket)) for bucket in buckets]
        last.update({selection.bucket: selection.with_grads(()) for selection in found})
    return [selection for selection in found if selection.grads]


def with_gradients(selections: Sequence[Selection]) -> list[Selection]:
    """What of these selections has a gradient now, with it."""
    return [found for selection in selections if (found := selection.with_gradients()).grads]


def others_than(selections: Sequence[Selection], of: Sequence[Selection]) -> list[Selection]:
    """What is in the second of these, but not in the first, without gradients."""
    known = {param for selection in selections for param in selection.params}
    others = [(s, [i for i, param in enumerate(s.params) if param not in known]) for s in of]
    return [selection.at(positions) for selection, positions in others if positions]
