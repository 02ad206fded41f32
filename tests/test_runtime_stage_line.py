"""The line between two stages on CPUs."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
from torch.distributed import HashStore  # noqa: E402

from runtime.stage_line import StageLine  # noqa: E402


@pytest.fixture
def ends():
    """Both ends, in one process."""
    store, answered = HashStore(), []
    thread = threading.Thread(target=lambda: answered.append(StageLine.answer(store, "line")))
    thread.start()
    there = StageLine.call(store, "line")
    thread.join()
    yield there, answered[0]
    there.close()
    answered[0].close()


def test_what_is_sent_waits_for_its_receiver_and_may_be_overwritten(ends):
    """Nobody receives yet when two batches have been sent; both ways, more bytes than one write takes."""
    there, here = ends
    sent = [torch.randn(3, 256), torch.randn(512, 256).to(torch.bfloat16), torch.randn(1, 8)]
    for x in sent:
        copy = x.clone()
        there.send(copy)
        copy.zero_()
    for x in sent:
        found = torch.empty_like(x)
        here.receive(found)
        assert torch.equal(found, x)
    here.send(sent[1].T)  # not contiguous
    back = torch.empty(256, 512, dtype=torch.bfloat16)
    there.receive(back)
    assert torch.equal(back, sent[1].T)


def test_more_than_the_system_holds_is_sent_while_it_is_received(ends):
    there, here = ends
    x = torch.randn(16 << 20)
    thread = threading.Thread(target=there.send, args=(x,))
    thread.start()
    found = torch.empty_like(x)
    here.receive(found)
    thread.join()
    assert torch.equal(found, x)


def test_other_sizes_and_a_lost_line_are_errors(ends):
    there, here = ends
    there.send(torch.zeros(4))
    with pytest.raises(OSError, match="16 bytes came where 20 were due"):
        here.receive(torch.zeros(5))
    there.send(torch.zeros(4))
    with pytest.raises(OSError, match="16 bytes came where 12 were due"):
        here.receive(torch.zeros(3))
    there.close()
    with pytest.raises((EOFError, OSError)):
        here.receive(torch.zeros(4))
