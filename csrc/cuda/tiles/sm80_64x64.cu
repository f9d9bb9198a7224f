#include "../sm80.cuh"

FR_SM80_TILE(64, 64, 32, 32, 4)
