"""The check of a cell that declares by ``row_groups()`` which entries of its state depend on which."""

from collections.abc import Iterator

import torch

from rtrl.cells.row_groups import check_row_groups, declared_groups
from rtrl.errors import CellError
from rtrl.testing.cell_checks.compare import STATE, gradients, must_be_zero
from rtrl.testing.cell_checks.points import Subject
from rtrl.testing.report import Found


def row_group_failures(subject: Subject) -> Iterator[Found]:
    """A row depends on itself and on the groups before its own, and on nothing else, if the cell declares row groups.

    Cost:
        A backward pass for each row and sample, at every point.
    """
    for point in (p.with_own_cell().with_leaf_state() for p in subject.points):
        groups, size = declared_groups(point.cell), point.h[0].numel()
        if groups is None:
            return
        try:
            check_row_groups(groups, size)
        except CellError as error:
            yield Found(str(error), point.step, where="row_groups")
            return
        _, h_next, _ = point.run(grad=True)
        head = h_next.flatten(1)
        below = torch.zeros(size, dtype=torch.bool, device=head.device)
        for k, rows in enumerate(rows.to(head.device) for rows in groups):
            for i in range(len(head)):
                for row in rows:
                    weights = torch.zeros_like(head)
                    weights[i, row] = subject.draw(weights[i, row], 1.0)
                    grad = gradients(point, {"h": head}, {"h": weights}, state=True, parameters=False)[STATE][i]
                    allowed = below.index_fill(0, row, True).view_as(grad)
                    message = f"a row of group {k} depends on a state entry outside itself and the groups before it"
                    other = grad.masked_fill(allowed, 0.0).unsqueeze(0)
                    yield from must_be_zero(message, point, other, "row", offset=i)
            below[rows.flatten()] = True
