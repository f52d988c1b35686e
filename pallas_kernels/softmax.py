"""Constants of the softmax as the kernels compute it: in powers of 2, with a finite mask."""

import math

LOG2E = math.log2(math.e)
# Stands for -inf. The difference of two of these is 0 and not NaN.
MASKED = -1e30
