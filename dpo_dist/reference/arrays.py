"""The numpy arrays that are handed from room to room, by name."""

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int32]  # token ids; ~id where one is read and not scored
IntArray = npt.NDArray[np.int64]  # numbers of pairs or rows, lengths in tokens
KeyArray = npt.NDArray[np.bytes_]  # pair keys; see pair_key.py
LogpArray = npt.NDArray[np.float32]  # sums of log-probs, in nats
