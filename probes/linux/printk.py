"""The kernel's log: the records of printk's lockless ring buffer, kernel/printk/printk_ringbuffer.c since 5.10.

Rules: a reader over drgn objects; it raises what drgn raises (see program.question). drgn 0.3 has such a helper, but
that reads a record whose text begins anew at the buffer's start from eight bytes too early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from drgn import Object, Program, sizeof

_STATE_BITS: Final = 2
_MAX_BITS: Final = 24  # of a ring's size: CONFIG_LOG_BUF_SHIFT goes to 25, in bytes


@dataclass(frozen=True, slots=True)
class LogRecord:
    """`timestamp` in nanoseconds since the boot; `text` may have several lines."""

    timestamp: int
    level: int
    text: bytes


def log_records(program: Program) -> list[LogRecord]:
    """Everything that is still in the log, oldest first."""
    ring = program["prb"]
    descriptors = ring.desc_ring
    if not 0 < descriptors.count_bits.value_() <= _MAX_BITS or not 0 < ring.text_data_ring.size_bits <= _MAX_BITS:
        raise ValueError("the log has an impossible size")
    word_bits = 8 * sizeof(program.type("unsigned long"))
    id_mask = (1 << word_bits - _STATE_BITS) - 1
    current, last = descriptors.tail_id.counter.value_(), descriptors.head_id.counter.value_()
    found = []
    for _ in range(1 << descriptors.count_bits.value_()):
        record = _record(program, ring, current & id_mask, id_mask)
        if record is not None:
            found.append(record)
        if (current ^ last) & id_mask == 0:
            break
        current += 1
    return found


def _record(program: Program, ring: Object, number: int, id_mask: int) -> LogRecord | None:
    """Record `number`, None where it is not written to its end, has no text or has been overwritten."""
    index = number & (1 << ring.desc_ring.count_bits.value_()) - 1
    descriptor = ring.desc_ring.descs[index].read_()
    state = descriptor.state_var.counter.value_() & (id_mask << _STATE_BITS | (1 << _STATE_BITS) - 1)
    committed = (program["desc_committed"].value_(), program["desc_finalized"].value_())
    if state & id_mask != number or state >> id_mask.bit_length() not in committed:
        return None
    word = sizeof(program.type("unsigned long"))
    data = ring.text_data_ring
    size = 1 << data.size_bits.value_()
    begin, end = (part.value_() for part in (descriptor.text_blk_lpos.begin, descriptor.text_blk_lpos.next))
    if begin & 1:  # FAILED_LPOS and NO_LPOS: a record without text
        return None
    start, stop = begin % size, end % size
    if begin // size != end // size and stop:
        start = 0  # get_data(): a block that does not fit before the buffer's end lies at its start
    start += word  # the block begins with its record's number
    length = min(ring.desc_ring.infos[index].text_len.value_(), (stop or size) - start)
    if length < 0:
        return None
    info = ring.desc_ring.infos[index].read_()
    text = program.read(data.data.value_() + start, length)
    return LogRecord(info.ts_nsec.value_(), info.level.value_(), text)
