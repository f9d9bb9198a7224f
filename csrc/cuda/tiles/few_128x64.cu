#include "../sm80.cuh"

FR_FEW_TILE(128, 64, 64, 32, 3)
