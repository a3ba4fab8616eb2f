"""Every limit of the format, in one place: a writer refuses what would exceed one, before anything starts, and a reader asks the same.

FORMAT.md, section "Limits", is this table; `tests/unit/format/test_format_md.py` holds the two against each other.
"""

RECORD_BYTES = 64 * 2**20
RECORD_DEPTH = 32
"""Levels of objects and arrays in a record, the record itself among them."""
RECORD_VALUES = 2_000_000
"""Commas and opening brackets in a record's text: about as many values."""
CONFIG_INT = 2**64
"""The largest integer, either way, in a user's `config`: a seed."""

KEY_INT = 2**63
"""Integer keys of a state lie within -2^63 and 2^63 - 1."""
TREE_DEPTH = 256
TENSORS = 1_000_000
RANK = 64
"""Dimensions of a tensor."""
HOLLOW_BYTES = 2**63 - 1
"""What a tensor without elements would have if its extents of 0 were 1: strides must fit in 64 bits."""

INDEX_BYTES = 2**30
"""Of an index's text."""
INDEX_VALUES = 40_000_000
"""As `RECORD_VALUES`, of an index."""
INDEX_BASE_BYTES = 4 * 2**20
INDEX_RATIO = 64
"""An index's text has at most `INDEX_BASE_BYTES` and so many times its stored bytes: honest ones 4.2 times, one of zeros alone 27."""

HEADER_BYTES = 100_000_000
"""Of a safetensors header: what the safetensors library accepts."""
HEADER_VALUES = 20_000_000
"""As `RECORD_VALUES`, of a header."""
STATE_BYTES = 2 * 2**30
"""Of all `state.pt` files of a checkpoint together."""
BLOCK_BYTES = 4 * 2**20
"""Plain bytes of a block, and of the piece of a chunk that one digest covers."""

SIZE = 2**53
"""The largest size, offset or step: what every JSON reader can hold."""
STEP = SIZE
