"""What the two sides of the fence say to each other; both are this version of the same code.

Over the socket, frames of one size: the fence asks for a child (with its two pipes) or for its end,
the fork server tells how each ended. Over a child's pipes: the child asks for pieces and gets their
bytes alone, tells its stage, and at last its answer.
"""

from struct import Struct
from typing import Final

from modelharbor.db.files import FileFormat

CONTROL: Final = Struct("<cQQ")  # what, number of the inspection, then a number
START, KILL = b"S", b"K"  # with the size of the contents; with nothing
READY, ENDED = b"R", b"E"  # with whether calls are filtered; with a wait status

PIECE_BYTES: Final = 1024 * 1024  # at most
MOST_PIECES: Final = 256  # that one frame asks for
MOST_ASKED_BYTES: Final = 8 * 1024 * 1024  # by one frame
READ, STAGE, ANSWER, NO_MEMORY, FAILED = b"R", b"S", b"A", b"M", b"F"
COUNT: Final = Struct("<H")  # of the pieces that follow READ
PIECE: Final = Struct("<QI")  # where, how long
STAGE_AND_FORMAT: Final = Struct("<BB")  # indexes of STAGES and FORMATS
LENGTH: Final = Struct("<I")  # of what follows ANSWER and FAILED

STAGES: Final = ("sniff", "parse", "scan")
FORMATS: Final = tuple(FileFormat)
MOST_ANSWER_BYTES: Final = 1024 * 1024
MOST_FAILURE_BYTES: Final = 2000
