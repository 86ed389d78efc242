"""Processes that die of an item cost that item."""

from __future__ import annotations

import os

from taehv.pools import alone, shared


def squared(item: int) -> int:
    """Ends its process at some."""
    if item in (7, 8, 60):
        os._exit(1)
    return item * item


def test_what_ends_its_process_is_told_and_the_rest_is_done() -> None:
    found = dict(shared(squared, range(70), 2, "taehv.errors"))
    deadly = {7, 8, 60}
    assert found == {i: None if i in deadly else i * i for i in range(70)}
    assert alone(squared, 3) == 9
